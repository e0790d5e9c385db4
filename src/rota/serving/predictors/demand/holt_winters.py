"""Exponential smoothing with a trend and a season, by statsmodels."""

import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from rota.base.errors import ConfigError


class HoltWinters:
    """Additive Holt-Winters: a level, a damped trend, and from the moment on that two seasons have passed a value
    for each bin of the season. Before, the trend alone (Holt), and for the first few bins the last value.

    The smoothing constants are fitted anew (least squares) every `refit_every` forecasts, and used as they are in
    between: a fit takes a second or so, smoothing with known constants ten milliseconds. A
    forecast below 0 is 0.

    Needs statsmodels (`pip install 'rota[forecast]'`).
    """

    def __init__(self, *, season_bins: int = 1440, refit_every: int = 120) -> None:
        """`season_bins` is a season's length, 0 for none: a day of minutes by default."""
        if season_bins < 0 or season_bins == 1:
            raise ConfigError(f"season_bins must be 0, or at least 2, not {season_bins}")
        if refit_every < 1:
            raise ConfigError(f"refit_every must be at least 1, not {refit_every}")
        if importlib.util.find_spec("statsmodels") is None:
            raise ConfigError(
                "demand predictor 'holt_winters' needs statsmodels",
                hint="pip install 'rota[forecast]', or choose demand = \"seasonal_naive\"",
            )
        self._season = season_bins
        self._refit_every = refit_every
        self._num_since_fit = 0
        self._constants: dict[str, float] = {}

    def forecast(self, history: Sequence[float], num_ahead: int) -> Sequence[float]:
        if not history:
            raise ValueError("there is no history")
        if len(history) < _FEWEST:
            return [history[-1]] * num_ahead
        # Heavy to import, and optional.
        from statsmodels.tsa.holtwinters import ExponentialSmoothing

        is_seasonal = 0 < 2 * self._season <= len(history)
        model = ExponentialSmoothing(
            np.asarray(history, dtype=float),
            trend="add",
            damped_trend=True,
            seasonal="add" if is_seasonal else None,
            seasonal_periods=self._season if is_seasonal else None,
            initialization_method="heuristic" if is_seasonal else "estimated",
        )
        with warnings.catch_warnings():
            # Of constants that did not converge: the forecast is as good as they are.
            warnings.simplefilter("ignore")
            fitted = model.fit(**self._how_to_fit(is_seasonal))
        self._constants = _constants_of(fitted.params, is_seasonal)
        return [max(0.0, float(value)) for value in fitted.forecast(num_ahead)]

    def _how_to_fit(self, is_seasonal: bool) -> dict[str, Any]:
        is_known = ("smoothing_seasonal" in self._constants) == is_seasonal and bool(self._constants)
        self._num_since_fit += 1
        if is_known and self._num_since_fit < self._refit_every:
            return {**self._constants, "optimized": False}
        self._num_since_fit = 0
        return {}


_FEWEST = 12
"""Bins that a trend can be told from, as statsmodels demands for its estimate of where to begin."""


def _constants_of(params: dict[str, Any], is_seasonal: bool) -> dict[str, float]:
    names = ["smoothing_level", "smoothing_trend", "damping_trend"] + (["smoothing_seasonal"] if is_seasonal else [])
    return {name: float(params[name]) for name in names}
