"""Exactly what vLLM 0.32 does."""

from rota.serving.api import NOTHING, BatchDraft, BatchShape, EngineCapabilities, OrderPolicy
from rota.serving.policies.batch.passes import fill


class VllmDefault:
    """Running sequences first, in order, each up to the budget; then waiting ones. Prefill and decode mix.

    Rule: `Scheduler.schedule` of vLLM 0.32, chunked prefill on. Good for throughput. A long prefill that runs shares
    the step with decodes and stretches their time between tokens; `stall_free_chunks` bounds that."""

    requires: EngineCapabilities = NOTHING
    shape = BatchShape()

    def plan(self, draft: BatchDraft, order: OrderPolicy) -> None:
        fill(draft, order, self.shape)
