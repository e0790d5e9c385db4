"""Migration policies, by name."""

from rota.base.registry import Registry

MIGRATION: Registry = Registry(
    "migration policy",
    {
        "balance_load": "rota.serving.policies.migration.balance_load:BalanceLoad",
        "defragment": "rota.serving.policies.migration.defragment:Defragment",
        "defragment_plan": "rota.serving.policies.migration.defragment_plan:DefragmentPlan",
        "drain": "rota.serving.policies.migration.drain:Drain",
        "isolate_class": "rota.serving.policies.migration.isolate_class:IsolateClass",
        "none": "rota.serving.policies.migration.none:NoneMoved",
    },
    entry_point_group="rota.migration",
)
