"""What the controls of `scaling.py` decide by: anything but the demand."""

from collections.abc import Sequence
from random import Random

from rota.base.instant import Instant, seconds
from rota.serving.api import NOTHING, EngineCapabilities, FleetView, Start, Stop
from rota.serving.policies.scaling.sizing import bounded, num_coming, starts, stops
from rota.serving.predictors.demand.holt_winters import HoltWinters


class SizesByMinute:
    """The fleet has the sizes that it is told, a minute each, whatever arrives."""

    requires: EngineCapabilities = NOTHING

    def __init__(self, *, sizes: Sequence[int], interval_seconds: float = 10.0) -> None:
        self.interval_seconds = interval_seconds
        self._sizes = sizes

    def plan(self, fleet: FleetView) -> Sequence[Start | Stop]:
        minute = (fleet.now - Instant(0)) // seconds(60)
        wanted = bounded(self._sizes[min(minute, len(self._sizes) - 1)], fleet)
        num_now = num_coming(fleet)
        reason = f"minute {minute} has {wanted} instances"
        return starts(wanted - num_now, reason) if wanted > num_now else stops(fleet, num_now - wanted, reason)


class Shuffled:
    """Holt-Winters, told the history in a random order: how much there was, and not when."""

    def __init__(self, *, season_bins: int, seed: int = 1) -> None:
        self._inner = HoltWinters(season_bins=season_bins)
        self._random = Random(seed)

    def forecast(self, history: Sequence[float], num_ahead: int) -> Sequence[float]:
        known = list(history)
        self._random.shuffle(known)
        return self._inner.forecast(known, num_ahead)
