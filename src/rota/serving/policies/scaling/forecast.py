"""As many instances as the demand will need by the time that one could be there."""

import math
from collections import deque
from collections.abc import Sequence

from rota.base.instant import Instant, seconds
from rota.serving.api import NOTHING, DemandPredictor, EngineCapabilities, FleetView, Start, Stop
from rota.serving.policies.scaling.sizing import Held, bounded, checked_above, num_coming, starts, stops


class Forecast:
    """Count the requests that arrive in each `bin_seconds`; forecast the bins until a start that is ordered now
    would be over, and the next one; keep as many instances as the largest of them needs, at `rate_per_instance`
    requests a second each. Never fewer than what came in the last bin needs.

    How long a start takes is what the host says of the quickest way that it has (spare, page cache, cold), so the
    forecast looks as far ahead as it must and no further; `start_up_seconds` where the host does not say.

    The predictor is the stack's `demand` (Holt-Winters by default). **When it errs**, or answers with what is no
    demand, the last good forecast is gone on with, as far as it reaches, and after that the last bin; the reason
    says so. Dynamo's planner and Seagull do likewise.

    `rate_per_instance` has no default that could be right: `rota size` finds what one instance sustains within its
    targets. Ours: `headroom`, `shrink_after_seconds`. Good where demand repeats itself, or moves slower than twice
    the start-up time; useless against bursts, which no history tells of: then it is the last bin, and late by a
    start. It is blind to how long requests are. Starves nobody.
    """

    requires: EngineCapabilities = NOTHING

    def __init__(
        self,
        *,
        predictor: DemandPredictor,
        rate_per_instance: float,
        interval_seconds: float = 10.0,
        bin_seconds: float = 60.0,
        num_bins: int = 4320,
        headroom: float = 1.1,
        start_up_seconds: float = 100.0,
        shrink_after_seconds: float = 300.0,
    ) -> None:
        """`num_bins` of history are kept: three days of minutes."""
        self.interval_seconds = checked_above("interval_seconds", interval_seconds, 0)
        self._predictor = predictor
        self._rate = checked_above("rate_per_instance", rate_per_instance, 0)
        self._bin_seconds = checked_above("bin_seconds", bin_seconds, 0)
        self._headroom = checked_above("headroom", headroom, 0)
        self._start_up = seconds(checked_above("start_up_seconds", start_up_seconds, 0))
        self._is_ample = Held(shrink_after_seconds, "shrink_after_seconds")
        self._history: deque[float] = deque(maxlen=int(checked_above("num_bins", num_bins, 1)))
        self._bin_ends_at: Instant | None = None
        self._num_arrived_before = 0
        self._good: Sequence[float] = ()
        """The last good forecast, from the bin on that is under way."""
        self._failed = ""

    def plan(self, fleet: FleetView) -> Sequence[Start | Stop]:
        num_ahead = 2 + math.ceil(self._lead(fleet) / seconds(self._bin_seconds))
        if self._take_bins(fleet):
            self._look_ahead(num_ahead)
        last = self._history[-1] if self._history else 0.0
        ahead = max(self._good[:num_ahead], default=last)
        demand = max(last, ahead) / self._bin_seconds * self._headroom
        wanted = bounded(math.ceil(demand / self._rate), fleet)
        num_now = num_coming(fleet)
        reason = f"{demand:.2f} requests a second are expected{self._failed}, which {wanted} instances sustain"
        shrinks = self._is_ample.told(wanted < num_now, fleet.now)
        if wanted > num_now:
            return starts(wanted - num_now, reason)
        return stops(fleet, num_now - wanted, reason) if shrinks else ()

    def _lead(self, fleet: FleetView) -> int:
        """Nanoseconds until what is ordered now serves, and is looked at again."""
        start_up = fleet.offers[0].start_up if fleet.offers else self._start_up
        return start_up + seconds(self.interval_seconds)

    def _take_bins(self, fleet: FleetView) -> int:
        """Add the bins that are over to the history; returns how many."""
        num_arrived = fleet.totals.num_arrived
        if self._bin_ends_at is None:
            self._bin_ends_at = Instant(fleet.now + seconds(self._bin_seconds))
            self._num_arrived_before = num_arrived
            return 0
        num_over = (fleet.now - self._bin_ends_at) // seconds(self._bin_seconds) + 1
        if num_over <= 0:
            return 0
        num_new = num_arrived - self._num_arrived_before
        self._history.extend([num_new / num_over] * min(num_over, self._history.maxlen or num_over))
        self._num_arrived_before = num_arrived
        self._bin_ends_at = Instant(self._bin_ends_at + num_over * seconds(self._bin_seconds))
        self._good = self._good[num_over:]
        return num_over

    def _look_ahead(self, num_ahead: int) -> None:
        # Further than is needed now, so that a predictor that errs next time can be gone on without.
        try:
            told = [float(value) for value in self._predictor.forecast(tuple(self._history), 4 * num_ahead)]
        except Exception as error:
            self._failed = f" (the predictor failed: {error}; its last good forecast goes on)"
            return
        if not told or not all(0.0 <= value < math.inf for value in told):
            self._failed = " (the predictor told no demand; its last good forecast goes on)"
            return
        self._good, self._failed = told, ""
