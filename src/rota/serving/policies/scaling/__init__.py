"""Scaling policies, by name."""

from rota.base.registry import Registry

SCALING: Registry = Registry(
    "scaling policy",
    {
        "none": "rota.serving.policies.scaling.none:NoneStarted",
    },
    entry_point_group="rota.scaling",
)
