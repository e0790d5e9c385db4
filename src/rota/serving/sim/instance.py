"""An engine played by the world: it runs the steps that an instance machine orders, for as long as they take."""

from bisect import bisect_right
from collections.abc import Sequence, Sized
from itertools import accumulate
from typing import Protocol

from rota.base.errors import LawBroken
from rota.base.instant import Duration, Instant
from rota.base.machine import Machine
from rota.runtime.simulation import SimulationLoop
from rota.serving.api import StepTimePredictor
from rota.serving.assemble import instance_name
from rota.serving.instance.machine import InstanceStatistics
from rota.serving.model.commands import InstanceCommand, RejectSequence, RunStep
from rota.serving.model.events import InstanceEvent, SequenceAborted, SequenceArrived, StepFinished
from rota.serving.model.instance import InstanceId, InstanceReport, InstanceSpec
from rota.serving.model.request import Request, RequestId
from rota.serving.predictors.step_time.runs import SkewPredictor, decode_run
from rota.serving.sim.ground_truth import GroundTruth

RANK_STEP = 0
"""At one instant a step ends before anything arrives, so that leaping over steps and taking them one by one agree."""
RANK_ARRIVAL = 1


class SequenceState(Protocol):
    """What the world reads of a sequence."""

    @property
    def request(self) -> Request: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_computed_tokens(self) -> int: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def num_preemptions(self) -> int: ...


class SimulatedMachine(Machine[InstanceEvent, InstanceCommand], Protocol):
    """A machine that an engine played by the world can run: ours, or vLLM's scheduler in a machine's clothes."""

    @property
    def running(self) -> Sized: ...
    @property
    def waiting(self) -> Sized: ...
    @property
    def num_free_blocks(self) -> int: ...
    def sequence(self, request_id: RequestId) -> SequenceState | None: ...
    def statistics(self) -> InstanceStatistics: ...


class Listener(Protocol):
    """Who hears what an instance gives to its clients."""

    def on_first_token(self, instance_id: InstanceId, request_id: RequestId, at: Instant) -> None: ...
    def on_finished(
        self, instance_id: InstanceId, at: Instant, sequence: "SequenceState", num_output_tokens: int
    ) -> None:
        """The sequence gives its last token; its own counts do not include this run of steps yet."""
        ...

    def on_rejected(self, instance_id: InstanceId, request_id: RequestId, at: Instant, reason: str) -> None: ...
    def on_step(self, instance_id: InstanceId, at: Instant) -> None: ...


class _Flight:
    """A step under way, or a run of equal ones."""

    __slots__ = ("command", "ends", "first_tokens", "handle", "last_tokens", "started_at")

    def __init__(
        self,
        command: RunStep,
        started_at: Instant,
        ends: Sequence[int],
        first_tokens: list[RequestId],
        last_tokens: list[RequestId],
        handle: int,
    ) -> None:
        self.command = command
        self.started_at = started_at
        self.ends = ends
        """End of each step, in nanoseconds since the start of the first."""
        self.first_tokens = first_tokens
        self.last_tokens = last_tokens
        """Who ends with the last step of the run."""
        self.handle = handle


class SimulatedInstance:
    """One engine in the simulation.

    Between two moments when anything can change, a batch of decodes repeats itself; such a run of steps is timed at
    once (the *leap*) and cut short when something arrives in between: what has run by then is reported, and the step
    under way becomes the last. The machine hears and decides the same as if every step had been taken one by one."""

    def __init__(
        self,
        loop: SimulationLoop,
        spec: InstanceSpec,
        machine: SimulatedMachine,
        step_time: StepTimePredictor,
        truth: GroundTruth,
        listener: Listener,
        *,
        step_overhead: Duration = Duration(0),
        incarnation: int = 0,
    ) -> None:
        """`step_overhead` is the time between two steps in which the engine computes nothing. `incarnation` is how
        often this instance was started before: a restarted engine is a fresh machine with a name of its own."""
        self.spec = spec
        self.machine = machine
        self.name = instance_name(spec.id, incarnation)
        self._slowdown = 1.0
        self._loop = loop
        self._step_time = step_time
        self._skew_time = step_time.skew_time if isinstance(step_time, SkewPredictor) else None
        self._truth = truth
        self._listener = listener
        self._overhead = step_overhead
        self._flight: _Flight | None = None
        self._resume_at: Instant | None = None
        """When the step under way began, for a run that was cut short: its next command is for that step alone."""
        self._is_lost = False
        loop.add_machine(self.name, machine, self.carry_out)

    # --- from the router ---------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """A request arrives at the engine now."""
        self.catch_up()
        self._loop.deliver(self.name, SequenceArrived(request))

    def abort(self, request_id: RequestId) -> None:
        """The router takes a request back now."""
        self.catch_up()
        self._loop.deliver(self.name, SequenceAborted(request_id))

    def report(self) -> InstanceReport:
        """What the engine would say of itself now: the state after the last step that has ended."""
        self.catch_up()
        statistics = self.machine.statistics()
        return InstanceReport(
            instance_id=self.spec.id,
            observed_at=self._loop.now,
            num_running=statistics.num_running,
            num_waiting=statistics.num_waiting,
            num_free_blocks=statistics.num_free_blocks,
            num_blocks=self.spec.limits.num_blocks,
            num_preemptions=statistics.num_preemptions,
        )

    def set_slowdown(self, factor: float) -> None:
        """Multiply the time of every step that starts from now on."""
        self.catch_up()
        self._slowdown = factor

    def crash(self) -> list[RequestId]:
        """The engine dies: its step never ends and its requests are lost. Returns their ids, oldest first."""
        self.catch_up()
        self._is_lost = True
        if self._flight is not None:
            self._loop.cancel(self._flight.handle)
            self._flight = None
        lost = [RequestId(request_id) for request_id in self.machine.unfinished()]
        for request_id in lost:
            self._loop.deliver(self.name, SequenceAborted(request_id))
        return lost

    # --- from the machine --------------------------------------------------------------------------------------------

    def carry_out(self, name: str, command: InstanceCommand, now: Instant) -> None:
        """Do what the machine ordered."""
        if self._is_lost:
            return
        if isinstance(command, RunStep):
            self._start(command, now)
        elif isinstance(command, RejectSequence):
            self._listener.on_rejected(self.spec.id, command.request_id, now, command.reason)

    def catch_up(self) -> None:
        """Report the steps of a run that have ended by now, and let the one under way be the last."""
        flight = self._flight
        if flight is None or len(flight.ends) == 1:
            return
        num_ended = bisect_right(flight.ends, self._loop.now - flight.started_at)
        if num_ended == len(flight.ends):
            return  # its end is due at this very instant, ahead of whatever came
        self._loop.cancel(flight.handle)
        if num_ended == 0:
            self._fly(flight.command, flight.started_at, flight.ends[:1], flight.first_tokens, [])
            return
        self._flight = None
        self._resume_at = Instant(flight.started_at + flight.ends[num_ended - 1])
        self._loop.deliver(self.name, StepFinished(flight.command.step_id, num_ended))

    def _start(self, command: RunStep, now: Instant) -> None:
        machine = self.machine
        limits = self.spec.limits
        truth = self._truth
        prefills: list[tuple[int, int]] = []
        num_decodes = 0
        kv_tokens = 0
        longest = 0
        first_tokens: list[RequestId] = []
        lefts: list[tuple[int, RequestId]] = []
        shortest = command.max_repeats
        for request_id, num_tokens in command.grants:
            sequence = machine.sequence(request_id)
            if sequence is None:
                raise LawBroken(f"law 1: step {command.step_id} grants tokens to {request_id}, which is not here")
            computed = sequence.num_computed_tokens
            if num_tokens == 1:
                num_decodes += 1
                kv_tokens += computed
                if computed > longest:
                    longest = computed
            else:
                prefills.append((num_tokens, computed - num_tokens))
            if computed == sequence.num_tokens:
                produced = computed - sequence.num_prompt_tokens
                left = truth.num_output_tokens(sequence.request, limits) - produced
                if left <= shortest:
                    shortest = left
                    lefts.append((left, request_id))
                if produced == 0:
                    first_tokens.append(request_id)
        started_at = now
        if self._resume_at is not None:
            started_at, self._resume_at, shortest = self._resume_at, None, min(shortest, 1)
        overhead: int = self._overhead
        if self._skew_time is not None:
            num_prefill_tokens = sum([new_tokens for new_tokens, _ in prefills])
            overhead += self._skew_time(num_prefill_tokens, num_decodes, kv_tokens, longest)
        num_steps = 1 if first_tokens else self._horizon(shortest, num_decodes, kv_tokens, now)
        if num_steps == 1:
            ends: Sequence[int] = (self._time(prefills, num_decodes, kv_tokens) + overhead,)
        else:
            ends = self._run_ends(num_decodes, kv_tokens, num_steps, overhead)
        last_tokens = [request_id for left, request_id in lefts if left == num_steps]
        self._fly(command, started_at, ends, first_tokens, last_tokens)

    def _horizon(self, num_steps: int, num_decodes: int, kv_tokens: int, now: Instant) -> int:
        """How many steps to time at once: no more than may run before the next thing on the loop's list happens, since
        timing what will be cut off is wasted. One step over is right, for the one under way when it happens."""
        next_at = self._loop.peek_time()
        if num_steps == 1 or next_at is None:
            return num_steps
        step = self._time((), num_decodes, kv_tokens) + self._overhead
        return min(num_steps, (next_at - now) // step + 2)

    def _time(self, prefills: Sequence[tuple[int, int]], num_decodes: int, kv_tokens: int) -> int:
        time = self._step_time.step_time(prefills=prefills, num_decodes=num_decodes, decode_kv_tokens=kv_tokens)
        return time if self._slowdown == 1.0 else round(time * self._slowdown)

    def _run_ends(self, num_decodes: int, kv_tokens: int, num_steps: int, overhead: int) -> Sequence[int]:
        times = decode_run(self._step_time, num_decodes, kv_tokens, num_steps)
        slowdown = self._slowdown
        if slowdown != 1.0:
            times = [round(time * slowdown) for time in times]
        return list(accumulate(time + overhead for time in times)) if overhead else list(accumulate(times))

    def _fly(
        self,
        command: RunStep,
        started_at: Instant,
        ends: Sequence[int],
        first_tokens: list[RequestId],
        last_tokens: list[RequestId],
    ) -> None:
        handle = self._loop.call_at(Instant(started_at + ends[-1]), self._land, rank=RANK_STEP)
        self._flight = _Flight(command, started_at, ends, first_tokens, last_tokens, handle)

    def _land(self, now: Instant) -> None:
        flight = self._flight
        if flight is None:
            raise LawBroken(f"law 6: {self.name} was woken up without a step in flight")
        self._flight = None
        machine = self.machine
        # Those aborted in flight give nothing to anybody.
        ended = [
            sequence for request_id in flight.last_tokens if (sequence := machine.sequence(request_id)) is not None
        ]
        for request_id in flight.first_tokens:
            if machine.sequence(request_id) is not None:
                self._listener.on_first_token(self.spec.id, request_id, now)
        for sequence in ended:
            num_output_tokens = sequence.num_tokens - sequence.num_prompt_tokens + len(flight.ends)
            self._listener.on_finished(self.spec.id, now, sequence, num_output_tokens)
        finished = tuple([sequence.request.id for sequence in ended])
        self._loop.deliver(self.name, StepFinished(flight.command.step_id, len(flight.ends), finished))
        self._listener.on_step(self.spec.id, now)
