"""Watches one engine: tells the cluster when it becomes ready, when it is lost, and how loaded it says it is."""

import asyncio

import msgspec

from rota.base.errors import EngineError
from rota.base.instant import Duration
from rota.serving.engines.engine import Engine
from rota.serving.live.cluster import LiveCluster


class WatchSettings(msgspec.Struct, frozen=True):
    """How often an engine is looked at, and how much it is forgiven."""

    interval_seconds: float = 1.0
    starting_interval_seconds: float = 0.25
    """While it is not ready."""
    num_failures_max: int = 3
    """Probes in a row that must fail before a ready engine is taken to be lost."""


class EngineWatch:
    """One engine and what the cluster was told of it."""

    def __init__(self, engine: Engine, cluster: LiveCluster, settings: WatchSettings | None = None) -> None:
        self.engine = engine
        self.last_error: str | None = "not probed yet"
        """Why the engine is not ready; None while it is."""
        self._cluster = cluster
        self._settings = settings or WatchSettings()
        self._num_failures = 0

    @property
    def is_ready(self) -> bool:
        return self.engine.id in self._cluster.statuses

    def engine_exited(self, reason: str) -> None:
        """The engine's process ended: there is nothing to probe for."""
        self.last_error = reason
        self._cluster.lost(self.engine.id, reason)

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            await self._look()
            settings = self._settings
            interval = settings.interval_seconds if self.is_ready else settings.starting_interval_seconds
            await asyncio.sleep(interval)

    async def _look(self) -> None:
        try:
            status = await self.engine.probe()
        except EngineError as error:
            self._num_failures += 1
            if not self.is_ready:
                self.last_error = error.message
            elif self._num_failures >= self._settings.num_failures_max:
                self.last_error = error.message
                self._cluster.lost(self.engine.id, f"{self._num_failures} probes in a row failed: {error.message}")
            return
        self._num_failures = 0
        if not self.is_ready:
            self.last_error = None
            self._cluster.started(status)
        await self._take_report()

    async def _take_report(self) -> None:
        asked_at = self._cluster.loop.now()
        try:
            report = await self.engine.report()
        except EngineError:
            return  # The next probe decides what this means.
        if report is not None and self.is_ready:
            report = msgspec.structs.replace(report, observed_at=asked_at)
            self._cluster.reported(report, Duration(self._cluster.loop.now() - asked_at))
