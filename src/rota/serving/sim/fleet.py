"""Instances that come and go in virtual time: how long a start takes by its source, and what may go wrong with it."""

from collections.abc import Callable
from dataclasses import dataclass

from rota.base.instant import Duration, Instant, after, seconds
from rota.runtime.faults import FaultPlan
from rota.runtime.simulation import SimulationLoop
from rota.serving.assemble import CLUSTER
from rota.serving.model.commands import StartInstance, StopInstance
from rota.serving.model.events import InstanceStopped, ScalingDue, StartFailed
from rota.serving.model.fleet import StartOffer, StartSource
from rota.serving.model.instance import InstanceId

FLEET = "fleet"
"""What a fault names as its target that befalls whoever is starting."""

FLEET_FAULTS = ("start_fails", "start_slow")
"""While it holds at `FLEET`, an instance that is ordered never gets ready, or takes `magnitude` times as long."""

RANK_FLEET = 4


@dataclass(frozen=True, slots=True)
class StartUp:
    """How long a start takes. vLLM's own account of its sleep mode (October 2025) has 30 to 100 s and more for starting
    a model anew, and 0.1 to 6 s for waking one up whose process stayed; the defaults are the ends of those, and within
    the second."""

    cold: Duration = seconds(100)
    page_cache: Duration = seconds(30)
    spare: Duration = seconds(1)
    num_spares: int = 0
    """Spare processes that are kept ready; one that is used is replaced, which takes as long as any other start. Each
    is paid for like an instance, whether it is used or not."""
    num_cached: int = 0
    """Places that have the weights in memory at the beginning. An instance that stops leaves one behind."""
    told_wrong: Duration = Duration(0)
    """Added to what the router is told of every start, so that what a wrong belief costs can be measured."""


class SimulatedFleet:
    """Carries out what the router orders of its fleet, and tells it regularly that it is time to look."""

    def __init__(
        self,
        loop: SimulationLoop,
        scale_every: Duration,
        start_up: StartUp,
        faults: FaultPlan,
        *,
        bring_up: Callable[[InstanceId], None],
        take_down: Callable[[InstanceId], None],
    ) -> None:
        """`bring_up` makes an instance ready and says so; `take_down` ends one, which may be down already."""
        self._loop = loop
        self._scale_every = scale_every
        self._start_up = start_up
        self._faults = faults
        self._bring_up = bring_up
        self._take_down = take_down
        self._starting: dict[InstanceId, int] = {}
        self._stopped: set[InstanceId] = set()
        self._num_spares = start_up.num_spares
        self._num_cached = start_up.num_cached

    def begin(self) -> None:
        """Have the router look at its fleet in regular intervals; a run does not go on for that alone."""

        def look(now: Instant) -> None:
            self._loop.deliver(CLUSTER, ScalingDue(self.offers()))
            self.begin()

        self._loop.call_at(after(self._loop.now, self._scale_every), look, RANK_FLEET, background=True)

    def offers(self) -> tuple[StartOffer, ...]:
        """How an instance could be started now, as the router is told."""
        stock = ((StartSource.SPARE, self._num_spares), (StartSource.PAGE_CACHE, self._num_cached))
        told = [StartOffer(source, self._told(source), num) for source, num in stock if num]
        return (*told, StartOffer(StartSource.COLD, self._told(StartSource.COLD)))

    def is_stopped(self, instance_id: InstanceId) -> bool:
        """Whether an instance was told to stop, so that it is not started again after a crash."""
        return instance_id in self._stopped

    def start(self, order: StartInstance, now: Instant) -> None:
        """Start an instance, from the source that was named or the next best."""
        lasts = self._lasts(self._take(order.source))
        slow = self._faults.active("start_slow", FLEET, now)
        if slow is not None:
            lasts = Duration(round(lasts * slow.magnitude))
        fails = self._faults.active("start_fails", FLEET, now) is not None
        instance_id = order.instance_id

        def ready(later: Instant) -> None:
            del self._starting[instance_id]
            if fails:
                self._loop.deliver(CLUSTER, StartFailed(instance_id, "it ended before it was ready"))
            else:
                self._bring_up(instance_id)

        self._starting[instance_id] = self._call(after(now, lasts), ready)

    def stop(self, order: StopInstance, now: Instant) -> None:
        """Stop an instance, whether it starts, runs or is down; its weights stay in memory where it was. What is under
        way in this instant ends first: the last token of the last request may be on its way out."""
        instance_id = order.instance_id
        self._stopped.add(instance_id)
        handle = self._starting.pop(instance_id, None)
        if handle is not None:
            self._loop.cancel(handle)

        def stopped(later: Instant) -> None:
            self._take_down(instance_id)
            self._num_cached += 1
            self._loop.deliver(CLUSTER, InstanceStopped(instance_id))

        self._call(now, stopped)

    def crash(self, instance_id: InstanceId) -> None:
        """An instance dies that does not run: if it was starting, that has failed."""
        handle = self._starting.pop(instance_id, None)
        if handle is not None:
            self._loop.cancel(handle)
            self._loop.deliver(CLUSTER, StartFailed(instance_id, "it died while it started"))

    def _take(self, source: StartSource) -> StartSource:
        if source == StartSource.SPARE and self._num_spares:
            self._num_spares -= 1
            self._call(after(self._loop.now, self._lasts(self._take(StartSource.PAGE_CACHE))), self._spare_is_ready)
            return source
        if source != StartSource.COLD and self._num_cached:
            self._num_cached -= 1
            return StartSource.PAGE_CACHE
        return StartSource.COLD

    def _spare_is_ready(self, now: Instant) -> None:
        self._num_spares += 1

    def _lasts(self, source: StartSource) -> Duration:
        return Duration(getattr(self._start_up, source))

    def _told(self, source: StartSource) -> Duration:
        return Duration(max(0, self._lasts(source) + self._start_up.told_wrong))

    def _call(self, at: Instant, function: Callable[[Instant], None]) -> int:
        return self._loop.call_at(at, function, RANK_FLEET, background=True)
