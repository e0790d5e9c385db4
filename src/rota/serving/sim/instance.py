"""An engine played by the world: it runs the steps that an instance machine orders, for as long as they take."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence, Sized
from heapq import heappop, heappush, heapreplace
from itertools import accumulate
from typing import NamedTuple, Protocol

from rota.base.errors import LawBroken
from rota.base.instant import Duration, Instant
from rota.base.machine import Machine
from rota.runtime.simulation import SimulationLoop
from rota.serving.api import StepTimePredictor
from rota.serving.assemble import instance_name
from rota.serving.instance.composition import GrantedSequence, StepComposition
from rota.serving.instance.machine import InstanceStatistics
from rota.serving.model.commands import InstanceCommand, RejectSequence, RunStep
from rota.serving.model.events import (
    InstanceEvent,
    SequenceAborted,
    SequenceAdopted,
    SequenceArrived,
    SequenceResumed,
    StepFinished,
)
from rota.serving.model.instance import InstanceId, InstanceReport, InstanceSpec, SequenceReport
from rota.serving.model.request import Request, RequestId
from rota.serving.predictors.step_time.runs import SkewPredictor, decode_run
from rota.serving.sim.ground_truth import GroundTruth

RANK_STEP = 0
"""At one instant a step ends before anything arrives, so that leaping over steps and taking them one by one agree."""
RANK_ARRIVAL = 1
RANK_TAKE_OFF = 999
"""After everything else of an instant but deadlines."""

STRIDE_MIN, STRIDE_MAX = 16, 4096
"""Steps to time at once: few after a run that was cut short, more after each that was not."""


class SequenceState(GrantedSequence, Protocol):
    """What the world reads of a sequence."""

    @property
    def state(self) -> str: ...
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
    @property
    def composition(self) -> StepComposition:
        """What the step in flight holds."""
        ...

    def sequence(self, request_id: RequestId) -> SequenceState | None: ...
    def reported(self) -> tuple[tuple[SequenceReport, ...], tuple[SequenceReport, ...]]:
        """Those who run and the first of those who wait, as a report tells of them."""
        ...

    def num_repeats(self) -> int: ...
    def leap(self, num_steps: int, now: Instant) -> RunStep: ...
    def statistics(self) -> InstanceStatistics: ...


class Listener(Protocol):
    """Who hears what an instance gives to its clients."""

    def on_first_token(self, instance_id: InstanceId, request_id: RequestId, at: Instant) -> None: ...
    def on_finished(
        self, instance_id: InstanceId, at: Instant, sequence: "SequenceState", num_output_tokens: int
    ) -> None:
        """The sequence gives its last token; its own counts do not include this step yet."""
        ...

    def on_rejected(self, instance_id: InstanceId, request_id: RequestId, at: Instant, reason: str) -> None: ...
    def on_step(self, instance_id: InstanceId, at: Instant) -> None: ...


class Journeys(Protocol):
    """Who hears of the requests that move."""

    def on_answer(self, instance: "SimulatedInstance", command: InstanceCommand, now: Instant) -> None: ...
    def on_returned(self, instance_id: InstanceId, request_id: RequestId, at: Instant) -> None:
        """A request that came with tokens of its own, or had rested, gives its next one."""
        ...


class Lost(NamedTuple):
    """A request that was at an instance when it died."""

    request_id: RequestId
    num_output_tokens: int
    num_cached_tokens: int
    num_preemptions: int


class _Flight:
    """A step under way, or a run of equal ones."""

    __slots__ = ("command", "ends", "first_tokens", "handle", "num_ended", "returned", "started_at")

    def __init__(
        self,
        command: RunStep,
        started_at: Instant,
        ends: Sequence[int],
        first_tokens: list[RequestId],
        returned: list[RequestId],
    ) -> None:
        self.command = command
        """The step that the machine thinks is in flight."""
        self.started_at = started_at
        self.ends = ends
        """End of each step, in nanoseconds since the start of the first."""
        self.num_ended = 0
        """How many of them the machine has been told of."""
        self.first_tokens = first_tokens
        self.returned = returned
        self.handle = -1


class SimulatedInstance:
    """One engine in the simulation.

    Between two moments when anything can change, a batch of decodes repeats itself; such a run of steps is timed at
    once (the *leap*) and cut short when something arrives in between: the machine is told how many have run by then,
    and the step under way becomes the last. The machine decides the same as if every step had been taken one by one,
    and where rows are recorded, they are the same rows."""

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
        rank: int = RANK_STEP,
        leap: bool = True,
        journeys: Journeys | None = None,
        thinking: Callable[[], Duration] | None = None,
        tells_of_sequences: bool = False,
    ) -> None:
        """`step_overhead` is the time between two steps in which the engine computes nothing. `incarnation` is how
        often this instance was started before: a restarted engine is a fresh machine with a name of its own. `rank`, at
        most `RANK_STEP`, orders instances whose steps end at one instant. `leap` False takes every step by itself.
        `thinking` says what deciding took of the engine's time since it was last asked, which the next step takes
        longer. With `tells_of_sequences` its reports say who runs and who waits, which costs by their number."""
        self.spec = spec
        self.machine = machine
        self.name = instance_name(spec.id, incarnation)
        self._slowdown = 1.0
        self._loop = loop
        self._step_time = step_time
        self._skew_time = step_time.skew_time if isinstance(step_time, SkewPredictor) else None
        self._truth = truth
        self._listener = listener
        self._journeys = journeys
        self._thinking = thinking
        self._tells_of_sequences = tells_of_sequences
        self._returning: set[RequestId] = set()
        """Those whose next token here is to be told of."""
        self._told_at = -1
        """When the machine was last told something; where it is busy, that waits until the end of the instant."""
        self._overhead = step_overhead
        self._beside: int = step_overhead
        """What the step under way, and each repeat of it, takes beyond its own time."""
        self._rank = rank
        self._may_leap = leap
        self._flight: _Flight | None = None
        self._is_lost = False
        self._num_steps = 0
        """Steps that have ended; so the one under way has this number."""
        self._ends: list[tuple[int, int, RequestId]] = []
        """A heap of `(number of the step that gives the last token, tie-break, id)`. An entry may be too early, for a
        sequence that missed a step since: it is put right when it comes up."""
        self._listing: dict[RequestId, int] = {}
        """The tie-break of the entry that counts for each: one that went away and came back has a new one."""
        self._num_listed = 0
        self._stride = STRIDE_MIN
        loop.add_machine(self.name, machine, self.carry_out)

    # --- from the router ---------------------------------------------------------------------------------------------

    def submit(self, request: Request, num_output_tokens: int = 0) -> None:
        """A request arrives at the engine now, with so many tokens that it got elsewhere."""
        if num_output_tokens:
            self._expect(request.id)
        self.tell(SequenceArrived(request, num_output_tokens))

    def adopt(self, request: Request, num_output_tokens: int) -> None:
        """A request comes with its KV, into room that is kept for it."""
        self._expect(request.id)
        self.tell(SequenceAdopted(request, num_output_tokens))

    def resume(self, request_id: RequestId) -> None:
        """A request that rests, or is about to, goes on here."""
        sequence = self.machine.sequence(request_id)
        if sequence is not None and sequence.state == "resting":
            self._returning.add(request_id)
        self.tell(SequenceResumed(request_id))

    def abort(self, request_id: RequestId) -> None:
        """The router takes a request back now."""
        self._returning.discard(request_id)
        self.tell(SequenceAborted(request_id))

    def tell(self, event: InstanceEvent) -> None:
        """Tell the machine of something other than the end of a step."""
        self.catch_up()
        self._told_at = self._loop.now
        self._loop.deliver(self.name, event)

    def _expect(self, request_id: RequestId) -> None:
        """Tell of the next token of a request; when it will give its last is reckoned anew."""
        self._returning.add(request_id)
        self._listing.pop(request_id, None)

    def report(self) -> InstanceReport:
        """What the engine would say of itself now: the state after the last step that has ended."""
        self.catch_up()
        statistics = self.machine.statistics()
        running, waiting = self.machine.reported() if self._tells_of_sequences else ((), ())
        return InstanceReport(
            instance_id=self.spec.id,
            observed_at=self._loop.now,
            num_running=statistics.num_running,
            num_waiting=statistics.num_waiting,
            num_free_blocks=statistics.num_free_blocks,
            num_blocks=self.spec.limits.num_blocks,
            num_preemptions=statistics.num_preemptions,
            running=running,
            waiting=waiting,
        )

    def set_slowdown(self, factor: float) -> None:
        """Multiply the time of every step that starts from now on."""
        self.catch_up()
        self._slowdown = factor

    def crash(self) -> list[Lost]:
        """The engine dies: its step never ends and its requests are lost. Returns them, oldest first."""
        self.catch_up()
        self._is_lost = True
        if self._flight is not None:
            self._loop.cancel(self._flight.handle)
            self._flight = None
        lost = []
        for request_id in self.machine.unfinished():
            sequence = self.machine.sequence(RequestId(request_id))
            assert sequence is not None
            num_output_tokens = sequence.num_tokens - sequence.num_prompt_tokens
            lost.append(Lost(sequence.id, num_output_tokens, sequence.num_cached_tokens, sequence.num_preemptions))
        for one in lost:
            self._loop.deliver(self.name, SequenceAborted(one.request_id))
        return lost

    # --- from the machine --------------------------------------------------------------------------------------------

    def carry_out(self, name: str, command: InstanceCommand, now: Instant) -> None:
        """Do what the machine ordered."""
        if self._is_lost:
            return
        if isinstance(command, RunStep):
            self._start(command, now)
        elif isinstance(command, RejectSequence):
            self._returning.discard(command.request_id)
            self._listener.on_rejected(self.spec.id, command.request_id, now, command.reason)
        elif self._journeys is not None:
            self._journeys.on_answer(self, command, now)

    def catch_up(self) -> None:
        """Tell the machine of the steps of a run that have ended by now, and let the one under way be the last."""
        flight = self._flight
        if flight is None or len(flight.ends) == 1:
            return
        num_ended = bisect_right(flight.ends, self._loop.now - flight.started_at)
        if num_ended == len(flight.ends):
            return  # its end is due at this very instant, ahead of whatever came
        self._loop.cancel(flight.handle)
        self._leap(flight, num_ended)
        self._stride = max(STRIDE_MIN, 2 * num_ended)
        flight.ends = flight.ends[: num_ended + 1]
        flight.handle = self._land_at(flight)

    def _leap(self, flight: _Flight, num_ended: int) -> None:
        """Tell the machine that so many steps of the flight have ended, those included that it knows of."""
        num_new = num_ended - flight.num_ended
        if num_new == 0:
            return
        self._num_steps += num_new
        if not self._loop.is_recording:
            at = Instant(flight.started_at + flight.ends[num_ended - 1])
            flight.command = self.machine.leap(num_new, at)
        else:
            for end in flight.ends[flight.num_ended : num_ended]:
                at = Instant(flight.started_at + end)
                step = self.machine.leap(1, at)
                self._loop.recount(self.name, at, StepFinished(flight.command.step_id), (step,))
                flight.command = step
        flight.num_ended = num_ended

    def _start(self, command: RunStep, now: Instant) -> None:
        step = self.machine.composition
        first_tokens = self._list_ends(step.caught_up) if step.caught_up else []
        returned = self._list_returned(step.caught_up) if self._returning else []
        prefills, num_decodes, num_context_tokens = step.prefills, step.num_decodes, step.num_context_tokens
        self._beside = self._overhead + (self._skew(command) if self._skew_time is not None else 0)
        thought = 0 if self._thinking is None else self._thinking()
        ends: Sequence[int] = (self._time(prefills, num_decodes, num_context_tokens) + self._beside + thought,)
        flight = _Flight(command, now, ends, first_tokens, returned)
        self._flight = flight
        if self._may_leap and not thought and not step.caught_up and not prefills and self.machine.num_repeats():
            if self._loop.is_recording or self._told_at == now:
                # Rows are written in the order of time, and of what the machine is yet to be told at this instant it
                # must hear before it leaps: look how far nothing else happens, once this instant is over.
                self._loop.call_at(now, lambda _: self._prolong(flight), rank=RANK_TAKE_OFF)
            else:
                flight.ends = self._run_ends(self._num_steps_alike())
        flight.handle = self._land_at(flight)

    def _prolong(self, flight: _Flight) -> None:
        """Make a step a run of steps, as far as nothing else is going to happen."""
        if self._flight is not flight or not self.machine.num_repeats():
            return
        self._loop.cancel(flight.handle)
        next_at = self._loop.peek_time()
        ends = self._run_ends(self._num_steps_alike())
        if next_at is not None:
            ends = ends[: max(1, bisect_left(ends, next_at - flight.started_at))]
        flight.ends = ends
        flight.handle = self._land_at(flight)

    def _land_at(self, flight: _Flight) -> int:
        return self._loop.call_at(Instant(flight.started_at + flight.ends[-1]), self._land, rank=self._rank)

    def _num_steps_alike(self) -> int:
        """How many steps to time at once: the machine would repeat them, nobody ends before the last, and no more than
        may be of use, since timing what will be cut off is wasted."""
        due = self._next_end()
        num_steps = min(self.machine.num_repeats() + 1, self._stride)
        return num_steps if due is None else min(num_steps, due - self._num_steps + 1)

    def _list_ends(self, sequences: Sequence[GrantedSequence]) -> list[RequestId]:
        """Note when sequences that give a token with the step under way will give their last. Returns whose first it
        is."""
        first_tokens = []
        for sequence in sequences:
            request_id = sequence.id
            num_given = sequence.num_computed_tokens - sequence.num_prompt_tokens
            if num_given == 0:
                first_tokens.append(request_id)
            if request_id not in self._listing:
                num_owed = self._truth.num_output_tokens(sequence.request, self.spec.limits)
                self._num_listed += 1
                self._listing[request_id] = self._num_listed
                heappush(self._ends, (self._num_steps + num_owed - num_given - 1, self._num_listed, request_id))
        return first_tokens

    def _list_returned(self, sequences: Sequence[GrantedSequence]) -> list[RequestId]:
        """Whose token with the step under way is to be told of."""
        returned = [sequence.id for sequence in sequences if sequence.id in self._returning]
        self._returning.difference_update(returned)
        return returned

    def _next_end(self) -> int | None:
        """The number of the step that next gives somebody's last token; None if nobody gives tokens."""
        ends = self._ends
        while ends:
            due, number, request_id = ends[0]
            if self._listing.get(request_id) != number:
                heappop(ends)
                continue
            sequence = self.machine.sequence(request_id)
            if sequence is None or sequence.num_computed_tokens != sequence.num_tokens:
                # It is gone, or will be listed again when it has caught up.
                heappop(ends)
                del self._listing[request_id]
                continue
            num_given = sequence.num_computed_tokens - sequence.num_prompt_tokens
            num_owed = self._truth.num_output_tokens(sequence.request, self.spec.limits)
            true = self._num_steps + num_owed - num_given - 1
            if true == due:
                return due
            heapreplace(ends, (true, number, request_id))
        return None

    def _ending(self, command: RunStep) -> list[SequenceState]:
        """Those whose last token the step under way gives, in batch order."""
        ending = []
        while self._next_end() == self._num_steps:
            _, _, request_id = heappop(self._ends)
            del self._listing[request_id]
            sequence = self.machine.sequence(request_id)
            if sequence is not None:
                ending.append(sequence)
        if len(ending) > 1:
            places = _places(command)
            ending.sort(key=lambda sequence: places[sequence.request.id])
        return ending

    def _skew(self, command: RunStep) -> int:
        """What the step takes because its decodes are of unlike length."""
        step = self.machine.composition
        longest = 0
        for request_id, num_tokens in command.grants:
            sequence = self.machine.sequence(request_id)
            if num_tokens == 1 and sequence is not None and sequence.num_computed_tokens > longest:
                longest = sequence.num_computed_tokens
        num_prefill_tokens = sum([new_tokens for new_tokens, _ in step.prefills])
        assert self._skew_time is not None
        return self._skew_time(num_prefill_tokens, step.num_decodes, step.num_context_tokens, longest)

    def _time(self, prefills: Sequence[tuple[int, int]], num_decodes: int, num_context_tokens: int) -> int:
        time = self._step_time.step_time(
            prefills=prefills, num_decodes=num_decodes, decode_kv_tokens=num_context_tokens
        )
        return time if self._slowdown == 1.0 else round(time * self._slowdown)

    def _run_ends(self, num_steps: int) -> Sequence[int]:
        step = self.machine.composition
        times = decode_run(self._step_time, step.num_decodes, step.num_context_tokens, num_steps)
        slowdown, overhead = self._slowdown, self._beside
        if slowdown != 1.0:
            times = [round(time * slowdown) for time in times]
        return list(accumulate([time + overhead for time in times] if overhead else times))

    def _land(self, now: Instant) -> None:
        flight = self._flight
        if flight is None:
            raise LawBroken(f"law 6: {self.name} was woken up without a step in flight")
        self._leap(flight, len(flight.ends) - 1)
        self._stride = min(STRIDE_MAX, 4 * len(flight.ends)) if len(flight.ends) > 1 else self._stride
        self._flight = None
        machine = self.machine
        for told in (flight.first_tokens, flight.returned):
            if len(told) > 1:
                # Told in batch order, however the step was planned.
                told.sort(key=_places(flight.command).__getitem__)
        # Those aborted in flight give nothing to anybody.
        for request_id in flight.first_tokens:
            if machine.sequence(request_id) is not None:
                self._listener.on_first_token(self.spec.id, request_id, now)
        for request_id in flight.returned:
            if self._journeys is not None and machine.sequence(request_id) is not None:
                self._journeys.on_returned(self.spec.id, request_id, now)
        ended = self._ending(flight.command)
        for sequence in ended:
            num_output_tokens = sequence.num_tokens - sequence.num_prompt_tokens + 1
            self._listener.on_finished(self.spec.id, now, sequence, num_output_tokens)
        self._num_steps += 1
        finished = tuple([sequence.request.id for sequence in ended])
        self._loop.deliver(self.name, StepFinished(flight.command.step_id, finished))
        self._listener.on_step(self.spec.id, now)


def _places(step: RunStep) -> dict[RequestId, int]:
    """Where each sequence stands in the batch."""
    return {request_id: place for place, (request_id, _) in enumerate(step.grants)}
