"""Refuse at the door when too much is unfinished already."""

from rota.base.errors import ConfigError
from rota.base.instant import seconds
from rota.serving.api import NOTHING, Admission, ClusterView, EngineCapabilities, Request
from rota.serving.policies.admission.drain_rate import DrainRate


class BoundedQueue:
    """Admit while fewer than `max_unfinished` requests are unfinished; refuse the rest with 503 and a time to come
    back.

    Rule: a bound on queued plus running requests, the plainest back-pressure there is. The bound keeps the router's
    memory and the wait of those inside finite. Good as a last line in front of any other policy. Starves nobody inside;
    under lasting overload it refuses by arrival alone, whatever the class or tenant.

    Retry-After is when the caller's own place is predicted to be free, by the completions of the last window
    (`DrainRate`). They are inferred from what was admitted and what is left, so that no event is needed.
    """

    requires: EngineCapabilities = NOTHING

    def __init__(self, *, max_unfinished: int = 4096, window_seconds: float = 10.0) -> None:
        """`max_unfinished` counts requests, `window_seconds` is positive. Raises `ConfigError` outside of that."""
        if max_unfinished < 1:
            raise ConfigError(f"bounded_queue: max_unfinished must be at least 1 request, not {max_unfinished}")
        if not window_seconds > 0:
            raise ConfigError(f"bounded_queue: window_seconds must be above 0, not {window_seconds}")
        self._max_unfinished = max_unfinished
        self._drain = DrainRate(seconds(window_seconds))
        self._num_unfinished = 0
        """As this policy knew it after the last request."""

    def admit(self, request: Request, cluster: ClusterView, num_unfinished: int) -> Admission:
        self._drain.ended(max(0, self._num_unfinished - num_unfinished))
        self._num_unfinished = num_unfinished
        if num_unfinished < self._max_unfinished:
            self._num_unfinished += 1
            self._drain.let_in(cluster.now)
            return Admission(True, f"{num_unfinished} of {self._max_unfinished} places taken")
        retry_after_seconds = self._drain.turned_away(cluster.now)
        return Admission(
            False,
            f"the server is overloaded: {num_unfinished} requests are unfinished and {self._max_unfinished} may be; "
            f"try again in {retry_after_seconds:.0f} s",
            503,
            retry_after_seconds,
        )
