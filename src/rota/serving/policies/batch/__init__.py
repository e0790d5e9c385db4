"""Batch policies, by name."""

from rota.base.registry import Registry

BATCH: Registry = Registry(
    "batch",
    {
        "vllm_default": "rota.serving.policies.batch.vllm_default:VllmDefault",
        "stall_free_chunks": "rota.serving.policies.batch.stall_free_chunks:StallFreeChunks",
        "prefill_first": "rota.serving.policies.batch.prefill_first:PrefillFirst",
    },
    entry_point_group="rota.batch",
)
