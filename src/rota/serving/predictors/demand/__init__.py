"""Demand predictors, by name: what comes next in an evenly spaced series of counts."""

from rota.base.registry import Registry

DEMAND: Registry = Registry(
    "demand predictor",
    {
        "holt_winters": "rota.serving.predictors.demand.holt_winters:HoltWinters",
        "neural": "rota.serving.predictors.demand.neural:Neural",
        "seasonal_naive": "rota.serving.predictors.demand.seasonal_naive:SeasonalNaive",
    },
    entry_point_group="rota.demand",
)
