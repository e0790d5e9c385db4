"""How long a step takes. To add a predictor: a file here, a line in `STEP_TIMES`, and a test that calls
`rota.testing.step_time.check_step_time`."""

from rota.base.registry import Registry

STEP_TIMES = Registry(
    "step_time",
    {
        "affine": "rota.serving.predictors.step_time.affine:AffineStepTime",
        "calibrated": "rota.serving.predictors.step_time.calibrated:CalibratedStepTime",
        "grid": "rota.serving.predictors.step_time.grid:GridStepTime",
        "layerwise": "rota.serving.predictors.step_time.layerwise:LayerwiseStepTime",
        "phases": "rota.serving.predictors.step_time.phases:PhasesStepTime",
    },
    entry_point_group="rota.step_times",
)
