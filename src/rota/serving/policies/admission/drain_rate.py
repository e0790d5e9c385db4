"""How fast places come free, and so when somebody who is turned away should ask again."""

from rota.base.instant import Duration, Instant, to_seconds

RETRY_AFTER_SECONDS_MIN = 1.0
RETRY_AFTER_SECONDS_MAX = 60.0


class DrainRate:
    """Ends per second over the last full window, or over what there is of the first one.

    Whoever is turned away is told when his own place is predicted to be free: the k-th in a row, when k places
    will be. So those who come back do not all come at once."""

    __slots__ = ("_began_at", "_num_ended", "_num_turned_away", "_per_second", "_window")

    def __init__(self, window: Duration) -> None:
        self._window = window
        self._began_at: Instant | None = None
        self._num_ended = 0
        self._num_turned_away = 0
        self._per_second = 0.0

    def ended(self, count: int = 1) -> None:
        """So many places came free."""
        self._num_ended += count

    def let_in(self, now: Instant) -> None:
        """Somebody was: there are places again."""
        self._num_turned_away = 0
        self._roll(now)

    def turned_away(self, now: Instant) -> float:
        """Somebody was. Seconds until his place is free, from 1 to 60; 60 while nothing has ended."""
        self._num_turned_away += 1
        self._roll(now)
        elapsed = to_seconds(Duration(now - self._began_at)) if self._began_at is not None else 0.0
        per_second = self._per_second or (self._num_ended / elapsed if elapsed > 0 else 0.0)
        wanted = self._num_turned_away / per_second if per_second > 0 else RETRY_AFTER_SECONDS_MAX
        return min(RETRY_AFTER_SECONDS_MAX, max(RETRY_AFTER_SECONDS_MIN, wanted))

    def _roll(self, now: Instant) -> None:
        if self._began_at is None:
            self._began_at = now
        elif now - self._began_at >= self._window:
            self._per_second = self._num_ended / to_seconds(Duration(now - self._began_at))
            self._began_at, self._num_ended = now, 0
