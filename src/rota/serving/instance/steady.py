"""The pass over a batch shape while everybody who runs gets what it needs: it looks only at what changes.

It plans what the shape's own pass (`rota.serving.policies.batch.passes.fill`) would, or it plans nothing and the batch
policy is asked: where blocks or budget lack for those that run, and where somebody could be displaced.
"""

from typing import TYPE_CHECKING

from rota.serving.api import BatchPolicy, BatchShape, OrderPolicy, Pool, admit_waiting
from rota.serving.instance.composition import StepComposition
from rota.serving.instance.decodes import DecodeGroup
from rota.serving.instance.draft import StepDraft
from rota.serving.instance.ledger import BlockLedger
from rota.serving.instance.sequence import Sequence
from rota.serving.model.commands import Grant, Reason

if TYPE_CHECKING:
    from rota.serving.instance.machine import InstanceMachine

Planned = tuple[tuple[Grant, ...], list[Reason], int]
"""The grants of a step, in batch order; why others got none; the token budget that is left."""


class SteadyPass:
    """Plans the steps of one instance that lack nothing. Costs O(all but mere decodes), and the tuple of grants."""

    def __init__(
        self,
        machine: "InstanceMachine",
        ledger: BlockLedger,
        group: DecodeGroup,
        order: OrderPolicy,
        shape: BatchShape,
    ) -> None:
        limits = machine.limits
        self.is_repeating = False
        """Whether the step planned last would be planned again, as long as the same sequences decode."""
        self._machine = machine
        self._ledger = ledger
        self._group = group
        self._order = order
        self._decodes_first = shape.decodes_first
        self._decodes_alone = shape.admit_before_running
        self._in_order_of_admission = order.running_order == "admission"
        self._token_budget = min(limits.max_num_batched_tokens, shape.token_budget or limits.max_num_batched_tokens)
        self._block_size = limits.block_size
        self._chunk_max = limits.long_prefill_token_threshold

    @classmethod
    def of(
        cls,
        machine: "InstanceMachine",
        ledger: BlockLedger,
        group: DecodeGroup,
        order: OrderPolicy,
        batch: BatchPolicy,
    ) -> "SteadyPass | None":
        """The pass for these policies, or None if they must see every step."""
        shape = batch.shape
        if shape is None or not getattr(order, "repeatable", False):
            return None
        return cls(machine, ledger, group, order, shape)

    def plan(self) -> Planned | None:
        """Plan one step and do it; None, with nothing done, if the batch policy has to."""
        machine, ledger, group = self._machine, self._ledger, self._group
        apart = machine.apart
        num_waiting = len(machine.waiting)
        if self._decodes_alone and (num_waiting or apart):
            return None
        left = self._token_budget - group.num_members
        if left < 0 or (num_waiting and self._order.displacing and self._could_displace()):
            return None
        line = machine.running if self._in_order_of_admission else self._line()
        served: list[tuple[Sequence, int]] = []
        num_new = group.num_blocks_due()
        if apart:
            found = self._serve(line, left)
            if found is None:
                return None
            served, left, num_more = found
            num_new += num_more
        if num_new > ledger.num_available:
            return None
        if not num_waiting or not left:
            if not served and not group.num_members:
                return None
            self._take(num_new, served)
            self.is_repeating = not served and not (num_waiting and self._order.displacing)
            return self._done(line, served, None), [], left
        return self._plan_with_waiting(line, served, left, num_new)

    def _plan_with_waiting(
        self, line: list[Sequence], served: list[tuple[Sequence, int]], left: int, num_new: int
    ) -> Planned | None:
        machine, ledger = self._machine, self._ledger
        draft = StepDraft.after_running(machine, ledger, left)
        ledger.begin()
        try:
            self._take(num_new, served)
            admit_waiting(draft, self._order)
        except BaseException as error:
            for sequence, _ in served:
                sequence.granted = 0
            machine.take_back(draft, error)
            raise
        ledger.commit()
        if not served and not draft.admitted and not self._group.num_members:
            return None
        self.is_repeating = not served and not draft.admitted and not self._order.displacing
        return self._done(line, served, draft), draft.reasons, draft.token_budget

    def _could_displace(self) -> bool:
        machine, order = self._machine, self._order
        head = order.open(machine, Pool.WAITING).next()
        if head is None or not machine.running:
            return False
        last = machine.running[-1] if self._in_order_of_admission else self._line()[-1]
        return order.displaces(machine, head, last)

    def _line(self) -> list[Sequence]:
        cursor = self._order.open(self._machine, Pool.RUNNING)
        return list(iter(cursor.next, None))  # type: ignore[arg-type]  # the machine's sequences are what it walks over

    def _serve(self, line: list[Sequence], left: int) -> tuple[list[tuple[Sequence, int]], int, int] | None:
        """Tokens for those that run and are not in the group, the budget then left, and the blocks that it takes. None
        if the budget runs out ahead of somebody in the group, or before somebody got any."""
        machine = self._machine
        apart = machine.apart
        num_decodes = len(line) - len(apart)
        chunk_max = self._chunk_max if len(line) + len(machine.waiting) > 1 else 0
        heavy = [sequence.num_pending_tokens for sequence in apart]
        if sum(heavy) > left:
            # Then whoever is not in the group must come last in the line, each with something to gain.
            if self._decodes_first:
                comes_last = min(heavy) > 1 and (self._in_order_of_admission or len(apart) == 1)
            else:
                comes_last = line[num_decodes:] == apart
            if not comes_last:
                return None
        served = []
        num_new = 0
        block_size = self._block_size
        for sequence, pending in zip(apart, heavy, strict=True):
            num_tokens = min(pending, left)
            if 0 < chunk_max < num_tokens:
                num_tokens = chunk_max
            if not num_tokens:
                return None
            left -= num_tokens
            num_new += -(-(sequence.num_computed_tokens + num_tokens) // block_size) - sequence.num_blocks
            served.append((sequence, num_tokens))
        return served, left, num_new

    def _take(self, num_new: int, served: list[tuple[Sequence, int]]) -> None:
        """Hand out the blocks of everybody who runs."""
        ledger = self._ledger
        if not served:
            if num_new:
                ledger.take(num_new)
            return
        ledger.take(self._group.num_blocks_due())
        for sequence, num_tokens in served:
            total = sequence.num_computed_tokens + num_tokens
            ledger.extend(sequence, total)
            if sequence.num_shared < sequence.num_hashed:
                ledger.publish(sequence, total)
            sequence.granted = num_tokens

    def _done(
        self, line: list[Sequence], served: list[tuple[Sequence, int]], draft: StepDraft | None
    ) -> tuple[Grant, ...]:
        """Apply the step."""
        machine, group = self._machine, self._group
        grants = self._grants(line, served)
        admitted = draft.admitted if draft is not None else ()
        if admitted:
            machine.admit(admitted)
            grants += tuple([Grant(sequence.id, sequence.granted) for sequence in admitted])
        group.plan()
        step = StepComposition(num_decodes=group.num_members, num_context_tokens=group.num_context_tokens)
        for sequence, num_tokens in served:
            sequence.num_computed_tokens += num_tokens
            step.add(sequence, num_tokens)
        for sequence in admitted:
            sequence.num_computed_tokens += sequence.granted
            step.add(sequence, sequence.granted)
        machine.composition = step
        return grants

    def _grants(self, line: list[Sequence], served: list[tuple[Sequence, int]]) -> tuple[Grant, ...]:
        """The grants to those that run, in the order in which the pass serves them."""
        if not self._machine.apart:
            return tuple([sequence.grant for sequence in line])
        given = {sequence.id: num_tokens for sequence, num_tokens in served}
        if self._decodes_first:
            heavy = {sequence.id for sequence in self._machine.apart if sequence.num_pending_tokens > 1}
            line = [one for one in line if one.id not in heavy] + [one for one in line if one.id in heavy]
        grants = []
        for sequence in line:
            if sequence.is_paced:
                grants.append(sequence.grant)
            elif sequence.id in given:
                grants.append(Grant(sequence.id, given[sequence.id]))
        return tuple(grants)
