"""Preempt the sequence admitted last."""

from collections.abc import Sequence

from rota.serving.api import Capability, EngineCapabilities, EngineView, SequenceView, VictimOrder


class RecomputeLast:
    """The victim is the running sequence admitted last; it is computed again later, but for what the prefix cache kept.

    Rule: vLLM's victim under `fcfs`. Good because the oldest work ends first, so that nobody is preempted for ever.
    Does not look at classes; a sequence admitted last pays again and again under sustained pressure.
    """

    requires: EngineCapabilities = frozenset({Capability.PREEMPT_RECOMPUTE})
    victim_order: VictimOrder = "admission"

    def victim(self, view: EngineView, candidates: Sequence[SequenceView], needy: SequenceView) -> SequenceView | None:
        return max(candidates, key=lambda sequence: sequence.admitted_seq, default=None)
