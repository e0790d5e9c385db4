"""A step being composed: every grant is checked as it is written, and the whole can be taken back."""

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Literal

from rota.base.errors import PolicyError
from rota.serving.api import NOTHING, EngineView, MemoryPolicy, OrderPolicy, Refusal, SequenceView, VictimOrder
from rota.serving.instance.displacement import choose_displaced, choose_short
from rota.serving.instance.ledger import BlockLedger, Hit
from rota.serving.instance.sequence import Sequence, own
from rota.serving.model.commands import REASONS_MAX, Reason
from rota.serving.model.request import RequestId

if TYPE_CHECKING:
    from rota.serving.instance.machine import InstanceMachine


class _NobodyToPreempt:
    """The memory policy of a walk that makes no victims."""

    requires = NOTHING
    victim_order: VictimOrder = "line"

    def victim(self, view: EngineView, candidates: SequenceOf[SequenceView], needy: SequenceView) -> None:
        return None


_NOBODY_TO_PREEMPT = _NobodyToPreempt()


class StepDraft:
    """The `BatchDraft` of the instance machine.

    Blocks are taken from the ledger at once, under its undo log; running and waiting lists change only when the machine
    applies the draft, except by `displace`, which happens before the pass and puts its victims back into the queue.
    """

    def __init__(self, machine: "InstanceMachine", ledger: BlockLedger, memory: MemoryPolicy) -> None:
        self.view = machine
        limits = machine.limits
        self._ledger = ledger
        self._memory = memory
        self._block_size = limits.block_size
        self.token_budget = limits.max_num_batched_tokens
        self.num_preempted = 0
        self.grants: list[Sequence] = []
        """In batch order; each carries its `granted` tokens."""
        self.admitted: list[Sequence] = []
        self.swapped_in: list[tuple[Sequence, int]] = []
        """Who got room for its copy in host memory, and how many blocks of it must be copied."""
        self.preempted: list[Sequence] = []
        """In the order in which it happened, displaced ones first."""
        self.reasons: list[Reason] = []
        """Why somebody was stopped or not served; the first `REASONS_MAX`."""
        self._line: SequenceOf[SequenceView] = machine.running
        eligible = len(machine.running) + len(machine.waiting)
        self._chunk_max = limits.long_prefill_token_threshold if eligible > 1 else 0

    @classmethod
    def after_running(cls, machine: "InstanceMachine", ledger: BlockLedger, token_budget: int) -> "StepDraft":
        """A draft in which all that run have been served, for the walk over those that wait: it preempts nobody."""
        draft = cls(machine, ledger, _NOBODY_TO_PREEMPT)
        draft.token_budget = token_budget
        return draft

    def limit_tokens(self, token_budget: int) -> None:
        if self.grants:
            raise PolicyError("the token budget of a step was changed after its first grant")
        self.token_budget = min(self.token_budget, token_budget)

    def line_up(self, running: SequenceOf[SequenceView]) -> None:
        self._line = running

    def displace(self, order: OrderPolicy) -> int:
        if self.grants:
            raise PolicyError("displacing must come before the first grant of a step")
        ledger = self._ledger
        victims = choose_displaced(
            self.view,
            order,
            self._memory,
            token_budget=self.token_budget,
            num_blocks_to_take=lambda waiting, leaving: ledger.num_to_take(
                own(waiting),
                ledger.lookup(own(waiting), waiting.num_tokens),
                waiting.num_tokens,
                [own(sequence) for sequence in leaving],
            ),
            num_slots_aside=self.view.moving.num_slots,
        )
        for victim in victims:
            sequence = own(victim)
            ledger.release(sequence, sequence.num_computed_tokens, will_return=True)
            self.preempted.append(sequence)
            self._note(sequence.id, "displaced", "outranked by one that waits and could not start otherwise")
            self.view.step_back(sequence)
        if victims:
            self._line = self.view.running
        return len(victims)

    def make_room(self, order: OrderPolicy, *, decodes_first: bool) -> int:
        if self.grants:
            raise PolicyError("making room must come before the first grant of a step")
        if self._memory.victim_order != "chosen":
            return 0
        victims = choose_short(
            self.view, order, self._memory, token_budget=self.token_budget, decodes_first=decodes_first
        )
        for victim, needy in victims:
            self._preempt(own(victim), needy)
        return len(victims)

    def grant(self, sequence: SequenceView, num_tokens: int) -> int | Refusal:
        own = sequence
        if own.__class__ is not Sequence:
            raise PolicyError(f"a grant was asked for {sequence!r}, which is not a sequence of this step")
        if num_tokens < 1:
            raise PolicyError(f"a grant of {num_tokens} tokens was asked for {own.id}")
        if own.granted:
            raise PolicyError(f"{own.id} was granted tokens twice in one step")
        result = (
            self._grant_running(own, num_tokens) if own.state == "running" else self._grant_waiting(own, num_tokens)
        )
        # One that has just been preempted was told why.
        if result.__class__ is Refusal and result is not Refusal.NOT_PENDING:
            self._note(own.id, "refused", result.value)
        return result

    def _grant_running(self, sequence: Sequence, num_tokens: int) -> int | Refusal:
        computed = sequence.num_computed_tokens
        pending = sequence.num_tokens - computed
        if pending <= 0 or (self.num_preempted and sequence in self.preempted):
            return Refusal.NOT_PENDING
        if num_tokens > pending:
            num_tokens = pending
        if num_tokens > self.token_budget:
            num_tokens = self.token_budget
            if num_tokens <= 0:
                return Refusal.NO_BUDGET
        if 0 < self._chunk_max < num_tokens:
            num_tokens = self._chunk_max
        total = computed + num_tokens
        if total > sequence.num_blocks * self._block_size:
            ledger = self._ledger
            num_new = -(-total // self._block_size) - sequence.num_blocks
            while num_new > ledger.num_free + ledger.num_cached:
                if not self._preempt_for(sequence):
                    return Refusal.NO_MEMORY
                if sequence in self.preempted:
                    return Refusal.NOT_PENDING
            ledger.extend(sequence, total)
        if sequence.num_shared < sequence.num_hashed:
            self._ledger.publish(sequence, total)
        sequence.granted = num_tokens
        self.grants.append(sequence)
        self.token_budget -= num_tokens
        return num_tokens

    def _preempt_for(self, needy: Sequence) -> bool:
        """Preempt one running sequence, the needy one perhaps. False if the memory policy names nobody."""
        # Once somebody was admitted, blocks that this step is to fill may be shared already: who fills them must run.
        candidates = [
            sequence
            for sequence in self._line
            if sequence not in self.preempted and not (self.admitted and own(sequence).granted)
        ]
        victim = self._memory.victim(self.view, candidates, needy)
        if victim is None:
            return False
        if victim not in candidates:
            raise PolicyError(f"the memory policy chose {victim!r}, which is not among its candidates")
        self._preempt(own(victim), needy)
        return True

    def _preempt(self, sequence: Sequence, needy: SequenceView) -> None:
        if sequence.granted:
            self.token_budget += sequence.granted
            sequence.granted = 0
            self.grants.remove(sequence)
            self._ledger.retract(sequence, sequence.num_computed_tokens)
        self._ledger.release(sequence, sequence.num_computed_tokens, will_return=True)
        self.preempted.append(sequence)
        self.num_preempted += 1
        self._note(sequence.id, "preempted", f"{Refusal.NO_MEMORY.value} for {needy.id}")

    def _swap_in(self, sequence: Sequence, hit: Hit, num_kept: int, num_running: int) -> Refusal:
        """Give a sequence room for its copy in host memory; it gets no tokens before the copy is there."""
        limits, ledger = self.view.limits, self._ledger
        must_fit = sequence.num_tokens if limits.reserve_full_prompt else num_kept + 1
        headroom = limits.watermark_blocks if num_running else 0
        # A block for each that is on its way back, without which they could swap each other out by turns, for ever.
        headroom += len(self.view.moving.resting) + len(self.swapped_in)
        if ledger.num_to_take(sequence, hit, must_fit) + headroom > ledger.num_available:
            return Refusal.NO_MEMORY
        # Its blocks can be found by others once they are computed or copied, not before: the next grant says so.
        ledger.admit(sequence, hit, num_kept)
        sequence.num_computed_tokens = num_kept
        self.swapped_in.append((sequence, num_kept // self._block_size - hit.num_blocks))
        return Refusal.NOT_PENDING

    def _note(self, request_id: RequestId, choice: Literal["refused", "preempted", "displaced"], why: str) -> None:
        reason = Reason(request_id, choice, why)
        if len(self.reasons) < REASONS_MAX and reason not in self.reasons:
            self.reasons.append(reason)

    def _grant_waiting(self, sequence: Sequence, num_tokens: int) -> int | Refusal:
        if self.token_budget <= 0:
            return Refusal.NO_BUDGET
        view = self.view
        limits = view.limits
        num_running = len(view.running) - self.num_preempted + len(self.admitted) + len(self.swapped_in)
        if num_running + view.moving.num_slots >= limits.max_num_seqs:
            return Refusal.NO_SLOT
        if self.num_preempted and sequence in self.preempted:
            return Refusal.NOT_PENDING
        if view.sequence(sequence.id) is not sequence:
            raise PolicyError(f"a grant was asked for {sequence!r}, which has ended or never was here")
        ledger = self._ledger
        hit = ledger.lookup(sequence, sequence.num_tokens)
        cached = hit.num_blocks * self._block_size
        kept = 0 if view.host is None else view.host.num_kept(sequence.id) * self._block_size
        if kept > cached:
            return self._swap_in(sequence, hit, kept, num_running)
        num_tokens = min(num_tokens, sequence.num_tokens - cached, self.token_budget)
        if 0 < self._chunk_max < num_tokens:
            num_tokens = self._chunk_max
        must_fit = sequence.num_tokens if limits.reserve_full_prompt else cached + num_tokens
        headroom = limits.watermark_blocks if num_running else 0
        if ledger.num_to_take(sequence, hit, must_fit) + headroom > ledger.num_available:
            return Refusal.NO_MEMORY
        ledger.admit(sequence, hit, cached + num_tokens)
        ledger.publish(sequence, cached + num_tokens)
        sequence.num_computed_tokens = cached
        sequence.granted = num_tokens
        self.grants.append(sequence)
        self.admitted.append(sequence)
        self.token_budget -= num_tokens
        return num_tokens
