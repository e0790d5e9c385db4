"""One engine's next step: sequences whose computed tokens catch up with their total."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from rota.base.errors import LawBroken, PolicyError, StarvationError
from rota.base.instant import Instant
from rota.serving.api import BatchPolicy, MemoryPolicy, OrderPolicy
from rota.serving.instance.draft import StepDraft
from rota.serving.instance.ledger import BlockLedger
from rota.serving.instance.sequence import Sequence
from rota.serving.instance.waiting import WaitingQueue
from rota.serving.model.commands import Grant, InstanceCommand, RejectSequence, RunStep
from rota.serving.model.events import InstanceEvent, SequenceAborted, SequenceArrived, StepFinished
from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import Request, RequestId

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
    """

    def __init__(
        self,
        limits: InstanceLimits,
        *,
        order: OrderPolicy,
        batch: BatchPolicy,
        memory: MemoryPolicy,
        repeat: bool = True,
    ) -> None:
        """`repeat` allows a command to stand for several equal steps (see `RunStep.max_repeats`)."""
        self.limits = limits
        self.now = Instant(0)
        self.running: list[Sequence] = []
        self.waiting = WaitingQueue()
        self._order = order
        self._batch = batch
        self._memory = memory
        # A policy that looks at the clock, or counts what it grants, must be asked for every step.
        self._repeat = repeat and batch.shape is not None and getattr(order, "repeatable", False)
        self._ledger = BlockLedger(
            limits.num_blocks, limits.block_size, enable_prefix_caching=limits.enable_prefix_caching
        )
        self._max_model_len = min(limits.max_model_len, limits.num_blocks * limits.block_size)
        self._sequences: dict[RequestId, Sequence] = {}
        self._in_flight: RunStep | None = None
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

    # --- the Machine -------------------------------------------------------------------------------------------------

    def handle(self, event: InstanceEvent, now: Instant) -> SequenceOf[InstanceCommand]:
        """Take one fact; returns the next step to run, a rejection, or nothing."""
        if now < self.now:
            raise LawBroken(f"law 5: an instance was told of {now} after {self.now}")
        self.now = now
        if isinstance(event, StepFinished):
            self._finish_step(event)
            return self._plan()
        if isinstance(event, SequenceArrived):
            reason = self._why_never(event.request)
            if reason is not None:
                return [RejectSequence(event.request.id, reason)]
            sequence = Sequence(event.request, 0)
            self._sequences[sequence.id] = sequence
            self.waiting.append(sequence)
            return self._plan() if self._in_flight is None else ()
        if isinstance(event, SequenceAborted):
            self._abort(event.request_id)
            return ()
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
        self._ledger.audit(list(self._sequences.values()))
        if len(self.running) + len(self.waiting) != len(self._sequences):
            raise LawBroken(
                f"law 1: {len(self.running)} running + {len(self.waiting)} waiting is not {len(self._sequences)} known"
            )
        if len(self.running) > self.limits.max_num_seqs:
            raise LawBroken(f"law 4: {len(self.running)} sequences run, {self.limits.max_num_seqs} may")
        for sequence in self.running:
            if sequence.num_computed_tokens > sequence.num_blocks * self.limits.block_size:
                raise LawBroken(f"law 3: {sequence!r} has more tokens than slots")

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

    def sequence(self, request_id: RequestId) -> Sequence | None:
        """A sequence that has not ended, for the world's bookkeeping and for tests; read only."""
        return self._sequences.get(request_id)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _why_never(self, request: Request) -> str | None:
        if request.id in self._sequences:
            return f"a request with id {request.id} is here already"
        if request.num_prompt_tokens < 1 or request.max_tokens < 1:
            return "a request needs at least one prompt token and one output token"
        if request.num_prompt_tokens >= self._max_model_len:
            return (
                f"the prompt has {request.num_prompt_tokens} tokens, and this instance takes "
                f"{self._max_model_len - 1} at most"
            )
        return None

    def _abort(self, request_id: RequestId) -> None:
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return
        if sequence.state == "running":
            self.running.remove(sequence)
            self._ledger.release(sequence, sequence.num_computed_tokens, will_return=False)
        else:
            self.waiting.remove(sequence)
        sequence.move("aborted")

    def _finish_step(self, event: StepFinished) -> None:
        step = self._in_flight
        if step is None or event.step_id != step.step_id:
            raise LawBroken(f"step {event.step_id} finished, but {step.step_id if step else 'none'} is in flight")
        if not 1 <= event.num_steps <= step.max_repeats:
            raise LawBroken(f"step {event.step_id} ran {event.num_steps} times, {step.max_repeats} were allowed")
        self._in_flight = None
        self._num_steps += event.num_steps
        sequences = self._sequences
        more = event.num_steps - 1
        for request_id, _ in step.grants:
            sequence = sequences.get(request_id)
            # A sequence may be gone (aborted), or be another of the same name that has not run yet.
            if sequence is None or not sequence.granted:
                continue
            sequence.granted = 0
            if sequence.num_computed_tokens == sequence.num_tokens:
                sequence.num_tokens += 1 + more
                if more:
                    sequence.num_computed_tokens += more
                    self._ledger.extend(sequence, sequence.num_computed_tokens)
        for request_id in event.finished:
            sequence = sequences.get(request_id)
            if sequence is None:
                continue
            if sequence.state != "running" or sequence.num_computed_tokens + 1 != sequence.num_tokens:
                raise LawBroken(f"law 2: {sequence!r} was said to have ended, but has no token to end with")
            self.running.remove(sequence)
            self._ledger.release(sequence, sequence.num_computed_tokens, will_return=False)
            sequence.move("finished")
            del sequences[request_id]

    def step_back(self, sequence: Sequence) -> None:
        """Put a preempted sequence, whose blocks are released, back at the front of the queue."""
        self.running.remove(sequence)
        sequence.move("preempted")
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self._num_preemptions += 1
        self.waiting.prepend(sequence)

    def _plan(self) -> SequenceOf[InstanceCommand]:
        preempted: list[RequestId] = []
        for _ in range(REPLANS_MAX):
            if not self._sequences:
                return ()
            draft = StepDraft(self, self._ledger, self._memory)
            self._ledger.begin()
            try:
                self._batch.plan(draft, self._order)
            except BaseException as error:
                self._take_back(draft, error)
                raise
            self._ledger.commit()
            self._apply(draft)
            preempted += [sequence.id for sequence in draft.preempted]
            if draft.grants:
                return [self._command(draft, preempted)]
            if not draft.preempted:
                break
        head = next(iter(self.waiting), None) or self.running[0]
        raise StarvationError(
            f"the batch policy granted nothing, though {len(self.running)} sequences run and {len(self.waiting)} wait; "
            f"{head.id} starves",
            hint="a batch policy must serve somebody whenever a sequence has pending tokens and room",
        )

    def _take_back(self, draft: StepDraft, error: BaseException) -> None:
        self._ledger.rollback()
        for sequence in draft.grants:
            sequence.granted = 0
        for sequence in draft.admitted:
            sequence.num_computed_tokens = 0
        if any(sequence.state == "preempted" for sequence in draft.preempted):
            raise PolicyError(
                f"the policy failed after sequences had been displaced; this instance cannot go on: {error}"
            ) from error

    def _apply(self, draft: StepDraft) -> None:
        for sequence in draft.preempted:
            if sequence.state == "running":
                self.step_back(sequence)
        for sequence in draft.admitted:
            self.waiting.remove(sequence)
            first = sequence.state == "waiting"
            sequence.move("admitted")
            sequence.admitted_seq = self._admissions
            self._admissions += 1
            self.running.append(sequence)
            if first:
                sequence.num_cached_tokens = sequence.num_computed_tokens
                self._num_cached_tokens += sequence.num_computed_tokens
                self._num_prompt_tokens += sequence.num_prompt_tokens
        for sequence in draft.grants:
            sequence.num_computed_tokens += sequence.granted

    def _command(self, draft: StepDraft, preempted: list[RequestId]) -> RunStep:
        self._step_id += 1
        grants = draft.grants
        step = RunStep(
            step_id=self._step_id,
            grants=tuple([Grant(sequence.id, sequence.granted) for sequence in grants]),
            preempted=tuple(preempted),
            num_free_blocks=self._ledger.num_available,
            max_repeats=self._max_repeats(grants) if self._repeat else 1,
        )
        self._in_flight = step
        return step

    def _max_repeats(self, grants: list[Sequence]) -> int:
        """How often this very step could be run before any policy might answer differently: nobody waits, everybody who
        runs decodes one token and got it, and no block runs out."""
        if len(self.waiting) or len(grants) != len(self.running):
            return 1
        block_size = self.limits.block_size
        most = self._max_model_len
        for sequence in grants:
            # What is computed counts this step already. A sequence that has not caught up is a prefill under way.
            if sequence.granted != 1 or sequence.num_computed_tokens != sequence.num_tokens:
                return 1
            left = min(
                sequence.request.max_tokens - sequence.num_output_tokens, self._max_model_len - sequence.num_tokens
            )
            if left < most:
                most = left
        rounds = self._ledger.num_available // len(grants)
        return max(1, min(most, rounds * block_size))
