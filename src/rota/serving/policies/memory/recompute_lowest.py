"""Preempt the sequence that the order ranks last."""

from collections.abc import Sequence

from rota.serving.api import Capability, EngineCapabilities, EngineView, SequenceView, VictimOrder


class RecomputeLowest:
    """The victim is the last in the line that this step serves: under `strict_priority` the one of the lowest class
    that was admitted last, under `fcfs` simply the one admitted last.

    Rule: vLLM's victim (the end of its running list), whatever the order. Good because order and memory never work
    against each other. Whoever the order ranks last pays under sustained pressure.
    """

    requires: EngineCapabilities = frozenset({Capability.PREEMPT_RECOMPUTE})
    victim_order: VictimOrder = "line"

    def victim(self, view: EngineView, candidates: Sequence[SequenceView], needy: SequenceView) -> SequenceView | None:
        return candidates[-1] if candidates else None
