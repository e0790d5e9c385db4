"""Why there, why then: one request's story, told from a journal alone."""

from collections import Counter
from collections.abc import Iterable

import msgspec

from rota.base.errors import DataError
from rota.base.instant import Instant, to_milliseconds, to_seconds
from rota.base.journal import Row
from rota.base.nearest import did_you_mean
from rota.serving.model.commands import (
    EVERYBODY,
    Abort,
    AbortMigration,
    ClusterCommand,
    Dispatch,
    DrainInstance,
    Fail,
    HandOver,
    Hold,
    KeepInstance,
    Migrate,
    MoveRefused,
    Reject,
    RunStep,
    SetRole,
    StartInstance,
    Stay,
    StopInstance,
    Way,
)
from rota.serving.model.events import (
    ClientLeft,
    ClusterEvent,
    FirstTokenSeen,
    HandedOver,
    InstanceLost,
    InstanceStarted,
    RequestArrived,
    RequestFailed,
    RequestFinished,
    StepFinished,
)
from rota.serving.model.instance import InstanceId, InstanceLimits
from rota.serving.model.request import Request, RequestId
from rota.serving.timelines import ROUTER_MACHINE, Change, Residents, instance_of

NUM_OTHERS_SHOWN = 3


class Moment(msgspec.Struct, frozen=True):
    """Something that happened to the request, or was decided about it."""

    at: Instant
    what: str
    """One word: arrived, held, dispatched, rejected, queued, granted, preempted, first_token, and so on."""
    text: str


class Wait(msgspec.Struct, frozen=True):
    """A stretch of time in which the request stood on an instance and was given nothing."""

    instance_id: InstanceId
    began_at: Instant
    ended_at: Instant
    num_steps: int
    """Steps that began meanwhile, all without it."""
    held_by: dict[str, int]
    """What stood in its way, and in how many of those steps."""
    num_tokens_to_others: int
    others: tuple[tuple[RequestId, int], ...]
    """Who was given most, and how many tokens."""


class Story(msgspec.Struct, frozen=True):
    """What became of one request, moment by moment."""

    request: Request
    end: str
    """finished, rejected, failed, aborted, or unfinished where the journal ends before the request does."""
    num_attempts: int
    num_preemptions: int
    num_output_tokens: int | None
    ttft_ms: float | None
    e2e_ms: float | None
    moments: tuple[Moment, ...]
    waits: tuple[Wait, ...]
    num_migrations: int = 0
    num_resumptions: int = 0
    """Attempts that went on from a token that the client had got."""

    def lines(self) -> list[str]:
        """The story as text, with times since the arrival."""
        request = self.request
        head = (
            f"{request.id}: {self.end}; class {request.priority}, tenant {request.tenant}, "
            f"{request.num_prompt_tokens:,} prompt tokens, at most {request.max_tokens:,} output tokens"
        )
        told = [f"{_since(moment.at - request.arrived_at)}  {moment.text}" for moment in self.moments]
        counts = [f"attempts {self.num_attempts}", f"preemptions {self.num_preemptions}"]
        if self.num_migrations:
            counts.append(f"moves {self.num_migrations}")
        if self.num_resumptions:
            counts.append(f"resumptions {self.num_resumptions}")
        if self.ttft_ms is not None:
            counts.append(f"ttft {self.ttft_ms:,.1f} ms")
        if self.e2e_ms is not None:
            counts.append(f"e2e {self.e2e_ms:,.1f} ms")
        return [head, *told, ", ".join(counts)]


def explain(rows: Iterable[Row], request_id: str) -> Story:
    """Read one request's story out of a journal. Raises `DataError`, with the nearest id, if it is not in there."""
    teller = _Teller(RequestId(request_id))
    for row in rows:
        teller.take(row)
    return teller.story()


class _Waiting:
    """A wait that goes on."""

    def __init__(self, machine: str, began_at: Instant) -> None:
        self.machine = machine
        self.began_at = began_at
        self.held_by: Counter[str] = Counter()
        self.tokens: Counter[RequestId] = Counter()

    def ended(self, at: Instant) -> Wait:
        return Wait(
            instance_id=instance_of(self.machine),
            began_at=self.began_at,
            ended_at=at,
            num_steps=self.held_by.total(),
            held_by=dict(self.held_by.most_common()),
            num_tokens_to_others=self.tokens.total(),
            others=tuple(self.tokens.most_common(NUM_OTHERS_SHOWN)),
        )


class _Teller:
    """A story while its journal is being read."""

    def __init__(self, request_id: RequestId) -> None:
        self._id = request_id
        self._request: Request | None = None
        self._seen: dict[RequestId, None] = {}
        self._unfinished: dict[RequestId, None] = {}
        self._limits: dict[InstanceId, InstanceLimits] = {}
        self._instances: dict[str, Residents] = {}
        self._moments: list[Moment] = []
        self._waits: list[Wait] = []
        self._waiting: _Waiting | None = None
        self._has_router = False
        self._arrived_at = Instant(0)
        self._first_token_at: Instant | None = None
        self._ended_at: Instant | None = None
        self._end = "unfinished"
        self._at = Instant(0)
        self._num_attempts = 0
        self._num_preemptions = 0
        self._num_migrations = 0
        self._num_resumptions = 0
        self._move: Migrate | None = None
        self._num_output_tokens: int | None = None

    def take(self, row: Row) -> None:
        self._at = row.at
        if row.machine == ROUTER_MACHINE:
            self._has_router = True
            if row.event is not None:
                self._router_heard(row.event)
            for command in row.commands:
                self._router_decided(command)
        else:
            self._instance(row)

    def story(self) -> Story:
        if self._request is None:
            hint = did_you_mean(self._id, self._seen)
            raise DataError(f"REQUEST: the journal has no request {self._id!r}", hint=hint)
        self._end_wait()
        if self._end == "unfinished":
            self._tell("unfinished", "the journal ends here; the request had not")
        return Story(
            request=self._request,
            end=self._end,
            num_attempts=self._num_attempts,
            num_preemptions=self._num_preemptions,
            num_output_tokens=self._num_output_tokens,
            ttft_ms=_since_arrival_ms(self._first_token_at, self._arrived_at),
            e2e_ms=_since_arrival_ms(self._ended_at, self._arrived_at) if self._end == "finished" else None,
            moments=tuple(self._moments),
            waits=tuple(self._waits),
            num_migrations=self._num_migrations,
            num_resumptions=self._num_resumptions,
        )

    def _tell(self, what: str, text: str) -> None:
        self._moments.append(Moment(self._at, what, text))

    def _over(self, end: str, text: str) -> None:
        self._end, self._ended_at = end, self._at
        self._tell(end, text)

    # --- the router ---------------------------------------------------------------------------------------------------

    def _router_heard(self, event: ClusterEvent) -> None:
        match event:
            case InstanceStarted(spec):
                self._limits[spec.id] = spec.limits
            case InstanceLost():
                if self._waiting is not None and instance_of(self._waiting.machine) == event.instance_id:
                    self._tell("lost", f"{event.instance_id} was lost: {event.reason or 'no reason given'}")
            case RequestArrived(request):
                self._arrived(request)
            case RequestFinished() | ClientLeft():
                self._unfinished.pop(event.request_id, None)
            case HandedOver():
                self._handed_over(event)
        if getattr(event, "request_id", None) != self._id:
            return
        match event:
            case FirstTokenSeen() if self._first_token_at is not None:
                self._tell("next_token", f"the next token came from {event.instance_id}")
            case FirstTokenSeen():
                self._first_token_at = self._at
                ttft = to_milliseconds(self._at - self._arrived_at)
                self._tell("first_token", f"first token from {event.instance_id}, {ttft:,.1f} ms after arrival")
            case RequestFailed():
                had = "" if event.num_output_tokens is None else f" after {event.num_output_tokens:,} tokens"
                self._tell("attempt_failed", f"the attempt at {event.instance_id} failed{had}: {event.reason}")
            case RequestFinished():
                self._num_output_tokens = event.num_output_tokens
                tokens = "" if event.num_output_tokens is None else f", {event.num_output_tokens:,} output tokens"
                self._over("finished", f"finished at {event.instance_id}{tokens}")
            case ClientLeft():
                self._over("aborted", "the client left")

    def _handed_over(self, event: HandedOver) -> None:
        move = self._move
        if move is None or move.migration_id != event.migration_id:
            return
        self._move = None
        self._num_migrations += 1
        stood = f"stood for {to_milliseconds(event.downtime):,.1f} ms"
        copied = f", {event.num_bytes:,} bytes were copied" if event.num_bytes else ""
        self._tell("moved", f"moved from {move.source} to {move.destination}: {stood}{copied}")

    def _arrived(self, request: Request) -> None:
        self._seen[request.id] = None
        if request.id == self._id:
            self._begin(request)
            place, num_others = len(self._seen), len(self._unfinished)
            self._tell("arrived", f"arrived at the router as request {place:,}; {num_others:,} unfinished then")
        self._unfinished[request.id] = None

    def _begin(self, request: Request) -> None:
        self._request = request
        self._arrived_at = request.arrived_at

    def _router_decided(self, command: ClusterCommand) -> None:
        if isinstance(command, StartInstance | DrainInstance | KeepInstance | StopInstance | SetRole):
            return
        if isinstance(command, Reject | Fail):
            self._unfinished.pop(command.request_id, None)
        if command.request_id != self._id:
            return
        match command:
            case Dispatch():
                self._num_attempts = command.attempt
                self._let_in(command.admission)
                scores = ", ".join(f"{instance_id} {score:.2f}" for instance_id, score in command.scores)
                goes_on = command.num_output_tokens > 0
                self._num_resumptions += goes_on
                what = f"{' to go on' if goes_on else ''}{' for its prefill only' if command.prefill_only else ''}"
                text = f"sent to {command.instance_id}{what}: {command.reason}"
                self._tell("resumed" if goes_on else "dispatched", f"{text} (scores: {scores})" if scores else text)
            case Stay():
                self._tell("stays", f"goes on at {command.instance_id}: {command.reason}")
            case Hold():
                self._let_in(command.admission)
                self._tell("held", f"held at the router: {command.reason}")
            case Reject():
                self._over("rejected", f"refused with status {command.status}: {command.reason}")
            case Fail():
                self._over("failed", f"failed: {command.reason}")
            case Migrate():
                self._move = command
                text = f"to be moved from {command.source} to {command.destination} {HOW[command.way]}"
                self._tell("move_begun", f"{text}: {command.reason}")
            case MoveRefused():
                self._tell("move_refused", f"not moved, as was asked for: {command.reason}")
            case HandOver() if self._move is not None:
                self._tell(
                    "hand_over", f"room is kept at {self._move.destination}; told to stop at {self._move.source}"
                )
            case AbortMigration():
                where = "" if self._move is None else f" from {self._move.source} to {self._move.destination}"
                self._move = None
                self._tell("move_given_up", f"the move{where} was given up: {command.reason}")
            case Abort():
                self._tell("abort_ordered", f"{command.instance_id} was told to stop: {command.reason}")

    def _let_in(self, why: str) -> None:
        if why:
            self._tell("admitted", f"admitted: {why}")

    # --- instances ----------------------------------------------------------------------------------------------------

    def _instance(self, row: Row) -> None:
        residents = self._instances.setdefault(row.machine, Residents())
        was_running = dict(residents.running)
        num_ahead = residents.num_waiting
        was_under_way = None if isinstance(row.event, StepFinished) else residents.step
        changes = residents.tell(row)
        for change in changes:
            if change.what == "queued":
                self._seen.setdefault(change.request_id)
            if change.request_id == self._id:
                if change.what == "queued":
                    self._queued(row.machine, residents, num_ahead, len(was_running), was_under_way)
                else:
                    self._change(row.machine, residents, change, was_running)
        step = residents.step
        waiting = self._waiting
        if waiting is not None and waiting.machine == row.machine and step is not None and step is not was_under_way:
            limits = self._limits.get(instance_of(row.machine))
            waiting.held_by[_obstacle(step, residents, limits, self._id)] += 1
            waiting.tokens.update(dict(step.grants))

    def _change(
        self,
        machine: str,
        residents: Residents,
        change: Change,
        was_running: dict[RequestId, None],
    ) -> None:
        instance_id = instance_of(machine)
        step = residents.step
        match change.what:
            case "admitted" if step is not None:
                self._granted(instance_id, step)
            case "preempted" if step is not None:
                self._num_preemptions += 1
                why = _why_preempted(step, residents, was_running, self._request)
                self._tell("preempted", f"preempted before step {step.step_id}: {why}")
                self._waiting = _Waiting(machine, self._at)
            case "stopped":
                self._tell("rests", f"{instance_id} let it rest, with its blocks")
            case "adopted":
                self._tell("adopted", f"{instance_id} took it up with its blocks")
            case "resumed":
                self._tell("goes_on", f"{instance_id} goes on with it")
            case "rejected":
                self._waiting = None
                self._tell("refused", f"{instance_id} refused it: {change.reason}")
            case "finished" if not self._has_router:
                self._over("finished", f"finished at {instance_id}")
            case "aborted":
                wait = self._end_wait()
                self._tell("stopped", f"{instance_id} dropped it" + (f", {_told(wait)}" if wait is not None else ""))
                if not self._has_router:
                    self._over("aborted", "aborted")

    def _queued(
        self, machine: str, residents: Residents, num_waiting: int, num_running: int, under_way: RunStep | None
    ) -> None:
        if self._request is None:  # a journal of one instance, with no router in it
            self._begin(residents.requests[self._id])
        busy = f"; step {under_way.step_id} was under way" if under_way is not None else ""
        there = f"{num_waiting:,} waited and {num_running:,} ran there{busy}"
        self._tell("queued", f"queued at {instance_of(machine)}: {there}")
        self._waiting = _Waiting(machine, self._at)

    def _granted(self, instance_id: InstanceId, step: RunStep) -> None:
        num_tokens = dict(step.grants)[self._id]
        wait = self._end_wait()
        again = "granted again" if self._num_preemptions else "first granted"
        text = f"{again}: {num_tokens:,} tokens in step {step.step_id} of {instance_id}"
        self._tell("granted", text + (f", {_told(wait)}" if wait is not None else ""))

    def _end_wait(self) -> Wait | None:
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return None
        self._waits.append(waiting.ended(self._at))
        return self._waits[-1]


def _told(wait: Wait) -> str:
    waited = f"after {to_milliseconds(wait.ended_at - wait.began_at):,.1f} ms"
    if not wait.num_steps:
        return f"{waited}; no step began without it"
    held = ", ".join(f"{what} ({count:,} {_steps(count)})" for what, count in wait.held_by.items())
    others = ", ".join(f"{request_id} {num_tokens:,}" for request_id, num_tokens in wait.others)
    return (
        f"{waited} and {wait.num_steps:,} {_steps(wait.num_steps)} without it, held by: {held}; meanwhile others got "
        f"{wait.num_tokens_to_others:,} tokens (most: {others})"
    )


def _steps(count: int) -> str:
    return "step" if count == 1 else "steps"


HOW = {
    Way.COPY: "by copying its blocks while it decodes",
    Way.HAND_OFF: "by handing over its blocks",
    Way.REPLAY: "by computing its tokens anew",
}
WHY_REFUSED = {
    "no_budget": "the step's token budget was spent",
    "no_slot": "every slot was taken",
    "no_memory": "too few free blocks",
    "not_pending": "it had nothing to compute",
}


def _obstacle(step: RunStep, residents: Residents, limits: InstanceLimits | None, request_id: RequestId) -> str:
    """What kept a waiting request out of a step: what the step says, or, in a journal of an engine that gives no
    reasons, what it shows."""
    refused = {reason.request_id: reason.why for reason in step.reasons if reason.choice == "refused"}
    if request_id in refused:
        return WHY_REFUSED.get(refused[request_id], refused[request_id])
    others = [waiting_id for waiting_id in refused if waiting_id != EVERYBODY and waiting_id not in residents.running]
    if others:
        why = WHY_REFUSED.get(refused[others[-1]], refused[others[-1]])
        return f"{others[-1]} stood before it, and {why}"
    if EVERYBODY in refused:
        return WHY_REFUSED.get(refused[EVERYBODY], refused[EVERYBODY])
    if limits is None:
        return "others came first"
    num_tokens = sum(num_tokens for _, num_tokens in step.grants)
    if num_tokens >= limits.max_num_batched_tokens:
        return "the token budget was spent"
    if len(residents.running) >= limits.max_num_seqs:
        return "every slot was taken"
    request = residents.requests.get(request_id)
    if request is not None and step.num_free_blocks * limits.block_size < request.num_prompt_tokens:
        return "too few free blocks"
    return "others stood before it"


def _why_preempted(
    step: RunStep, residents: Residents, was_running: dict[RequestId, None], request: Request | None
) -> str:
    """Who took its place: those of a higher class that the same step admitted, or nobody, if only memory ran out."""
    said = [reason for reason in step.reasons if request is not None and reason.request_id == request.id]
    if said and said[0].choice == "preempted":
        whom = said[0].why.removeprefix("no_memory for ")
        return f"memory ran out for {'its own next block' if request and whom == request.id else whom}"
    admitted = [
        residents.requests[request_id]
        for request_id, _ in step.grants
        if request_id not in was_running and request_id in residents.requests
    ]
    higher = [other for other in admitted if request is not None and other.priority < request.priority]
    if higher:
        return "displaced by " + ", ".join(f"{other.id} (class {other.priority})" for other in higher)
    return f"memory ran out; {len(step.grants):,} others ran on with {step.num_free_blocks:,} blocks left"


def _since_arrival_ms(at: Instant | None, arrived_at: Instant) -> float | None:
    return None if at is None else to_milliseconds(at - arrived_at)


def _since(duration: int) -> str:
    return f"{to_seconds(duration):+12.6f} s"
