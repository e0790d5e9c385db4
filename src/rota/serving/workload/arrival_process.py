"""When open rows come: how many a second, how bursty, and how the rate moves."""

from collections.abc import Iterator
from itertools import cycle

import msgspec

from rota.base.random_streams import Stream
from rota.serving.workload.distributions import MAX_AMOUNT, Amounts, Lengths, QuantileSampler, check


class RateWindows(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the rate moves: in each window of `seconds`, it is `weights` times the process's rate. After the last window
    comes the first again."""

    seconds: float
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        check(0.001 <= self.seconds <= MAX_AMOUNT, "seconds", f"from 0.001 to {MAX_AMOUNT:g}", self.seconds)
        is_fit = bool(self.weights) and min(self.weights) >= 0 and 1e-9 <= max(self.weights) <= MAX_AMOUNT
        check(is_fit, "weights", "numbers of which none is negative and one is positive", list(self.weights)[:8])


class ArrivalProcess(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests a second and how bursty: gamma-distributed gaps with coefficient of variation `cv`, 1 being Poisson; or
    gaps of the shape `gaps`, scaled to the rate. With `batch`, so many come at one instant, and the gaps are between
    batches. With `windows` the rate moves, and gaps are stretched with it."""

    rate: float
    cv: float = 1.0
    gaps: Amounts | None = None
    batch: Lengths | None = None
    windows: RateWindows | None = None

    def __post_init__(self) -> None:
        check(1e-9 <= self.rate <= MAX_AMOUNT, "rate", f"positive, from 1e-9 to {MAX_AMOUNT:g}", self.rate)
        check(0.01 <= self.cv <= 100, "cv", "from 0.01 to 100", self.cv)
        if self.gaps is not None:
            check(QuantileSampler(self.gaps).mean >= 1e-9, "gaps", "positive in the mean", 0)

    def instants(self, stream: Stream) -> Iterator[float]:
        """Seconds at which rows come, without end."""
        sizes = None if self.batch is None else QuantileSampler(self.batch)
        gaps = self._gaps(stream, 1.0 if sizes is None else sizes.mean)
        instants = self._steady(gaps) if self.windows is None else self._moving(gaps, self.windows)
        if sizes is None:
            return instants
        return (at for at in instants for _ in range(sizes.draw(stream)))

    def _gaps(self, stream: Stream, mean_size: float) -> Iterator[float]:
        """Gaps in seconds at a steady rate."""
        mean = mean_size / self.rate
        if self.gaps is None:
            # A gamma distribution has cv = 1 / sqrt(shape); the scale then sets the mean.
            shape = 1.0 / self.cv**2
            while True:
                yield stream.gamma(shape, mean / shape)
        sampler = QuantileSampler(self.gaps)
        unit = mean / sampler.mean
        while True:
            yield sampler.value(stream.random()) * unit

    def _steady(self, gaps: Iterator[float]) -> Iterator[float]:
        at = 0.0
        for gap in gaps:
            at += gap
            yield at

    def _moving(self, gaps: Iterator[float], windows: RateWindows) -> Iterator[float]:
        # A gap of the steady process is used up `weight` times as fast as time goes by.
        weights = cycle(windows.weights)
        begins, weight, at = 0.0, next(weights), 0.0
        lap = windows.seconds * len(windows.weights)
        per_lap = windows.seconds * sum(windows.weights)
        for gap in gaps:
            if gap > per_lap:  # whole laps at once: a gap may be longer than any number of windows
                num_laps = gap // per_lap
                gap -= num_laps * per_lap
                begins, at = begins + num_laps * lap, at + num_laps * lap
            while gap > (left := (begins + windows.seconds - at) * weight):
                gap -= left
                begins += windows.seconds
                at, weight = begins, next(weights)
            if weight:
                at += gap / weight
            yield at
