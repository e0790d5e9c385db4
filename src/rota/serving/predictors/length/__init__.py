"""Predictors of output length, by name: how many tokens an answer will have."""

from rota.base.registry import Registry

LENGTH: Registry = Registry(
    "length predictor",
    {
        "declared": "rota.serving.predictors.length.declared:Declared",
        "history": "rota.serving.predictors.length.history:History",
        "oracle": "rota.serving.predictors.length.oracle:Oracle",
        "ranked": "rota.serving.predictors.length.ranked:Ranked",
    },
    entry_point_group="rota.length",
)
