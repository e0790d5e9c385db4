"""The world around the router: arrivals, instances with their true output lengths, reports that come late, faults."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import msgspec

from rota.base.errors import ConfigError
from rota.base.instant import Duration, Instant, after, milliseconds, seconds
from rota.base.journal import Journal
from rota.runtime.faults import Fault, FaultPlan
from rota.runtime.simulation import SimulationLoop
from rota.serving.api import StepTimePredictor
from rota.serving.assemble import CLUSTER, SystemConfig, build_cluster, build_instance, refuse_moves, refuse_roles
from rota.serving.metrics.definitions import RequestRecord, Status
from rota.serving.model.commands import (
    Abort,
    AbortMigration,
    ClusterCommand,
    Commit,
    CopyOut,
    Dispatch,
    Fail,
    HandOver,
    InstanceCommand,
    Migrate,
    Reject,
    SetRole,
    StartInstance,
    Stay,
    StopInstance,
)
from rota.serving.model.events import (
    ClientLeft,
    FirstTokenSeen,
    InstanceLost,
    InstanceReported,
    InstanceStarted,
    RequestArrived,
    RequestFailed,
    RequestFinished,
    StopAsked,
)
from rota.serving.model.instance import InstanceId, InstanceSpec
from rota.serving.model.request import Request, RequestId
from rota.serving.sim.fleet import FLEET, FLEET_FAULTS, SimulatedFleet, StartUp
from rota.serving.sim.ground_truth import GroundTruth
from rota.serving.sim.instance import RANK_ARRIVAL, RANK_STEP, Lost, SequenceState, SimulatedInstance, SimulatedMachine
from rota.serving.sim.messages import MESSAGE_FAULTS, Messages
from rota.serving.sim.migration import Hooks, Moves, Transfer
from rota.serving.sim.open_request import OpenRequest
from rota.serving.sim.predictions import Predictions
from rota.serving.sim.samples import Sampler
from rota.serving.sim.swap import with_swap
from rota.serving.stack import LengthServices, engine_policies

EngineKind = Literal["model", "vllm"]
"""Who decides an instance's steps: our block-level model, or vLLM's scheduler object with our plug-in in it."""

Followers = Callable[[RequestId, Instant], Iterable[tuple[Request, int]]]
"""Requests, with their true output lengths, that come because one has ended, not before that instant."""

RANK_REPORT, RANK_FAULT = 2, 3


@dataclass(frozen=True, slots=True)
class WorldOptions:
    """How the world behaves around the machines. All durations in nanoseconds."""

    step_overhead: Duration = Duration(0)
    """Between two steps of an engine."""
    front_end: Duration = Duration(0)
    """Between a client and an engine's steps, both ways together. The same for all, so it shifts what clients see and
    nothing that is decided."""
    report_interval: Duration = seconds(1)
    """Between two load reports of an instance; 0 for none."""
    report_delay: Duration = milliseconds(50)
    """From the moment that a report describes until the router hears it."""
    restart_after: Duration = seconds(30)
    """From a crash until the instance takes requests again, where the fault does not say."""
    transfer: Transfer = Transfer()
    """How the KV of requests that move travels."""
    start_up: StartUp = StartUp()
    """How long instances take to start, where a stack scales them."""
    role_change: Duration = milliseconds(6)
    """From the order that gives an instance another role until it has it. TetriInfer measured 5 to 7 ms."""
    resume: bool = False
    """Whether a request outlives the crash of its instance after its first token: it goes on elsewhere with the tokens
    that its client has got."""
    leap: bool = True
    """Whether runs of equal steps are played at once; without, every step by itself, with the same outcome."""
    start: Instant = Instant(0)
    """When the simulation begins; only the time-shift gate sets it."""


class SimulatedCluster:
    """A router's machine and its instances in virtual time.

    `arrivals` are pulled one at a time, each with its true output length, in order of arrival; the origin of their
    `arrived_at` is `options.start`. The records of ended requests are in `records`, in order of their end, unless
    `on_record` takes them.
    """

    def __init__(
        self,
        config: SystemConfig,
        arrivals: Iterable[tuple[Request, int]],
        step_time: StepTimePredictor,
        options: WorldOptions = WorldOptions(),
        *,
        journal: Journal | None = None,
        faults: FaultPlan = FaultPlan(),
        engine: EngineKind = "model",
        on_ended: Callable[[int, Instant], None] | None = None,
        followers: Followers | None = None,
        on_record: Callable[[RequestRecord], None] | None = None,
        step_times: Mapping[InstanceId, StepTimePredictor] = MappingProxyType({}),
    ) -> None:
        """`followers` says which requests come because one has ended, beside those of `arrivals`. `on_ended(number of
        requests ended, now)` is called now and then, for progress. `step_times` are those of instances that are not
        like the others. Raises `ConfigError` for a fault at an unknown instance."""
        self.config = config
        self.records: list[RequestRecord] = []
        self._engine = engine
        self.loop = SimulationLoop(options.start, journal)
        self._options = options
        self._step_time = step_time
        self._step_times = step_times
        self._truth = GroundTruth()
        self.predictions = Predictions(self._truth)
        self._arrivals: Iterator[tuple[Request, int]] = iter(arrivals)
        self._open: dict[RequestId, OpenRequest] = {}
        refuse_roles(config.stack, config.roles)
        if engine == "vllm":
            refuse_moves(config.stack, config.roles, "vLLM's scheduler object")
        self._instances: dict[InstanceId, SimulatedInstance] = {}
        self._retired: list[SimulatedMachine] = []
        self._specs = {spec.id: spec for spec in config.instances}
        self._incarnations = dict.fromkeys(self._specs, 0)
        self._ranks = {
            spec.id: RANK_STEP - len(config.instances) + number for number, spec in enumerate(config.instances)
        }
        self.sampler = Sampler(tuple(self._specs))
        self._on_ended = on_ended
        self._on_record = self.records.append if on_record is None else on_record
        self._num_ended = 0
        self._resting: list[OpenRequest] = []
        """Those who rest from the step on that is just ending."""
        self._followers = followers
        self._faults = faults
        hooks = Hooks(Messages(self.loop, faults).say, self._on_stopped, self._on_handed_over)
        self.moves = Moves(self.loop, options.transfer, self._instances, hooks)
        self.cluster = build_cluster(config.stack, config.seed)
        """The router's machine, to be read."""
        self.loop.add_machine(CLUSTER, self.cluster, self._carry_out)
        self._fleet = self._build_fleet()
        for spec in config.instances:
            self._start_instance(spec)
        for fault in faults:
            self._schedule_fault(fault)

    def _build_fleet(self) -> SimulatedFleet | None:
        book = self.cluster.fleet
        if book is None:
            return None
        bring_up, take_down = self._bring_up, self._take_down
        start_up = self._options.start_up
        return SimulatedFleet(
            self.loop, book.scale_every, start_up, self._faults, bring_up=bring_up, take_down=take_down
        )

    def run(self) -> None:
        """Play until every request has ended. Raises `StarvationError` if one never would."""
        self._schedule_next_arrival()
        if self._options.report_interval:
            for instance_id in self._specs:
                self._schedule_report(instance_id)
        if self._fleet is not None:
            self._fleet.begin()
        self.loop.run()

    def machines(self) -> list[SimulatedMachine]:
        """Every instance machine that ran, those lost to a crash included."""
        return self._retired + [instance.machine for instance in self._instances.values()]

    # --- arrivals and clients ----------------------------------------------------------------------------------------

    def _schedule_next_arrival(self) -> None:
        following = next(self._arrivals, None)
        if following is None:
            return
        self._schedule_arrival(*following, is_open=True)

    def _schedule_arrival(self, request: Request, num_output_tokens: int, *, is_open: bool) -> None:
        """Have a request arrive at its instant; an open one brings the next open one after it."""

        def arrive(now: Instant) -> None:
            if is_open:
                self._schedule_next_arrival()
            self._truth.add(request, num_output_tokens)
            self._open[request.id] = OpenRequest(request)
            self.loop.deliver(CLUSTER, RequestArrived(request))

        self.loop.call_at(request.arrived_at, arrive, RANK_ARRIVAL)

    def _carry_out(self, name: str, command: ClusterCommand, now: Instant) -> None:
        if isinstance(command, Dispatch):
            entry = self._open[command.request_id]
            entry.instance_id = command.instance_id
            instance = self._instances.get(command.instance_id)
            if instance is None:
                num_given = command.num_output_tokens
                self._fail_attempt(command.request_id, command.instance_id, "the instance is gone", num_given)
            else:
                entry.rests_next, entry.decode_at = command.prefill_only, command.decode_at
                instance.submit(entry.request, command.num_output_tokens)
        elif isinstance(command, Stay):
            instance = self._instances.get(command.instance_id)
            if instance is not None:
                instance.resume(command.request_id)
        elif isinstance(command, Abort):
            instance = self._instances.get(command.instance_id)
            if instance is not None:
                instance.abort(command.request_id)
        elif isinstance(command, Reject):
            self._end(command.request_id, "rejected", now, command.reason)
        elif isinstance(command, Fail):
            self._end(command.request_id, "failed", now, command.reason)
        elif isinstance(command, SetRole):
            at = after(now, self._options.role_change)
            self.loop.call_at(at, lambda _: self._set_role(command), RANK_FAULT)
        elif isinstance(command, StartInstance) and self._fleet is not None:
            self._fleet.start(command, now)
        elif isinstance(command, StopInstance) and self._fleet is not None:
            self._fleet.stop(command, now)
        elif isinstance(command, Migrate | CopyOut | HandOver | Commit | AbortMigration):
            moving = self._open.get(command.request_id)
            request, decode_at = (None, None) if moving is None else (moving.request, moving.decode_at)
            self.moves.carry_out(command, request, now, decode_at)

    # --- what instances give (Listener) ------------------------------------------------------------------------------

    def on_first_token(self, instance_id: InstanceId, request_id: RequestId, at: Instant) -> None:
        entry = self._open.get(request_id)
        if entry is not None and entry.first_token_at is None:
            entry.first_token_at = at
            self._next_token(entry, instance_id, at)

    def _next_token(self, entry: OpenRequest, instance_id: InstanceId, at: Instant) -> None:
        """Tell the router that the next token of an attempt has come. One that was dispatched for its prefill rests
        first, so that the router can send it on as it is."""
        if not entry.rests_next:
            self.loop.deliver(CLUSTER, FirstTokenSeen(entry.request.id, instance_id))
            return
        entry.rests_next = False
        entry.stopped_at = at
        self._resting.append(entry)
        self._instances[instance_id].tell(StopAsked(entry.request.id))

    def on_finished(
        self, instance_id: InstanceId, at: Instant, sequence: SequenceState, num_output_tokens: int
    ) -> None:
        request_id = sequence.request.id
        self.loop.deliver(CLUSTER, RequestFinished(request_id, instance_id, num_output_tokens))
        self._end(request_id, "finished", at, "", num_output_tokens, sequence)

    def on_rejected(self, instance_id: InstanceId, request_id: RequestId, at: Instant, reason: str) -> None:
        self.loop.deliver(CLUSTER, RequestFailed(request_id, instance_id, reason, retryable=False))

    def on_answer(self, instance: SimulatedInstance, command: InstanceCommand, now: Instant) -> None:
        self.moves.on_answer(instance, command, now)

    def on_returned(self, instance_id: InstanceId, request_id: RequestId, at: Instant) -> None:
        entry = self._open.get(request_id)
        if entry is None:
            return
        if entry.stopped_at is not None:
            entry.downtime += at - entry.stopped_at
            entry.stopped_at = None
        # For one that was dispatched again this is the first token of the attempt; else it is known that it runs.
        self._next_token(entry, instance_id, at)

    def _on_stopped(self, request_id: RequestId, at: Instant) -> None:
        entry = self._open.get(request_id)
        if entry is not None and entry.stopped_at is None:
            entry.stopped_at = at

    def _on_handed_over(self, request_id: RequestId, sequence: SequenceState, instance_id: InstanceId) -> None:
        entry = self._open[request_id]
        entry.instance_id = instance_id
        entry.num_migrations += 1
        entry.num_cached_tokens += sequence.num_cached_tokens
        entry.num_preemptions += sequence.num_preemptions

    def on_step(self, instance_id: InstanceId, at: Instant) -> None:
        if self._resting:
            resting, self._resting = self._resting, []
            for entry in resting:
                if entry.request.id in self._open:
                    self.loop.deliver(CLUSTER, FirstTokenSeen(entry.request.id, instance_id))
        self.sampler.on_step(instance_id, at, self._instances[instance_id].machine)

    def _end(
        self,
        request_id: RequestId,
        status: Status,
        at: Instant,
        reason: str,
        num_output_tokens: int = 0,
        sequence: SequenceState | None = None,
    ) -> None:
        entry = self._open.pop(request_id)
        self._truth.forget(request_id)
        request = entry.request
        first_token_at = entry.first_token_at
        if first_token_at is not None:
            first_token_at = after(first_token_at, self._options.front_end)
            at = after(at, self._options.front_end)
        self._num_ended += 1
        self._on_record(
            RequestRecord(
                id=request_id,
                tenant=request.tenant,
                priority=request.priority,
                arrived_at=request.arrived_at,
                first_token_at=first_token_at,
                finished_at=at,
                num_prompt_tokens=request.num_prompt_tokens,
                num_output_tokens=num_output_tokens,
                status=status,
                reason=reason,
                instance_id=entry.instance_id,
                slo=request.slo,
                num_cached_tokens=entry.num_cached_tokens + (0 if sequence is None else sequence.num_cached_tokens),
                num_preemptions=entry.num_preemptions + (0 if sequence is None else sequence.num_preemptions),
                num_migrations=entry.num_migrations,
                downtime=Duration(entry.downtime),
            )
        )
        self.moves.request_ended(request_id)
        if self._followers is not None:
            for follower, num_tokens in self._followers(request_id, at):
                self._schedule_arrival(follower, num_tokens, is_open=False)
        if self._on_ended is not None and self._num_ended % 256 == 0:
            self._on_ended(self._num_ended, at)

    # --- instances ---------------------------------------------------------------------------------------------------

    def _set_role(self, order: SetRole) -> None:
        """An instance has its new role; one that is down by now will have it when it is back."""
        spec = msgspec.structs.replace(self._specs[order.instance_id], role=order.role)
        self._specs[spec.id] = spec
        if spec.id in self._instances:
            self._instances[spec.id].spec = spec
            self.loop.deliver(CLUSTER, InstanceStarted(spec))

    def _start_instance(self, spec: InstanceSpec) -> None:
        predictions = self.predictions.at(spec.limits)
        machine = self._build_machine(spec, predictions.services)
        thinking = predictions.take_due if predictions.is_used else None
        journeys, waited = with_swap(self.config.stack, self.loop, machine, spec, self, thinking)
        self._instances[spec.id] = SimulatedInstance(
            self.loop,
            spec,
            machine,
            self._step_times.get(spec.id, self._step_time),
            self._truth,
            self,
            step_overhead=self._options.step_overhead,
            incarnation=self._incarnations[spec.id],
            leap=self._options.leap,
            rank=self._ranks[spec.id],
            journeys=journeys,
            thinking=waited,
            tells_of_sequences=self.cluster.reads_sequences,
        )
        self.loop.deliver(CLUSTER, InstanceStarted(spec))

    def _bring_up(self, instance_id: InstanceId) -> None:
        """One more instance is ready, like the first that the configuration names."""
        spec = msgspec.structs.replace(self.config.instances[0], id=instance_id)
        self._specs[instance_id] = spec
        self._incarnations[instance_id] = 0
        self._ranks[instance_id] = RANK_STEP - 1 - len(self._ranks)
        self.sampler.add(instance_id)
        self._start_instance(spec)
        if self._options.report_interval:
            self._schedule_report(instance_id)

    def _take_down(self, instance_id: InstanceId) -> None:
        """An instance ends for good. Whatever it still has is lost; there should be nothing."""
        instance = self._instances.pop(instance_id, None)
        if instance is None:
            return
        lost = instance.crash()
        self._retired.append(instance.machine)
        for one in lost:
            self._lose(one, instance_id, self.loop.now)
        self.moves.instance_lost(instance)

    def _build_machine(self, spec: InstanceSpec, lengths: LengthServices) -> SimulatedMachine:
        if self._engine == "model":
            return build_instance(self.config.stack, spec, lengths)
        from rota.serving.engines.vllm.hosting import VLLM_CAPABILITIES  # an optional dependency, heavy to import
        from rota.serving.sim.vllm_machine import VllmMachine

        return VllmMachine(spec.limits, engine_policies(self.config.stack, VLLM_CAPABILITIES, "vLLM 0.32", lengths))

    def _schedule_report(self, instance_id: InstanceId) -> None:
        def report(now: Instant) -> None:
            if self._fleet is not None and self._fleet.is_stopped(instance_id):
                return
            instance = self._instances.get(instance_id)
            if instance is not None:
                taken = instance.report()
                delay = self._options.report_delay
                self.loop.call_at(
                    after(now, delay),
                    lambda _: self.loop.deliver(CLUSTER, InstanceReported(taken, delay)),
                    RANK_REPORT,
                    background=True,
                )
            self._schedule_report(instance_id)

        self.loop.call_at(after(self.loop.now, self._options.report_interval), report, RANK_REPORT, background=True)

    # --- faults ------------------------------------------------------------------------------------------------------

    def _schedule_fault(self, fault: Fault) -> None:
        strikes = {"crash": self._crash, "slow": self._slow_down, "client_leaves": self._leave}
        looked_up = MESSAGE_FAULTS + FLEET_FAULTS
        if fault.kind not in strikes and fault.kind not in looked_up:
            kinds = ", ".join(sorted([*strikes, *looked_up]))
            raise ConfigError(f"unknown kind of fault {fault.kind!r}", hint=f"kinds are {kinds}")
        is_known = fault.target in self._specs or fault.kind == "client_leaves" or self._fleet is not None
        if not is_known or (fault.kind in FLEET_FAULTS and fault.target != FLEET):
            raise ConfigError(f"a {fault.kind} fault names the unknown instance {fault.target!r}")
        if fault.kind in looked_up:
            return  # looked up whenever there is something to say
        self.loop.call_at(fault.at, lambda now: strikes[fault.kind](fault, now), RANK_FAULT)

    def _crash(self, fault: Fault, now: Instant) -> None:
        instance_id = InstanceId(fault.target)
        instance = self._instances.pop(instance_id, None)
        if instance is None:
            if self._fleet is not None:
                self._fleet.crash(instance_id)
            return  # it is not there, or down already
        lost = instance.crash()
        self._retired.append(instance.machine)
        self.loop.deliver(CLUSTER, InstanceLost(instance_id, "crashed"))
        for one in lost:
            self._lose(one, instance_id, now)
        self.moves.instance_lost(instance)

        def restart(later: Instant) -> None:
            if self._fleet is not None and self._fleet.is_stopped(instance_id):
                return
            self._incarnations[instance_id] += 1
            self._start_instance(self._specs[instance_id])

        self.loop.call_at(after(now, fault.duration or self._options.restart_after), restart, RANK_FAULT)

    def _lose(self, lost: Lost, instance_id: InstanceId, now: Instant) -> None:
        entry = self._open.get(lost.request_id)
        if entry is None:
            return
        if self._options.resume and lost.num_output_tokens:
            entry.num_cached_tokens += lost.num_cached_tokens
            entry.num_preemptions += lost.num_preemptions
            entry.stopped_at = now if entry.stopped_at is None else entry.stopped_at
        self._fail_attempt(lost.request_id, instance_id, f"instance {instance_id} crashed", lost.num_output_tokens)

    def _fail_attempt(
        self, request_id: RequestId, instance_id: InstanceId, reason: str, num_output_tokens: int = 0
    ) -> None:
        """Tell the router that an attempt failed; where the world lets it resume, with the tokens given so far."""
        if request_id in self._open:
            num_given = num_output_tokens if self._options.resume and num_output_tokens else None
            self.loop.deliver(CLUSTER, RequestFailed(request_id, instance_id, reason, num_output_tokens=num_given))

    def _slow_down(self, fault: Fault, now: Instant) -> None:
        instance = self._instances.get(InstanceId(fault.target))
        if instance is None:
            return
        instance.set_slowdown(fault.magnitude)

        def recover(later: Instant) -> None:
            other = self._faults.active("slow", fault.target, later)
            instance.set_slowdown(1.0 if other is None else other.magnitude)

        self.loop.call_at(after(now, fault.duration), recover, RANK_FAULT)

    def _leave(self, fault: Fault, now: Instant) -> None:
        request_id = RequestId(fault.target)
        if request_id in self._open:
            self.loop.deliver(CLUSTER, ClientLeft(request_id))
            self._end(request_id, "aborted", now, "the client left")
