"""The neural demand predictor: what surrounds the network, without it; and the network, where it is installed."""

import importlib.util
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rota.base.errors import ConfigError
from rota.serving.predictors.demand import DEMAND, neural
from rota.serving.predictors.demand.neural import RETRY_EVERY, Neural

SMALL = {"train_after_bins": 12, "look_back_bins": 4, "horizon_bins": 3, "refit_every": 5}


class Trained:
    """Stands for neuralforecast: it tells the last value, doubled, then one below nothing."""

    num_fits = 0
    fails = False

    def __init__(self, models: list[Any], freq: int) -> None:
        self.models = models

    def fit(self, df: Any) -> None:
        type(self).num_fits += 1
        if self.fails:
            raise RuntimeError("out of memory")

    def predict(self, df: Any) -> dict[str, list[float]]:
        assert list(df["ds"]) == [0, 1, 2, 3]
        return {"TimeMixer": [2 * df["y"].iloc[-1], 7.0, -3.0]}

    @classmethod
    def load(cls, path: str, verbose: bool) -> "Trained":
        if path != "saved":
            raise FileNotFoundError(path)
        return cls([TimeMixer(input_size=4)], 1)


class TimeMixer(SimpleNamespace):
    pass


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> type[Trained]:
    module: Any = ModuleType("neuralforecast")
    module.NeuralForecast, module.models = Trained, SimpleNamespace(TimeMixer=TimeMixer)
    monkeypatch.setitem(sys.modules, "neuralforecast", module)
    monkeypatch.setattr(neural.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(Trained, "num_fits", 0)
    monkeypatch.setattr(Trained, "fails", False)
    pytest.importorskip("pandas")
    return Trained


def test_without_the_library_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neural.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="'neural' needs neuralforecast") as raised:
        DEMAND.create("neural", {}, where="stack: demand")
    assert "rota[neural]" in (raised.value.hint or "")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"look_back_bins": 1}, "look_back_bins"),
        ({"train_after_bins": 9}, "train_after_bins"),
        ({"num_steps": 0}, "num_steps"),
    ],
)
def test_what_cannot_be_trained_is_refused(library: type[Trained], changed: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=f"{said} must be at least"):
        Neural(**{**SMALL, **changed})


def test_it_trains_when_there_is_enough_and_again_after_so_many(library: type[Trained]) -> None:
    predictor = Neural(**SMALL)
    history = [float(number) for number in range(12)]
    assert predictor.forecast(history[:11], 2) == [10.0, 10.0]
    assert library.num_fits == 0
    assert predictor.forecast(history, 5) == [22.0, 7.0, 0.0, 0.0, 0.0]
    for _ in range(5):
        assert library.num_fits == 1
        assert predictor.forecast(history, 1) == [22.0]
    assert predictor.forecast(history, 1) == [22.0]
    assert library.num_fits == 2
    once = Neural(**{**SMALL, "refit_every": 0})
    for _ in range(200):
        once.forecast(history, 1)
    assert library.num_fits == 3


def test_a_training_that_fails_is_told_and_the_network_of_before_goes_on(library: type[Trained]) -> None:
    predictor = Neural(**SMALL)
    history = [1.0] * 12
    library.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        predictor.forecast(history, 1)
    for _ in range(RETRY_EVERY):
        with pytest.raises(ValueError, match="could not be trained"):
            predictor.forecast(history, 1)
    assert library.num_fits == 1
    library.fails = False
    assert [predictor.forecast(history, 1) for _ in range(6)] == [[2.0]] * 6
    library.fails = True
    with pytest.raises(RuntimeError):
        predictor.forecast(history, 1)
    assert predictor.forecast(history, 1) == [2.0]


def test_a_network_that_was_trained_elsewhere_is_never_trained(library: type[Trained]) -> None:
    predictor = Neural(trained="saved")
    assert predictor.forecast([1.0] * 3, 1) == [1.0]
    assert predictor.forecast([3.0] * 9, 2) == [6.0, 7.0]
    assert library.num_fits == 0
    with pytest.raises(ConfigError, match="trained: elsewhere holds no network"):
        Neural(trained="elsewhere")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("neuralforecast") is None, reason="the extra neural is not installed")
def test_the_library_learns_a_season() -> None:
    season = [20.0 + 10.0 * math.sin(number / 24 * 2 * math.pi) for number in range(24 * 6)]
    predictor = Neural(train_after_bins=96, look_back_bins=48, horizon_bins=6, num_steps=100)
    told = predictor.forecast(season[:-6], 6)
    assert all(abs(a - b) < 5.0 for a, b in zip(told, season[-6:], strict=True)), told
