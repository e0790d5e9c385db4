"""Durations of a run in bounded space: exact for as long as there are few, in fine buckets from then on."""

from array import array
from math import log

from rota.base.instant import NANOSECONDS_PER_MILLISECOND
from rota.serving.metrics.definitions import Distribution, distribution_ms

EXACT_MAX = 200_000
"""Durations that are kept one by one, 8 bytes each."""
RELATIVE_ERROR = 0.001
"""Of a percentile, once there are more: half the width of a bucket. Means stay exact."""

_LOG_WIDTH = log(1 + 2 * RELATIVE_ERROR)


class Latencies:
    """Durations in nanoseconds, as they come. A bucket takes some 100 bytes; a run has a few thousand."""

    __slots__ = ("_buckets", "_count", "_sum", "_values")

    def __init__(self) -> None:
        self._values: array[int] | None = array("q")
        self._buckets: dict[int, int] = {}
        self._count = 0
        self._sum = 0

    def add(self, duration: int) -> None:
        """Take one more, at least 0."""
        if self._values is not None:
            self._values.append(duration)
            if len(self._values) > EXACT_MAX:
                values, self._values = self._values, None
                for value in values:
                    self._put(value)
        else:
            self._put(duration)

    def distribution_ms(self) -> Distribution:
        """Mean and percentiles of all so far, in milliseconds."""
        if self._values is not None:
            return distribution_ms(self._values)
        mean = self._sum / self._count / NANOSECONDS_PER_MILLISECOND
        return Distribution(mean, *[self._percentile(share) for share in (0.50, 0.90, 0.99)])

    def _put(self, duration: int) -> None:
        bucket = int(log(duration) / _LOG_WIDTH) if duration > 0 else -1
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1
        self._count += 1
        self._sum += duration

    def _percentile(self, share: float) -> float:
        rank = share * (self._count - 1)
        num_below = 0
        for bucket in sorted(self._buckets):
            num_below += self._buckets[bucket]
            if num_below > rank:
                break
        middle = (1 + 2 * RELATIVE_ERROR) ** (bucket + 0.5) if bucket >= 0 else 0.0
        return middle / NANOSECONDS_PER_MILLISECOND
