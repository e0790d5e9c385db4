"""A circuit breaker: an instance whose requests fail one after the other gets none for a while, though its probes are
well. After a pause it is tried again; the first failure then opens the breaker for twice as long."""

from collections import deque

import msgspec

from rota.base.instant import Duration, Instant, after, seconds


class BreakerRule(msgspec.Struct, frozen=True):
    """When an instance is taken out, and for how long."""

    num_failures: int = 5
    """Failed attempts within the window."""
    window_seconds: float = 10.0
    first_pause_seconds: float = 1.0
    factor: float = 2.0
    pause_max_seconds: float = 60.0


class CircuitBreaker:
    """The breaker of one instance. Told of failures and ends; asked whether a pause is over."""

    def __init__(self, rule: BreakerRule) -> None:
        self._rule = rule
        self._failed_at: deque[Instant] = deque(maxlen=rule.num_failures)
        self._num_pauses = 0
        self.open_until: Instant | None = None
        """While it is open: when the instance is to be tried again."""

    def failed(self, now: Instant) -> bool:
        """An attempt failed. Whether the instance should get nothing more for a while."""
        self._failed_at.append(now)
        since = now - seconds(self._rule.window_seconds)
        num_recent = sum(at >= since for at in self._failed_at)
        return self.open_until is None and num_recent >= (1 if self._num_pauses else self._rule.num_failures)

    def open(self, now: Instant) -> Duration:
        """Take the instance out; for how long."""
        rule = self._rule
        pause = seconds(min(rule.first_pause_seconds * rule.factor**self._num_pauses, rule.pause_max_seconds))
        self._num_pauses += 1
        self.open_until = after(now, pause)
        return pause

    def try_again(self) -> None:
        """The pause is over."""
        self.open_until = None
        self._failed_at.clear()

    def ended_well(self) -> None:
        """A request ended well: what was before is forgiven."""
        if self.open_until is None:
            self._num_pauses = 0
