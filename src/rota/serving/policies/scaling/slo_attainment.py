"""As few instances as keep the promises."""

import math
from collections import deque
from collections.abc import Sequence

from rota.base.errors import ConfigError
from rota.base.instant import Instant, seconds
from rota.serving.api import NOTHING, EngineCapabilities, FleetView, Heard, Outcome, Request, Start, Stop
from rota.serving.policies.scaling.sizing import Held, checked_above, num_coming, serving, starts, stops

_KEPT_MAX = 20_000


class SloAttainment:
    """Grow when fewer promises than `target` were kept within the last `window_seconds`; shrink when for
    `calm_seconds` so many were kept, with so much to spare that one instance less would have done.

    What is judged: the time to the first token, when it comes or as soon as it is late, and the time per token, at
    the end. A request's own SLO is its promise; where it has none, `ttft_seconds` and `tpot_seconds` are. A request
    that failed or was refused breaks its promise. Growing adds at least one, and more the more promises were
    broken; what is on its way is counted. To spare means that the slowest in a hundred took no more than `spare` of
    what was promised, times (N - 1) / N.

    Rule: the usual feedback on attainment (AIBrix, Dynamo's planner and others have such); all constants are ours.
    Good where the promises are what counts, since nothing else is looked at and nothing need be known of the
    engine. It acts when promises are broken already, and a start later. Starves nobody.
    """

    requires: EngineCapabilities = NOTHING

    def __init__(
        self,
        *,
        interval_seconds: float = 10.0,
        target: float = 0.99,
        ttft_seconds: float = 2.0,
        tpot_seconds: float = 0.1,
        window_seconds: float = 60.0,
        calm_seconds: float = 300.0,
        spare: float = 0.5,
    ) -> None:
        if not 0.0 < target < 1.0:
            raise ConfigError(f"target must be a share in (0, 1), not {target}")
        self.interval_seconds = checked_above("interval_seconds", interval_seconds, 0)
        self._target = target
        self._ttft = seconds(checked_above("ttft_seconds", ttft_seconds, 0))
        self._tpot = seconds(checked_above("tpot_seconds", tpot_seconds, 0))
        self._window = seconds(checked_above("window_seconds", window_seconds, 0))
        self._spare = checked_above("spare", spare, 0)
        self._is_calm = Held(calm_seconds, "calm_seconds")
        self._judged: deque[tuple[Instant, float]] = deque(maxlen=_KEPT_MAX)
        """When, and which share of what was promised it took; above 1 is a broken promise."""

    def plan(self, fleet: FleetView) -> Sequence[Start | Stop]:
        now = fleet.now
        self._judged.extend((now, share) for outcome in fleet.outcomes for share in self._shares(outcome))
        while self._judged and now - self._judged[0][0] > self._window:
            self._judged.popleft()
        # Those who are late and still wait: they are not judged yet, and will be when their token comes.
        num_late = sum(wait > self._ttft for wait in fleet.waits)
        shares = sorted([share for _, share in self._judged] + [math.inf] * num_late)
        if not shares:
            return self._shrink(fleet, 0.0, "nothing was promised") if self._is_calm.told(True, now) else ()
        kept = sum(share <= 1.0 for share in shares) / len(shares)
        slowest = shares[max(0, math.ceil(0.99 * len(shares)) - 1)]
        reason = f"{kept:.1%} of {len(shares):,} promises kept in {self._window // 10**9} s, to be {self._target:.1%}"
        if kept < self._target:
            self._is_calm.forget()
            step = max(1, math.ceil(len(serving(fleet)) * (self._target - kept)))
            return starts(min(max(0, step - len(fleet.starting)), fleet.max_instances - num_coming(fleet)), reason)
        is_calm = self._is_calm.told(slowest <= self._spare, now)
        return self._shrink(fleet, slowest, reason) if is_calm else ()

    def _shrink(self, fleet: FleetView, slowest: float, reason: str) -> Sequence[Start | Stop]:
        num = len(serving(fleet))
        if num <= fleet.min_instances or slowest > self._spare * (num - 1) / num:
            return ()
        self._is_calm.forget()
        return stops(fleet, 1, f"{reason}; the slowest took {slowest:.0%} of what was promised")

    def _shares(self, outcome: Outcome) -> Sequence[float]:
        if outcome.what is Heard.LOST:
            return (math.inf,)
        if outcome.took is None:
            return ()
        return (outcome.took / self._promised(outcome.request, outcome.what),)

    def _promised(self, request: Request, what: Heard) -> int:
        if what is Heard.FIRST_TOKEN:
            return request.slo.ttft or self._ttft
        return request.slo.tpot or self._tpot
