"""Scaling policies, by name."""

from rota.base.registry import Registry

SCALING: Registry = Registry(
    "scaling policy",
    {
        "forecast": "rota.serving.policies.scaling.forecast:Forecast",
        "freeness_band": "rota.serving.policies.scaling.freeness_band:FreenessBand",
        "none": "rota.serving.policies.scaling.none:NoneStarted",
        "queue_reactive": "rota.serving.policies.scaling.queue_reactive:QueueReactive",
        "slo_attainment": "rota.serving.policies.scaling.slo_attainment:SloAttainment",
    },
    entry_point_group="rota.scaling",
)
