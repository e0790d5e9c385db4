"""Memory policies, by name."""

from rota.base.registry import Registry

MEMORY: Registry = Registry(
    "memory",
    {
        "recompute_cheapest": "rota.serving.policies.memory.recompute_cheapest:RecomputeCheapest",
        "recompute_last": "rota.serving.policies.memory.recompute_last:RecomputeLast",
        "recompute_lowest": "rota.serving.policies.memory.recompute_lowest:RecomputeLowest",
    },
    entry_point_group="rota.memory",
)
