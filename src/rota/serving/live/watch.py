"""Watches one engine: tells the cluster when it becomes ready, when it is lost, and how loaded it says it is."""

import asyncio

import msgspec

from rota.base.errors import EngineError
from rota.base.instant import Duration, Instant
from rota.serving.engines.engine import Engine, StepTotals
from rota.serving.live.cluster import LiveCluster
from rota.serving.model.instance import InstanceReport

FACTS, PROBE = "facts", "probe"
"""Where a report comes from: the engine's own facts of its steps, or an answer to our asking."""


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
        self.last_report: InstanceReport | None = None
        """The last that the cluster was told of its load; None before the first, and while it is lost."""
        self.num_reports = {FACTS: 0, PROBE: 0}
        """How many reports there were, by where they come from."""
        self.steps: StepTotals | None = None
        """What its steps added up to, if it says."""
        self._cluster = cluster
        self._settings = settings or WatchSettings()
        self._num_failures = 0

    @property
    def is_ready(self) -> bool:
        return self.engine.id in self._cluster.statuses

    def engine_exited(self, reason: str) -> None:
        """The engine's process ended: there is nothing to probe for."""
        self.last_error = reason
        self.last_report = None
        self._cluster.lost(self.engine.id, reason)

    def told(self, report: InstanceReport, age: Duration, steps: StepTotals) -> None:
        """The engine told of itself, unasked; `age` is how long ago it was as it says."""
        self.steps = steps
        now = self._cluster.loop.now()
        self._pass_on(report, Instant(now - age), age, FACTS)

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
                self.last_report = None
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
        if report is not None:
            self._pass_on(report, asked_at, Duration(self._cluster.loop.now() - asked_at), PROBE)

    def _pass_on(self, report: InstanceReport, observed_at: Instant, delay: Duration, source: str) -> None:
        if self.is_ready:
            self.last_report = msgspec.structs.replace(report, observed_at=observed_at)
            self.num_reports[source] += 1
            self._cluster.reported(self.last_report, delay)
