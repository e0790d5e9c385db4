"""Nothing is moved."""

from collections.abc import Sequence, Set

from rota.serving.api import NOTHING, ClusterView, EngineCapabilities, Move, RequestId


class NoneMoved:
    """Every request ends where it began. Never asked."""

    requires: EngineCapabilities = NOTHING
    interval_seconds = 0.0

    def plan(self, cluster: ClusterView, moving: Set[RequestId]) -> Sequence[Move]:
        return ()
