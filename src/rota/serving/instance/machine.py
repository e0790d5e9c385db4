"""One engine's next step: sequences whose computed tokens catch up with their total."""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import islice

from rota.base.errors import LawBroken, PolicyError, StarvationError
from rota.base.instant import Instant
from rota.serving.api import BatchPolicy, MemoryPolicy, OrderPolicy, Refusal, SequenceView
from rota.serving.instance.composition import StepComposition
from rota.serving.instance.decodes import DecodeGroup
from rota.serving.instance.draft import StepDraft
from rota.serving.instance.host_memory import HostMemory
from rota.serving.instance.ledger import BlockLedger
from rota.serving.instance.moving import Moving, MovingEvent, in_order_of_admission
from rota.serving.instance.sequence import Sequence, own
from rota.serving.instance.steady import SteadyPass
from rota.serving.model.commands import (
    EVERYBODY,
    REASONS_MAX,
    Grant,
    InstanceCommand,
    Reason,
    RejectSequence,
    RunStep,
    SwapIn,
    SwapOut,
)
from rota.serving.model.events import InstanceEvent, SequenceAborted, SequenceArrived, StepFinished
from rota.serving.model.instance import WAITING_REPORTED_MAX, InstanceLimits, SequenceReport
from rota.serving.model.request import Request, RequestId
from rota.serving.waiting import WaitingQueue

REPLANS_MAX = 64
"""Passes in a row that may preempt without granting anything before the machine calls it starvation."""


@dataclass(frozen=True, slots=True)
class InstanceStatistics:
    """What an instance has done so far. Frozen; for reports and tests."""

    num_steps: int
    num_running: int
    num_waiting: int
    num_preemptions: int
    num_free_blocks: int
    num_cached_tokens: int
    """Prompt tokens found in the prefix cache at first admission."""
    num_prompt_tokens: int
    """Prompt tokens of the sequences admitted so far."""


class InstanceMachine:
    """Decides each next step of one engine by asking its policies, and keeps the laws whatever they answer.

    At most one step is in flight. A step is planned when something arrives at an idle machine and whenever a step has
    finished with work left. The machine is also the `EngineView` that its policies read.

    There are two ways to the same plan. Whoever only decodes is in a group that advances by arithmetic, and while
    everybody who runs gets what it needs, a step costs what changes in it (`steady.py`). Where room or budget lacks, or
    for policies that must see every step, the batch policy composes the step sequence by sequence.

    What is set aside for sequences that come and go (`moving.py`) may leave room for nobody. Then no step is ordered,
    and the word that ends such a move brings the next one.
    """

    def __init__(
        self,
        limits: InstanceLimits,
        *,
        order: OrderPolicy,
        batch: BatchPolicy,
        memory: MemoryPolicy,
        steady: bool = True,
        host: HostMemory | None = None,
    ) -> None:
        """With `host`, whoever is preempted is swapped to it, and comes back from there by `SwapIn`. `steady` False
        composes every step sequence by sequence: for tests, which hold the two ways against each other."""
        self.limits = limits
        self.now = Instant(0)
        self.running: list[Sequence] = []
        self.waiting: WaitingQueue[Sequence] = WaitingQueue()
        self._order = order
        self._batch = batch
        self._memory = memory
        self._on_end: Callable[[Request, int | None], None] | None = getattr(order, "request_ended", None)
        self._ledger = BlockLedger(
            limits.num_blocks, limits.block_size, enable_prefix_caching=limits.enable_prefix_caching
        )
        self.max_model_len = min(limits.max_model_len, limits.num_blocks * limits.block_size)
        """Tokens that a sequence can have here, prompt and output."""
        self._sequences: dict[RequestId, Sequence] = {}
        self._in_flight: RunStep | None = None
        self._group = DecodeGroup(limits.block_size)
        self.apart: list[Sequence] = []
        """Running sequences that are not in the group, in order of admission."""
        self.composition = StepComposition()
        """What the step in flight holds in sum, for the world that must time it."""
        self._steady = SteadyPass.of(self, self._ledger, self._group, order, batch) if steady and not host else None
        self.moving = Moving(self, self._ledger)
        self._unsaid: tuple[tuple[RequestId, ...], tuple[Reason, ...]] = ((), ())
        """Who was preempted, and why, since the last command, in passes that ordered no step."""
        self.host = host
        self._swaps: list[InstanceCommand] = []
        """What is to be copied, since the last command."""
        self._step_id = 0
        self._admissions = 0
        self._num_steps = 0
        self._num_preemptions = 0
        self._num_cached_tokens = 0
        self._num_prompt_tokens = 0

    # --- the EngineView ----------------------------------------------------------------------------------------------

    @property
    def num_free_blocks(self) -> int:
        return self._ledger.num_available

    def num_blocks_freed(self, leaving: SequenceOf[SequenceView]) -> int:
        return self._ledger.num_freed_by([own(sequence) for sequence in leaving])

    def num_cached_tokens(self, sequence: SequenceView) -> int:
        mine = own(sequence)
        return self._ledger.num_cached_blocks(mine, mine.num_tokens) * self.limits.block_size

    # --- the Machine -------------------------------------------------------------------------------------------------

    def handle(self, event: InstanceEvent, now: Instant) -> SequenceOf[InstanceCommand]:
        """Take one fact; returns what is to be said of it, and the next step to run if there is one."""
        if now < self.now:
            raise LawBroken(f"law 5: an instance was told of {now} after {self.now}")
        self.now = now
        if isinstance(event, StepFinished):
            self._finish_step(event)
            if not self.moving.stopping:
                return self._plan()
            return [*self.moving.step_ended(), *self._plan()]
        if isinstance(event, SequenceArrived):
            reason = self._why_never(event)
            if reason is not None:
                return [RejectSequence(event.request.id, reason)]
            self._arrive(event)
            return self._plan() if self._in_flight is None else ()
        if isinstance(event, SequenceAborted):
            answers = self._abort(event.request_id)
            return answers if self._in_flight is not None else [*answers, *self._plan()]
        if isinstance(event, MovingEvent):
            self._unsettle()
            answers = self.moving.handle(event)
            return answers if self._in_flight is not None else [*answers, *self._plan()]
        raise LawBroken(f"an instance cannot handle {type(event).__name__}")

    def next_deadline(self) -> Instant | None:
        """None: an instance waits for its step, which the world owes it."""
        return None

    def expire(self, now: Instant) -> SequenceOf[InstanceCommand]:
        return ()

    def unfinished(self) -> SequenceOf[str]:
        return list(self._sequences)

    def check(self) -> None:
        """Audit the blocks and the queues (laws 1, 3 and 4)."""
        moving = self.moving
        if self.host is not None:
            self.host.check(set(self._sequences))
        self._ledger.audit([*self._sequences.values(), *moving.rooms.values()])
        if len(self.running) + len(self.waiting) + len(moving.resting) != len(self._sequences):
            raise LawBroken(
                f"law 1: {len(self.running)} running + {len(self.waiting)} waiting + {len(moving.resting)} resting is "
                f"not {len(self._sequences)} known"
            )
        if len(self.running) + moving.num_slots > self.limits.max_num_seqs:
            raise LawBroken(
                f"law 4: {len(self.running)} sequences run and {moving.num_slots} slots are set aside, "
                f"{self.limits.max_num_seqs} may"
            )
        for sequence in [*self.running, *moving.resting.values()]:
            if sequence.num_blocks != -(-sequence.num_computed_tokens // self.limits.block_size):
                raise LawBroken(f"law 3: {sequence!r} has more tokens than slots, or blocks that it does not need")

    def statistics(self) -> InstanceStatistics:
        return InstanceStatistics(
            num_steps=self._num_steps,
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_preemptions=self._num_preemptions,
            num_free_blocks=self._ledger.num_available,
            num_cached_tokens=self._num_cached_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
        )

    def reported(self) -> tuple[tuple[SequenceReport, ...], tuple[SequenceReport, ...]]:
        """Those who run, and the first `WAITING_REPORTED_MAX` of those who wait, as a report tells of them."""
        return (
            tuple([_report(sequence) for sequence in self.running]),
            tuple([_report(sequence) for sequence in islice(self.waiting, WAITING_REPORTED_MAX)]),
        )

    def sequence(self, request_id: RequestId) -> Sequence | None:
        """A sequence that has not ended, for the world's bookkeeping and for tests; read only."""
        return self._sequences.get(request_id)

    @property
    def is_in_step(self) -> bool:
        """Whether a step is in flight."""
        return self._in_flight is not None

    # --- inside ------------------------------------------------------------------------------------------------------

    def _why_never(self, event: SequenceArrived) -> str | None:
        request = event.request
        num_tokens = request.num_prompt_tokens + event.num_output_tokens
        if request.id in self._sequences:
            return f"a request with id {request.id} is here already"
        if request.num_prompt_tokens < 1 or request.max_tokens < 1:
            return "a request needs at least one prompt token and one output token"
        if request.num_prompt_tokens >= self.max_model_len:
            return (
                f"the prompt has {request.num_prompt_tokens} tokens, and this instance takes "
                f"{self.max_model_len - 1} at most"
            )
        if num_tokens >= self.max_model_len:
            return f"it has {num_tokens} tokens already, and this instance takes {self.max_model_len - 1} at most"
        return None

    def _arrive(self, event: SequenceArrived) -> None:
        sequence = Sequence(event.request, self.limits.block_size)
        if event.num_output_tokens:
            sequence.num_tokens += event.num_output_tokens
            sequence.move("replayed")
        self._sequences[sequence.id] = sequence
        self.waiting.append(sequence)
        self._unsettle()

    def _abort(self, request_id: RequestId) -> list[InstanceCommand]:
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return []
        self._unsettle()
        if self.host is not None:
            self.host.forget(request_id)
        if sequence.state == "running":
            self._stop(sequence)
        elif sequence.state != "resting":
            self.waiting.remove(sequence)
        answers = self.moving.aborted(sequence)
        sequence.move("aborted")
        if self._on_end is not None:
            self._on_end(sequence.request, None)
        return answers

    def _finish_step(self, event: StepFinished) -> None:
        step = self._in_flight
        if step is None or event.step_id != step.step_id:
            raise LawBroken(f"step {event.step_id} finished, but {step.step_id if step else 'none'} is in flight")
        self._in_flight = None
        self._num_steps += 1
        group = self._group
        group.finish()
        if self.apart:
            self._gather()
        sequences = self._sequences
        for request_id in event.finished:
            sequence = sequences.get(request_id)
            if sequence is None:
                continue
            if sequence.state != "running" or sequence.num_computed_tokens + 1 != sequence.num_tokens:
                raise LawBroken(f"law 2: {sequence!r} was said to have ended, but has no token to end with")
            self._stop(sequence)
            sequence.move("finished")
            if self.host is not None:
                self.host.forget(sequence.id)
            del sequences[request_id]
            if self._on_end is not None:
                self._on_end(sequence.request, sequence.num_output_tokens)

    def _gather(self) -> None:
        """Give those that caught up in the step that has finished their token, and take them into the group."""
        group = self._group
        left = []
        for sequence in self.apart:
            if sequence.granted:
                sequence.granted = 0
                if sequence.num_computed_tokens == sequence.num_tokens:
                    sequence.num_tokens += 1
                    group.join(sequence)
                    continue
            left.append(sequence)
        self.apart = left

    def take_out(self, sequence: Sequence) -> None:
        """Take a running sequence out of those who run; its blocks stay its own."""
        self.running.remove(sequence)
        if sequence.is_paced:
            self._group.leave(sequence)
        else:
            self.apart.remove(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Have a sequence that was taken out run again, in its old place."""
        in_order_of_admission(self.running, sequence)
        in_order_of_admission(self.apart, sequence)

    def take_in(self, sequence: Sequence) -> None:
        """Have a sequence run that came with its KV, as the last that was admitted."""
        self._sequences[sequence.id] = sequence
        sequence.admitted_seq = self._admissions
        self._admissions += 1
        self.running.append(sequence)
        self.apart.append(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Drop a sequence that is on none of the lists any more."""
        del self._sequences[sequence.id]
        if self._on_end is not None:
            self._on_end(sequence.request, None)

    def _stop(self, sequence: Sequence) -> None:
        """Take a running sequence that has ended out of everything."""
        self.take_out(sequence)
        self._ledger.release(sequence, sequence.num_computed_tokens, will_return=False)

    def step_back(self, sequence: Sequence) -> None:
        """Put a preempted sequence, whose blocks are released, back at the front of the queue."""
        if self.host is not None:
            num_full = sequence.num_computed_tokens // self.limits.block_size
            if num_new := self.host.keep(sequence.id, num_full):
                self._swaps.append(SwapOut(sequence.id, num_new, num_full - num_new))
        self.running.remove(sequence)
        self.apart.remove(sequence)
        sequence.move("preempted")
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self._num_preemptions += 1
        self.waiting.prepend(sequence)

    def _plan(self) -> SequenceOf[InstanceCommand]:
        commands = self._next_step()
        if self._swaps:
            swaps, self._swaps = self._swaps, []
            return [*swaps, *commands]
        return commands

    def _next_step(self) -> SequenceOf[InstanceCommand]:
        if not self.running and not len(self.waiting):
            return ()
        if self._steady is not None and not self._unsaid[0]:
            planned = self._steady.plan()
            if planned is not None:
                return [self._command(*planned)]
        return self._compose()

    def _unsettle(self) -> None:
        """The next step may differ from the one in flight."""
        if self._steady is not None:
            self._steady.is_repeating = False

    def _compose(self) -> SequenceOf[InstanceCommand]:
        """Have the batch policy compose the step."""
        self._unsettle()
        self._group.dissolve()
        self.apart = list(self.running)
        unsaid_preempted, unsaid_reasons = self._unsaid
        self._unsaid = ((), ())
        preempted = [request_id for request_id in unsaid_preempted if request_id in self._sequences]
        reasons = [reason for reason in unsaid_reasons if reason.request_id in self._sequences]
        for _ in range(REPLANS_MAX):
            draft = StepDraft(self, self._ledger, self._memory)
            self._ledger.begin()
            try:
                self._batch.plan(draft, self._order)
            except BaseException as error:
                self.take_back(draft, error)
                raise
            self._ledger.commit()
            for sequence in draft.preempted:
                if sequence.state == "running":
                    self.step_back(sequence)
            self.admit(draft.admitted)
            for sequence, num_copied in draft.swapped_in:
                self._swap_in(sequence, num_copied)
            self._group.plan()
            step = self.composition = StepComposition()
            for sequence in draft.grants:
                sequence.num_computed_tokens += sequence.granted
                step.add(sequence, sequence.granted)
            preempted += [sequence.id for sequence in draft.preempted]
            reasons += draft.reasons
            if draft.grants:
                grants = tuple([Grant(sequence.id, sequence.granted) for sequence in draft.grants])
                return [self._command(grants, reasons, draft.token_budget, tuple(preempted), draft.num_preempted)]
            if not draft.preempted:
                break
        if self.moving.num_slots:
            self._unsaid = (tuple(preempted), tuple(reasons) if preempted else ())
            return ()
        head = next(iter(self.waiting), None) or self.running[0]
        raise StarvationError(
            f"the batch policy granted nothing, though {len(self.running)} sequences run and {len(self.waiting)} wait; "
            f"{head.id} starves",
            hint="a batch policy must serve somebody whenever a sequence has pending tokens and room",
        )

    def take_back(self, draft: StepDraft, error: BaseException) -> None:
        """Undo a draft whose policy failed. Raises `PolicyError` where that is impossible."""
        self._ledger.rollback()
        for sequence in draft.grants:
            sequence.granted = 0
        for sequence in [*draft.admitted, *(sequence for sequence, _ in draft.swapped_in)]:
            sequence.num_computed_tokens = 0
        if any(sequence.state == "preempted" for sequence in draft.preempted):
            raise PolicyError(
                f"the policy failed after sequences had been displaced; this instance cannot go on: {error}"
            ) from error

    def admit(self, admitted: SequenceOf[Sequence]) -> None:
        """Move sequences that were granted their first tokens from the queue to the running ones."""
        for sequence in admitted:
            self.waiting.remove(sequence)
            first = sequence.state == "waiting"
            sequence.move("admitted")
            sequence.admitted_seq = self._admissions
            self._admissions += 1
            self.running.append(sequence)
            self.apart.append(sequence)
            if self.host is not None:
                self.host.came_back(sequence.id)
            if first:
                sequence.num_cached_tokens = sequence.num_computed_tokens
                self._num_cached_tokens += sequence.num_computed_tokens
                self._num_prompt_tokens += sequence.num_prompt_tokens

    def _swap_in(self, sequence: Sequence, num_copied: int) -> None:
        """Have a sequence that has room for its copy wait until it is there."""
        assert self.host is not None
        self.host.came_back(sequence.id)
        self.waiting.remove(sequence)
        sequence.move("admitted")
        sequence.admitted_seq = self._admissions
        self._admissions += 1
        sequence.move("stopped")
        self.moving.resting[sequence.id] = sequence
        self._swaps.append(SwapIn(sequence.id, num_copied))

    def _command(
        self,
        grants: tuple[Grant, ...],
        reasons: list[Reason],
        budget_left: int,
        preempted: tuple[RequestId, ...] = (),
        num_preempted: int = 0,
    ) -> RunStep:
        self._step_id += 1
        if len(self.waiting) and not (budget_left and not num_preempted):
            # The walk over those that wait ended for want of budget, or was never begun.
            why = Refusal.NO_MEMORY if num_preempted else Refusal.NO_BUDGET
            reasons = [*reasons[: REASONS_MAX - 1], Reason(EVERYBODY, "refused", why.value)]
        step = RunStep(self._step_id, grants, preempted, self._ledger.num_available, tuple(reasons[:REASONS_MAX]))
        self._in_flight = step
        return step

    # --- leaping -----------------------------------------------------------------------------------------------------

    def num_repeats(self) -> int:
        """How many more times the step in flight would be ordered if nothing but steps happened and nobody ended: 0
        unless everybody in it decodes, nobody who waits could start, and blocks last."""
        if self._steady is None or self._in_flight is None or not self._steady.is_repeating or self.apart:
            return 0
        return self._group.num_steps_within(self._ledger.num_available)

    def leap(self, num_steps: int, now: Instant) -> RunStep:
        """The step in flight and its next `num_steps - 1` repeats have finished, the last at `now`, and one more is in
        flight: that one is returned. Equals as many `StepFinished` in which nobody ended. At most `num_repeats()`."""
        step = self._in_flight
        if step is None or not 1 <= num_steps <= self.num_repeats():
            raise LawBroken(f"a leap over {num_steps} steps, {self.num_repeats()} may be")
        if now < self.now:
            raise LawBroken(f"law 5: an instance was told of {now} after {self.now}")
        self.now = now
        self._num_steps += num_steps
        self._step_id += num_steps
        num_context_tokens = self.composition.num_context_tokens + num_steps * self._group.num_members
        self._ledger.take(self._group.leap(num_steps))
        self.composition = StepComposition(num_decodes=self._group.num_members, num_context_tokens=num_context_tokens)
        step = RunStep(self._step_id, step.grants, (), self._ledger.num_available, step.reasons)
        self._in_flight = step
        return step


def _report(sequence: Sequence) -> SequenceReport:
    return SequenceReport(sequence.id, sequence.num_tokens, sequence.num_blocks, sequence.priority)
