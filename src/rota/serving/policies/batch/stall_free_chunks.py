"""Chunked prefill that never makes a decode wait (Sarathi-Serve)."""

from rota.base.errors import ConfigError
from rota.serving.api import BatchDraft, BatchShape, Capability, EngineCapabilities, OrderPolicy
from rota.serving.policies.batch.passes import fill


class StallFreeChunks:
    """Running decodes first, one token each; prefills fill what is left of a small token budget, in chunks.

    Rule: Sarathi-Serve (OSDI'24), its `chunk_size` being the budget of the whole step; 512 is its default, with 2048
    for relaxed targets. Differs from the authors' code in one point: blocks are taken chunk by chunk, as vLLM does,
    and the whole prompt must only *fit* at admission. Law: a running decode that is not preempted gets its token in
    every step, and no step holds more tokens than the budget, so the time between tokens is at most the time of such
    a step.

    Good for steady time between tokens. Costs time to first token, since prompts are cut; with more running decodes
    than the budget, the last in line wait their turn."""

    requires: EngineCapabilities = frozenset({Capability.TOKEN_BUDGET, Capability.ORDER_RUNNING})

    def __init__(self, *, chunk_size: int = 512) -> None:
        if chunk_size < 1:
            raise ConfigError(f"stall_free_chunks: chunk_size must be at least 1 token, not {chunk_size}")
        self.shape = BatchShape(token_budget=chunk_size, decodes_first=True)

    def plan(self, draft: BatchDraft, order: OrderPolicy) -> None:
        fill(draft, order, self.shape)
