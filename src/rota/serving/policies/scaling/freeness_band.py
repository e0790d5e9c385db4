"""Keep the mean freeness of the fleet within a band."""

from collections.abc import Sequence

from rota.base.errors import ConfigError
from rota.serving.api import NOTHING, EngineCapabilities, FleetView, InstanceView, Start, Stop
from rota.serving.policies.freeness import HIGH_LOAD_TARGET, Freeness
from rota.serving.policies.scaling.sizing import Held, checked_above, serving, starts, stops


class FreenessBand:
    """One more instance when the mean freeness (`rota.serving.policies.freeness`: decode steps that the batches can
    grow) was below the band for a while; one less, the one with the fewest requests, when it was above.

    Rule: Llumnix (OSDI 2024). The paper does not say which band; its code has 10 and 60 blocks, which are 160 and
    960 steps for blocks of 16 tokens, and looks every 10 s. Ours: how long it must hold (10 s below, 60 s above),
    that nothing is ordered while as much is on its way as is missing, and that nobody goes if those who stay would
    be below the band with what it has: without that the fleet would go to and fro between N and N - 1 for small N.

    Good where memory is what runs out: it sees long requests pile up before anybody waits. It does not see
    computing that runs out, so a fleet whose prompts are long and whose answers are short grows late; and the head
    of each queue is all that it sees of those who wait, unless `whole_queue`. Starves nobody.
    """

    requires: EngineCapabilities = NOTHING
    reads_sequences = True

    def __init__(
        self,
        *,
        interval_seconds: float = 10.0,
        min_steps: float = 160.0,
        max_steps: float = 960.0,
        below_seconds: float = 10.0,
        above_seconds: float = 60.0,
        whole_queue: bool = False,
        high_priority_max: int = -1,
        high_load_target: float = HIGH_LOAD_TARGET,
    ) -> None:
        if not min_steps < max_steps:
            raise ConfigError(f"min_steps ({min_steps:g}) must be below max_steps ({max_steps:g})")
        self.interval_seconds = checked_above("interval_seconds", interval_seconds, 0)
        self._min, self._max = min_steps, max_steps
        self._freeness = Freeness(
            high_priority_max=high_priority_max, high_load_target=high_load_target, whole_queue=whole_queue
        )
        self._is_below = Held(below_seconds, "below_seconds")
        self._is_above = Held(above_seconds, "above_seconds")

    def plan(self, fleet: FleetView) -> Sequence[Start | Stop]:
        views = serving(fleet)
        self._freeness.forget_others(fleet.instances)
        if not views:
            return starts(1, "none serves") if fleet.num_held and not fleet.starting else ()
        mean = sum(self._freeness.of(view) for view in views) / len(views)
        reason = f"a mean freeness of {mean:,.0f} steps, to be kept within {self._min:g} and {self._max:g}"
        is_below = mean < self._min or fleet.num_held > 0
        grows = self._is_below.told(is_below and not fleet.starting, fleet.now)
        shrinks = self._is_above.told(mean > self._max and not fleet.num_held, fleet.now)
        if grows:
            self._is_below.forget()
            return starts(1, reason)
        if shrinks and len(views) > 1 and self._would_do(views):
            self._is_above.forget()
            return stops(fleet, 1, reason)
        return ()

    def _would_do(self, views: Sequence[InstanceView]) -> bool:
        """Whether one less would still be within the band, had it all that there is now."""
        loads = [self._freeness.load(view) for view in views]
        num_free = sum(load.num_free_tokens for load in loads) - max(load.num_tokens_max for load in loads)
        num_requests = sum(load.num_requests for load in loads)
        return num_free / max(num_requests, len(views) - 1) >= self._min
