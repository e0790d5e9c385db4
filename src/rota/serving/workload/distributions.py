"""Distributions as a description states them: by quantiles, with straight lines in between."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from math import erf, nan, sqrt
from typing import TypeVar

import msgspec

from rota.base.random_streams import Stream
from rota.serving.workload.arrivals import MAX_TOKENS

MAX_AMOUNT = 1e9
"""Largest of a distribution of numbers: thirty years, if it is of seconds."""


class Lengths(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A distribution of whole numbers by its quantiles: `{"0" = 16, "0.5" = 512, "0.9" = 2048, "1" = 4096}`.

    Quantiles 0 and 1 must be given; lengths are at least 1 and do not fall.
    """

    quantiles: dict[str, int]

    def __post_init__(self) -> None:
        values = [value for _, value in self.points()]
        check(values[0] >= 1, "quantiles", "of lengths of at least 1", values[0])
        check(values[-1] <= MAX_TOKENS, "quantiles", f"of lengths of at most {MAX_TOKENS}", values[-1])
        check(values == sorted(values), "quantiles", "of lengths that do not fall", values)

    def points(self) -> list[tuple[float, int]]:
        """The quantiles as numbers, in order."""
        return sorted(_places(self.quantiles))


class Amounts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A distribution of numbers that are not negative, by its quantiles; as `Lengths` otherwise."""

    quantiles: dict[str, float]

    def __post_init__(self) -> None:
        values = [value for _, value in self.points()]
        check(values[0] >= 0, "quantiles", "of numbers that are not negative", values[0])
        check(values[-1] <= MAX_AMOUNT, "quantiles", f"of numbers of at most {MAX_AMOUNT:g}", values[-1])
        check(values == sorted(values), "quantiles", "of numbers that do not fall", values)

    def points(self) -> list[tuple[float, float]]:
        """The quantiles as numbers, in order."""
        return sorted(_places(self.quantiles))


class QuantileSampler:
    """Draws from a piecewise-linear inverse distribution function."""

    def __init__(self, distribution: Lengths | Amounts) -> None:
        self._points: Sequence[tuple[float, float]] = distribution.points()
        self._at = [at for at, _ in self._points]

    def value(self, at: float) -> float:
        """The value that a share `at`, below 1, does not exceed."""
        # The quantile at 1 closes the last interval.
        right = bisect_right(self._at, at)
        (low, below), (high, above) = self._points[right - 1], self._points[right]
        return below + (above - below) * (at - low) / (high - low)

    def draw(self, stream: Stream) -> int:
        """One whole number."""
        return round(self.value(stream.random()))

    @property
    def mean(self) -> float:
        """Of the distribution, exactly."""
        pairs = zip(self._points, self._points[1:], strict=False)
        return sum((high - low) * (below + above) / 2 for (low, below), (high, above) in pairs)


def share_below(z: float) -> float:
    """The share of a standard normal distribution below `z`, kept below 1 as a random draw is."""
    return min(0.5 * (1.0 + erf(z / sqrt(2.0))), 1.0 - 2**-53)


def check(holds: bool, name: str, expected: str, got: object) -> None:
    """Raise ValueError for a field out of range; `rota.base.config` turns it into an error with its line."""
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {got!r}")


Number = TypeVar("Number", int, float)


def _places(quantiles: Mapping[str, Number]) -> list[tuple[float, Number]]:
    places = []
    for text, value in quantiles.items():
        try:
            at = float(text)
        except ValueError:
            at = nan
        check(0 <= at <= 1, "quantiles", "keyed by numbers from 0 to 1", text)
        places.append((at, value))
    keys = sorted(at for at, _ in places)
    check(bool(keys) and keys[0] == 0 and keys[-1] == 1, "quantiles", "given at 0 and at 1", list(quantiles))
    check(len(set(keys)) == len(keys), "quantiles", "given once each", list(quantiles))
    return places
