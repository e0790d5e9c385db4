"""As many instances as the requests of this moment need."""

import math
from collections.abc import Sequence
from typing import Literal

from rota.serving.api import NOTHING, EngineCapabilities, FleetView, Start, Stop
from rota.serving.policies.scaling.sizing import (
    Held,
    bounded,
    checked_above,
    num_coming,
    num_unfinished,
    serving,
    starts,
    stops,
)


class QueueReactive:
    """Keep one instance for every `target_requests` requests, counted now; grow when that has held for a while,
    shrink when it has held for much longer.

    Rule: Ray Serve's autoscaling on ongoing requests (`counts = "ongoing"`: running, waiting and held), and the one
    on `vllm:num_requests_waiting` that KEDA is usually given (`counts = "waiting"`). Published for Ray Serve: 2
    requests an instance, 30 s before it grows, 600 s before it shrinks. The 2 is for models that take one request
    at a time; for an engine that batches, set it to what one sustains within its targets (`rota size`).

    Good as a baseline, and where demand changes slowly against the time that a start takes. A queue is seen only
    when it is there, so each rise is paid for by those who come during a start. Counting only those who wait sees
    nothing of an instance that is full and keeps up, so it shrinks too far. Starves nobody.
    """

    requires: EngineCapabilities = NOTHING

    def __init__(
        self,
        *,
        interval_seconds: float = 10.0,
        target_requests: float = 2.0,
        upscale_delay_seconds: float = 30.0,
        downscale_delay_seconds: float = 600.0,
        counts: Literal["ongoing", "waiting"] = "ongoing",
    ) -> None:
        self.interval_seconds = checked_above("interval_seconds", interval_seconds, 0)
        self._target = checked_above("target_requests", target_requests, 0)
        self._counts = counts
        self._is_short = Held(upscale_delay_seconds, "upscale_delay_seconds")
        self._is_ample = Held(downscale_delay_seconds, "downscale_delay_seconds")

    def plan(self, fleet: FleetView) -> Sequence[Start | Stop]:
        if self._counts == "ongoing":
            num_requests = num_unfinished(fleet)
        else:
            num_requests = sum(view.num_waiting for view in serving(fleet)) + fleet.num_held
        wanted = bounded(math.ceil(num_requests / self._target), fleet)
        num_now = num_coming(fleet)
        reason = f"{num_requests} {self._counts} requests want {wanted} instances at {self._target:g} each"
        grows = self._is_short.told(wanted > num_now, fleet.now)
        shrinks = self._is_ample.told(wanted < num_now, fleet.now)
        if grows:
            return starts(wanted - num_now, reason)
        return stops(fleet, num_now - wanted, reason) if shrinks else ()
