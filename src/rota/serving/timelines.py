"""A journal as a picture: steps as spans, requests as spans that may cross, memory as counters, decisions as marks."""

from collections.abc import Collection, Iterable, Mapping
from itertools import chain, count
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from rota.base.instant import Instant, to_milliseconds
from rota.base.journal import Row
from rota.base.timeline import Timeline
from rota.serving.model.commands import (
    Abort,
    AbortMigration,
    Dispatch,
    DrainInstance,
    Fail,
    Hold,
    KeepInstance,
    Migrate,
    Reject,
    RejectSequence,
    RunStep,
    SequenceStopped,
    SetRole,
    StartInstance,
    StopInstance,
)
from rota.serving.model.events import (
    ClientLeft,
    HandedOver,
    InstanceDraining,
    InstanceLost,
    InstanceStarted,
    RequestArrived,
    RequestFinished,
    SequenceAborted,
    SequenceAdopted,
    SequenceArrived,
    SequenceLeft,
    SequenceResumed,
    StepFinished,
)
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import Request, RequestId

ROUTER_MACHINE = "cluster"
ROUTER = "router"
"""The router's resource in a timeline."""
STEPS, DECISIONS = "steps", "decisions"
MOVES_OUT, MOVES_IN = "moves out", "moves in"


def instance_of(machine: str) -> InstanceId:
    """The instance behind a machine's name; every incarnation of it is the same instance."""
    return InstanceId(resource_of(machine).partition("#")[0])


def resource_of(machine: str) -> str:
    """How a timeline calls a machine: the router, or an instance with its incarnation."""
    return ROUTER if machine == ROUTER_MACHINE else machine.removeprefix("instance/")


class Change(NamedTuple):
    """What a row did to one request on an instance."""

    what: Literal[
        "queued", "admitted", "preempted", "finished", "aborted", "rejected", "adopted", "stopped", "resumed", "left"
    ]
    request_id: RequestId
    reason: str = ""


class Residents:
    """Who waits and who runs on one instance, as the rows of its machine tell it."""

    def __init__(self) -> None:
        self.requests: dict[RequestId, Request] = {}
        """Everybody here, oldest first."""
        self.running: dict[RequestId, None] = {}
        self.step: RunStep | None = None
        """The step under way."""
        self.step_began_at = Instant(0)

    @property
    def num_waiting(self) -> int:
        return len(self.requests) - len(self.running)

    def tell(self, row: Row) -> list[Change]:
        """Take the next row of this instance; returns what it changed, in order."""
        changes: list[Change] = []
        match row.event:
            case SequenceArrived(request):
                self.requests[request.id] = request
                changes.append(Change("queued", request.id))
            case StepFinished():
                self.step = None
                for request_id in row.event.finished:
                    self._leave(request_id, Change("finished", request_id), changes)
            case SequenceAborted(request_id):
                self._leave(request_id, Change("aborted", request_id), changes)
            case SequenceAdopted(request):
                self.requests[request.id] = request
                self.running[request.id] = None
                changes.append(Change("adopted", request.id))
            case SequenceResumed(request_id) if request_id in self.running:
                changes.append(Change("resumed", request_id))
            case SequenceLeft(request_id):
                self._leave(request_id, Change("left", request_id), changes)
        for command in row.commands:
            if isinstance(command, RejectSequence):
                self._leave(command.request_id, Change("rejected", command.request_id, command.reason), changes)
            elif isinstance(command, SequenceStopped):
                changes.append(Change("stopped", command.request_id))
            elif isinstance(command, RunStep):
                self._begin(command, row.at, changes)
        return changes

    def _begin(self, step: RunStep, at: Instant, changes: list[Change]) -> None:
        for request_id in step.preempted:
            if request_id in self.running:
                del self.running[request_id]
                changes.append(Change("preempted", request_id))
        for request_id, _ in step.grants:
            if request_id not in self.running:
                self.running[request_id] = None
                changes.append(Change("admitted", request_id))
        self.step, self.step_began_at = step, at

    def _leave(self, request_id: RequestId, change: Change, changes: list[Change]) -> None:
        if self.requests.pop(request_id, None) is not None:
            self.running.pop(request_id, None)
            changes.append(change)


def timeline_of(rows: Iterable[Row]) -> Timeline:
    """The timeline of a journal. What had not ended by the last row ends there and says so in its arguments."""
    drawing = _Drawing()
    for row in rows:
        drawing.take(row)
    drawing.end()
    return drawing.timeline


class _Drawing:
    """A timeline while its journal is being read."""

    def __init__(self) -> None:
        self.timeline = Timeline()
        self._at = Instant(0)
        self._instances: dict[str, Residents] = {}
        self._phases: dict[tuple[str, RequestId], tuple[str, Instant]] = {}
        """Open phases of requests on instances: name and begin."""
        self._requests: dict[RequestId, tuple[Request, Instant]] = {}
        """Requests that have not ended at the router."""
        self._resources: dict[InstanceId, str] = {}
        """What the timeline calls the latest incarnation of each instance."""
        self._moves: dict[int, _Move] = {}
        """Under way, by their ids."""
        self._moved_in: dict[tuple[str, str], Instant] = {}
        """Until when each track of arrivals is taken."""

    def take(self, row: Row) -> None:
        self._at = row.at
        if row.machine == ROUTER_MACHINE:
            self._router(row)
        else:
            self._instance(row)

    def end(self) -> None:
        for machine, residents in self._instances.items():
            if residents.step is not None:
                self._close_step(machine, residents, residents.step, is_finished=False)
        for machine, request_id in list(self._phases):
            self._close_phase(machine, request_id, "unfinished")
        for request_id in list(self._requests):
            self._close_request(request_id, "unfinished")
        for migration_id in list(self._moves):
            self._close_move(migration_id, "unfinished")

    # --- the router ---------------------------------------------------------------------------------------------------

    def _router(self, row: Row) -> None:
        match row.event:
            case RequestArrived(request):
                self._requests[request.id] = (request, row.at)
            case RequestFinished():
                self._close_request(row.event.request_id, "finished")
            case ClientLeft(request_id):
                self._close_request(request_id, "aborted")
            case HandedOver():
                self._arrive(row.event)
            case InstanceStarted(spec):
                self._mark(ROUTER, f"started {spec.id}", {})
            case InstanceLost():
                self._mark(ROUTER, f"lost {row.event.instance_id}", {"reason": row.event.reason})
            case InstanceDraining(instance_id):
                self._mark(ROUTER, f"drain {instance_id}", {})
        for command in row.commands:
            self._decision(command)

    def _decision(self, command: object) -> None:
        if isinstance(command, Dispatch):
            facts: dict[str, Any] = {
                "request": command.request_id,
                "reason": command.reason,
                "attempt": command.attempt,
            }
            if command.num_output_tokens:
                facts["num_output_tokens"] = command.num_output_tokens
            if command.scores:
                facts["scores"] = dict(command.scores)
            self._mark(ROUTER, f"dispatch to {command.instance_id}", facts)
        elif isinstance(command, Hold):
            self._mark(ROUTER, "hold", {"request": command.request_id, "reason": command.reason})
        elif isinstance(command, Reject):
            facts = {"request": command.request_id, "reason": command.reason, "status": command.status}
            self._mark(ROUTER, "reject", facts)
            self._close_request(command.request_id, "rejected")
        elif isinstance(command, Fail):
            self._mark(ROUTER, "fail", {"request": command.request_id, "reason": command.reason})
            self._close_request(command.request_id, "failed")
        elif isinstance(command, Abort):
            facts = {"request": command.request_id, "reason": command.reason}
            self._mark(ROUTER, f"abort at {command.instance_id}", facts)
        elif isinstance(command, Migrate):
            self._mark(
                ROUTER,
                f"move {command.source} to {command.destination}",
                {"request": command.request_id, "way": command.way.value, "reason": command.reason},
            )
            taken = {move.track for move in self._moves.values() if move.order.source == command.source}
            self._moves[command.migration_id] = _Move(command, self._at, _free_track(MOVES_OUT, taken))
        elif isinstance(command, AbortMigration):
            self._close_move(command.migration_id, f"given up: {command.reason}")
        elif isinstance(command, StartInstance | DrainInstance | KeepInstance | StopInstance | SetRole):
            verb = type(command).__name__.removesuffix("Instance").lower()
            self._mark(ROUTER, f"{verb} {command.instance_id}, ordered", {"reason": command.reason})

    def _close_request(self, request_id: RequestId, end: str) -> None:
        found = self._requests.pop(request_id, None)
        if found is not None:
            request, began_at = found
            self.timeline.add_async_span(
                request_id, ROUTER, "request", began_at, self._at, {**_facts_of(request), "end": end}
            )

    # --- moves --------------------------------------------------------------------------------------------------------

    def _arrive(self, event: HandedOver) -> None:
        """Draw the time in which a request stood at neither side, and the arrow from where it stopped."""
        move = self._moves.get(event.migration_id)
        if move is None:
            return  # it was given up before this was heard of
        stopped_at = max(move.began_at, Instant(self._at - event.downtime))
        order = move.order
        facts = {"downtime_ms": to_milliseconds(event.downtime), "num_bytes": event.num_bytes}
        source, destination = self._resource(order.source), self._resource(order.destination)
        # One that ends where another begins does not cross it, so that a second track is for those at one time only.
        taken = {
            track
            for (resource, track), until in self._moved_in.items()
            if resource == destination and until > stopped_at
        }
        track = _free_track(MOVES_IN, taken)
        self._moved_in[destination, track] = self._at
        name = f"{order.request_id} from {order.source}"
        self.timeline.add_span(destination, track, name, stopped_at, self._at, {"request": order.request_id, **facts})
        arrow = f"{order.request_id} moves"
        self.timeline.add_flow(arrow, (source, move.track, stopped_at), (destination, track, stopped_at))
        self._close_move(event.migration_id, "handed over", facts)

    def _close_move(self, migration_id: int, end: str, facts: Mapping[str, Any] = MappingProxyType({})) -> None:
        move = self._moves.pop(migration_id, None)
        if move is not None:
            order = move.order
            args = {"request": order.request_id, "way": order.way.value, "reason": order.reason, "end": end, **facts}
            name = f"{order.request_id} to {order.destination}"
            self.timeline.add_span(self._resource(order.source), move.track, name, move.began_at, self._at, args)

    def _resource(self, instance_id: InstanceId) -> str:
        return self._resources.get(instance_id, instance_id)

    # --- instances ----------------------------------------------------------------------------------------------------

    def _instance(self, row: Row) -> None:
        residents = self._instances.get(row.machine)
        if residents is None:
            residents = self._instances[row.machine] = Residents()
            self._resources[instance_of(row.machine)] = resource_of(row.machine)
        step = residents.step
        if step is not None and isinstance(row.event, StepFinished):
            self._close_step(row.machine, residents, step, is_finished=True)
        for change in residents.tell(row):
            self._change(row.machine, change)
        if residents.step is not None and residents.step is not step:
            resource = resource_of(row.machine)
            self.timeline.add_counter(resource, "free blocks", row.at, residents.step.num_free_blocks)
            self.timeline.add_counter(resource, "running", row.at, len(residents.running))
            self.timeline.add_counter(resource, "waiting", row.at, residents.num_waiting)

    def _change(self, machine: str, change: Change) -> None:
        request_id = change.request_id
        match change.what:
            case "queued":
                self._phases[machine, request_id] = ("queued", self._at)
            case "admitted":
                self._close_phase(machine, request_id, "admitted")
                self._phases[machine, request_id] = ("running", self._at)
            case "preempted":
                self._close_phase(machine, request_id, "preempted")
                self._phases[machine, request_id] = ("preempted", self._at)
                self._mark(resource_of(machine), "preempt", {"request": request_id})
            case "adopted" | "resumed":
                self._close_phase(machine, request_id, change.what)
                self._phases[machine, request_id] = ("running", self._at)
            case "stopped":
                self._close_phase(machine, request_id, "stopped")
                self._phases[machine, request_id] = ("stopped", self._at)
            case "rejected":
                self._close_phase(machine, request_id, "rejected")
                self._mark(resource_of(machine), "reject", {"request": request_id, "reason": change.reason})
            case _:
                self._close_phase(machine, request_id, change.what)

    def _close_phase(self, machine: str, request_id: RequestId, end: str) -> None:
        phase = self._phases.pop((machine, request_id), None)
        if phase is not None:
            name, began_at = phase
            self.timeline.add_async_span(request_id, resource_of(machine), name, began_at, self._at, {"end": end})

    def _close_step(self, machine: str, residents: Residents, step: RunStep, *, is_finished: bool) -> None:
        num_tokens = sum(num_tokens for _, num_tokens in step.grants)
        args: dict[str, Any] = {
            "step_id": step.step_id,
            "num_seqs": len(step.grants),
            "num_tokens": num_tokens,
        }
        if step.preempted:
            args["preempted"] = list(step.preempted)
        if step.reasons:
            args["reasons"] = [f"{reason.request_id} {reason.choice}: {reason.why}" for reason in step.reasons]
        if not is_finished:
            args["end"] = "unfinished"
        name = _kind_of_step(step)
        self.timeline.add_span(resource_of(machine), STEPS, name, residents.step_began_at, self._at, args)

    def _mark(self, resource: str, name: str, args: dict[str, Any]) -> None:
        self.timeline.add_instant(resource, DECISIONS, name, self._at, args)


class _Move(NamedTuple):
    """A migration under way."""

    order: Migrate
    began_at: Instant
    track: str
    """Of its source, taken by no other move at that time."""


def _free_track(name: str, taken: Collection[str]) -> str:
    """The first of `name`, `name 2`, ... that is not taken: spans of one track must not cross."""
    tracks = chain([name], (f"{name} {number}" for number in count(2)))
    return next(track for track in tracks if track not in taken)


def _kind_of_step(step: RunStep) -> str:
    """Steps are told apart by name, so that a viewer gives each kind a colour and adds up its time."""
    num_prefills = sum(num_tokens > 1 for _, num_tokens in step.grants)
    if num_prefills == 0:
        return "decode"
    return "prefill" if num_prefills == len(step.grants) else "mixed"


def _facts_of(request: Request) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "tenant": request.tenant,
        "priority": request.priority,
        "num_prompt_tokens": request.num_prompt_tokens,
    }
    for name in ("session", "program"):
        if getattr(request, name) is not None:
            facts[name] = getattr(request, name)
    if request.slo.ttft is not None:
        facts["slo_ttft_ms"] = to_milliseconds(request.slo.ttft)
    if request.slo.tpot is not None:
        facts["slo_tpot_ms"] = to_milliseconds(request.slo.tpot)
    return facts
