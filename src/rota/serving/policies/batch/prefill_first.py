"""Prefill before decode, never both in a step."""

from rota.serving.api import BatchDraft, BatchShape, Capability, EngineCapabilities, OrderPolicy
from rota.serving.policies.batch.passes import fill


class PrefillFirst:
    """Admit and prefill whatever fits; decode only in steps that have no prefill.

    Rule: the scheduler of the first vLLM and of Orca-like engines, the usual negative control for stall-free batches.
    Good for time to first token. Starves decodes for as long as prompts keep coming, so the time between tokens has no
    bound. vLLM 0.32 serves running sequences first whatever it is told, so it cannot host this policy.
    """

    requires: EngineCapabilities = frozenset({Capability.ADMIT_BEFORE_RUNNING})
    shape = BatchShape(admit_before_running=True)

    def plan(self, draft: BatchDraft, order: OrderPolicy) -> None:
        fill(draft, order, self.shape)
