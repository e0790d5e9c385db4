"""Nobody starts or stops instances."""

from collections.abc import Sequence

from rota.serving.api import NOTHING, EngineCapabilities, FleetView, Start, Stop


class NoneStarted:
    """There are the instances that the host has. Never asked."""

    requires: EngineCapabilities = NOTHING
    interval_seconds = 0.0

    def plan(self, fleet: FleetView) -> Sequence[Start | Stop]:
        return ()
