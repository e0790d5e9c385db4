"""Tokens per minute, exact in integers."""

from rota.base.instant import NANOSECONDS_PER_SECOND, Duration, Instant

_MINUTE = 60 * NANOSECONDS_PER_SECOND


class TokenBucket:
    """Holds what a minute brings, at most; full at first. What is taken in advance makes it negative, and is paid back
    by the time that passes, so whoever takes after that waits longer.

    The level is counted in tokens × nanoseconds of a minute: `rate` of them come each nanosecond, and nothing is
    ever rounded."""

    __slots__ = ("_at", "_level", "rate")

    def __init__(self, tokens_per_minute: int, now: Instant) -> None:
        self.rate = tokens_per_minute
        self._level = tokens_per_minute * _MINUTE
        self._at = now

    def is_full(self, now: Instant) -> bool:
        self._fill(now)
        return self._level == self.rate * _MINUTE

    def wait(self, num_tokens: int, now: Instant) -> Duration:
        """From now until so many tokens may be taken, 0 for at once. Never for more than `rate` tokens: ask that
        first."""
        self._fill(now)
        return Duration(max(0, -((self._level - num_tokens * _MINUTE) // self.rate)))

    def take(self, num_tokens: int) -> None:
        self._level -= num_tokens * _MINUTE

    def give_back(self, num_tokens: int) -> None:
        """So many of those taken were not used."""
        self._level = min(self._level + num_tokens * _MINUTE, self.rate * _MINUTE)

    def _fill(self, now: Instant) -> None:
        self._level = min(self._level + (now - self._at) * self.rate, self.rate * _MINUTE)
        self._at = now
