"""Migration policies, by name."""

from rota.base.registry import Registry

MIGRATION: Registry = Registry(
    "migration policy",
    {
        "none": "rota.serving.policies.migration.none:NoneMoved",
    },
    entry_point_group="rota.migration",
)
