"""Order policies, by name."""

from rota.base.registry import Registry

ORDER: Registry = Registry(
    "order",
    {
        "fcfs": "rota.serving.policies.order.fcfs:Fcfs",
        "fair_tokens": "rota.serving.policies.order.fair_tokens:FairTokens",
        "strict_priority": "rota.serving.policies.order.strict_priority:StrictPriority",
    },
    entry_point_group="rota.order",
)
