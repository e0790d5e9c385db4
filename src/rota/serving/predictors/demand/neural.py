"""A neural network that was trained on the history, by neuralforecast."""

import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any, Literal

from rota.base.errors import ConfigError

RETRY_EVERY = 60


class Neural:
    """`TimeMixer` (mixes the series at several resolutions) or `TimesNet` (folds it at its strongest periods), one
    series, as neuralforecast has them. Until `train_after_bins` have passed it is the last value, as for any forecaster
    without a past.

    **It trains here**, on the whole history: at once when there is enough, and anew every `refit_every` forecasts
    (0: never). That takes from seconds to minutes, and whoever asked waits for it. So in a router that serves, train
    elsewhere, and name the folder (`trained`) that neuralforecast's own `NeuralForecast.save` wrote: then nothing is
    ever trained here. A training that fails raises, and is tried again after `RETRY_EVERY` forecasts; until then the
    network of before goes on, if there is one.

    Beyond the network's horizon the last value of it goes on. A forecast below 0 is 0. What is not the library's
    default: a network looks back over `look_back_bins` and ahead over `horizon_bins`, learns for `num_steps` steps, and
    sees each stretch normalised to its own mean and spread. All four defaults are ours.

    Needs neuralforecast (`pip install 'rota[neural]'`), which brings PyTorch.
    """

    def __init__(
        self,
        *,
        network: Literal["TimeMixer", "TimesNet"] = "TimeMixer",
        trained: str | None = None,
        train_after_bins: int = 2880,
        refit_every: int = 1440,
        look_back_bins: int = 1440,
        horizon_bins: int = 30,
        num_steps: int = 300,
    ) -> None:
        """The defaults are for bins of a minute: two days before it is trained, then daily, looking back one day."""
        for name, value, least in (
            ("look_back_bins", look_back_bins, 2),
            ("horizon_bins", horizon_bins, 1),
            ("num_steps", num_steps, 1),
            ("refit_every", refit_every, 0),
            # The first stretch that it can learn from, and as much again to learn from others.
            ("train_after_bins", train_after_bins, look_back_bins + 2 * horizon_bins),
        ):
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, not {value}")
        if importlib.util.find_spec("neuralforecast") is None:
            raise ConfigError(
                "demand predictor 'neural' needs neuralforecast",
                hint="pip install 'rota[neural]', or choose demand = \"holt_winters\"",
            )
        self._network: str = network
        self._train_after = train_after_bins
        self._refit_every = refit_every
        self._look_back = look_back_bins
        self._horizon = horizon_bins
        self._num_steps = num_steps
        self._is_ours = trained is None
        self._num_until_fit = 0
        """Forecasts before it is trained again; below 0 is never."""
        self._fitted: Any = None if trained is None else self._load(trained)

    def forecast(self, history: Sequence[float], num_ahead: int) -> Sequence[float]:
        if not history:
            raise ValueError("there is no history")
        if len(history) < (self._train_after if self._is_ours else self._look_back):
            return [history[-1]] * num_ahead
        with warnings.catch_warnings():
            # Of data loaders without workers, and of numbers of cores.
            warnings.simplefilter("ignore")
            if self._is_ours:
                self._train_if_due(history)
            if self._fitted is None:
                raise ValueError("it could not be trained")
            told = self._fitted.predict(df=_as_frame(history[-self._look_back :]))
        values = [max(0.0, float(value)) for value in told[self._network]]
        return (values + values[-1:] * num_ahead)[:num_ahead]

    def _train_if_due(self, history: Sequence[float]) -> None:
        self._num_until_fit -= 1
        if self._num_until_fit != -1:
            return
        self._num_until_fit = RETRY_EVERY
        # Heavy to import, and optional.
        from neuralforecast import NeuralForecast, models

        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        options = {"n_series": 1} if self._network == "TimeMixer" else {}
        network = getattr(models, self._network)(
            h=self._horizon,
            input_size=self._look_back,
            max_steps=self._num_steps,
            scaler_type="standard",
            accelerator="cpu",
            enable_checkpointing=False,
            **options,
            **quiet,
        )
        fitted = NeuralForecast(models=[network], freq=1)
        fitted.fit(df=_as_frame(history))
        self._fitted = fitted
        self._num_until_fit = self._refit_every or -1

    def _load(self, folder: str) -> Any:
        from neuralforecast import NeuralForecast

        try:
            fitted = NeuralForecast.load(path=folder, verbose=False)
        except Exception as error:  # whatever a folder that is none of its own makes it raise
            raise ConfigError(f"trained: {folder} holds no network that neuralforecast has saved: {error}") from None
        (network,) = fitted.models
        self._network, self._look_back = type(network).__name__, int(network.input_size)
        return fitted


def _as_frame(history: Sequence[float]) -> Any:
    """One series as neuralforecast reads it: the bins numbered."""
    import pandas as pd

    return pd.DataFrame({"unique_id": "demand", "ds": range(len(history)), "y": [float(value) for value in history]})
