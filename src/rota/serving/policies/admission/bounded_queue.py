"""Refuse at the door when too much is unfinished already."""

from rota.base.errors import ConfigError
from rota.base.instant import Instant, seconds, to_seconds
from rota.serving.api import NOTHING, Admission, ClusterView, EngineCapabilities, Request
from rota.serving.policies.admission.drain_rate import RETRY_AFTER_SECONDS_MAX, RETRY_AFTER_SECONDS_MIN


class BoundedQueue:
    """Admit while fewer than `max_unfinished` requests are unfinished; refuse the rest with 503 and a time to come
    back.

    Rule: a bound on queued plus running requests, the plainest back-pressure there is. The bound keeps the router's
    memory and the wait of those inside finite. Good as a last line in front of any other policy. Starves nobody inside;
    under lasting overload it refuses by arrival alone, whatever the class or tenant.

    Retry-After is the time in which a tenth of the places come free at the completion rate of the last full window
    (about 10 s between two looks), between 1 and 60 seconds; 1 before the first window is over. Completions are
    inferred from what was admitted and what is left, so that no event is needed.
    """

    requires: EngineCapabilities = NOTHING

    def __init__(self, *, max_unfinished: int = 4096, window_seconds: float = 10.0) -> None:
        """`max_unfinished` counts requests, `window_seconds` is positive. Raises `ConfigError` outside of that."""
        if max_unfinished < 1:
            raise ConfigError(f"bounded_queue: max_unfinished must be at least 1 request, not {max_unfinished}")
        if not window_seconds > 0:
            raise ConfigError(f"bounded_queue: window_seconds must be above 0, not {window_seconds}")
        self._max_unfinished = max_unfinished
        self._window = seconds(window_seconds)
        self._window_began_at: Instant | None = None
        self._num_unfinished_at_begin = 0
        self._num_admitted_in_window = 0
        self._retry_after_seconds = RETRY_AFTER_SECONDS_MIN

    def admit(self, request: Request, cluster: ClusterView, num_unfinished: int) -> Admission:
        self._watch_completions(cluster.now, num_unfinished)
        if num_unfinished < self._max_unfinished:
            self._num_admitted_in_window += 1
            return Admission(True, f"{num_unfinished} of {self._max_unfinished} places taken")
        return Admission(
            False,
            f"the server is overloaded: {num_unfinished} requests are unfinished and {self._max_unfinished} may be; "
            f"try again in {self._retry_after_seconds:.0f} s",
            503,
            self._retry_after_seconds,
        )

    def _watch_completions(self, now: Instant, num_unfinished: int) -> None:
        began_at = self._window_began_at
        if began_at is not None:
            if now - began_at < self._window:
                return
            num_completed = self._num_unfinished_at_begin + self._num_admitted_in_window - num_unfinished
            wanted = max(1.0, self._max_unfinished / 10)
            estimate = wanted * to_seconds(now - began_at) / num_completed if num_completed > 0 else float("inf")
            self._retry_after_seconds = min(RETRY_AFTER_SECONDS_MAX, max(RETRY_AFTER_SECONDS_MIN, estimate))
        self._window_began_at = now
        self._num_unfinished_at_begin = num_unfinished
        self._num_admitted_in_window = 0
