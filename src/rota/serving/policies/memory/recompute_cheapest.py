"""Preempt whoever costs least to compute again, and nobody too often."""

from collections.abc import Sequence

from rota.serving.api import Capability, EngineCapabilities, MemoryView, SequenceView, VictimOrder
from rota.serving.policies.parameters import at_least_one


class RecomputeCheapest:
    """The victim is the running sequence of the lowest class that loses the fewest computed tokens: those in blocks
    that nobody else holds, since shared ones stay in the prefix cache for certain. One that gives no block back is
    nobody's choice.

    Rule: cost-aware preemption; the cost is the prefill that brings the victim back. The blocks that it gives back stay
    in the prefix cache until they are taken, so this is the most that it can cost.

    Bound: whoever was preempted `preempted_at_most` times is preempted again only for a higher class, or where all who
    may be taken in its class were as often; then the one that arrived last goes, so the first to arrive of them is
    never taken. With `reserve_full_prompt`, in one class and under an order that displaces nobody, a request is thus
    preempted at most `preempted_at_most` times, and once more for each block that its own answer fills, or the answer
    of one that arrived before it.

    Good where lengths differ much and the cache cannot keep what it is given. Whoever is small pays, up to the bound:
    under sustained pressure that is the short requests and the newcomers. It pays no heed to how the order ranks
    within a class: with an order that displaces, `recompute_lowest` does not work against it.
    """

    requires: EngineCapabilities = frozenset({Capability.PREEMPT_RECOMPUTE, Capability.CHOOSE_VICTIM})
    victim_order: VictimOrder = "chosen"

    def __init__(self, *, preempted_at_most: int = 8) -> None:
        at_least_one("recompute_cheapest", preempted_at_most=preempted_at_most)
        self._preempted_at_most = preempted_at_most

    def victim(self, view: MemoryView, candidates: Sequence[SequenceView], needy: SequenceView) -> SequenceView | None:
        lowest = max((one.priority for one in candidates), default=0)
        of_lowest = [one for one in candidates if one.priority == lowest]
        spared = [one for one in of_lowest if one.num_preemptions < self._preempted_at_most]
        if not spared:
            return max(of_lowest, key=lambda one: (one.arrived_at, one.admitted_seq), default=None)
        return min(spared, key=lambda one: self._cost(view, one))

    def _cost(self, view: MemoryView, sequence: SequenceView) -> tuple[bool, int, int]:
        """Whether it gives nothing back, the tokens that it loses, and the last admitted first among equals."""
        block_size = view.limits.block_size
        num_blocks = -(-sequence.num_computed_tokens // block_size)
        num_freed = view.num_blocks_freed((sequence,))
        num_lost = sequence.num_computed_tokens - (num_blocks - num_freed) * block_size
        return num_freed == 0, num_lost, -sequence.admitted_seq
