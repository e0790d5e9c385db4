"""Watches one engine: tells the cluster when it becomes ready, when it is lost, and how loaded it says it is.

Three probes in a row that fail are a loss; one is enough where no stream of the engine brought anything while it was
waited for. An engine whose probes are well and whose streams all stand still is lost after `stall_seconds`. One that
does not get ready within `start_seconds` is hung as well.
"""

import asyncio
from collections.abc import Callable

import msgspec

from rota.base.errors import EngineError
from rota.base.instant import Duration, Instant, seconds
from rota.serving.engines.engine import Engine, StepTotals
from rota.serving.live.cluster import LiveCluster
from rota.serving.model.instance import InstanceReport
from rota.serving.model.request import RequestId

FACTS, PROBE = "facts", "probe"
"""Where a report comes from: the engine's own facts of its steps, or an answer to our asking."""


class WatchSettings(msgspec.Struct, frozen=True):
    """How often an engine is looked at, and how much it is forgiven."""

    interval_seconds: float = 1.0
    starting_interval_seconds: float = 0.25
    """While it is not ready."""
    num_failures_max: int = 3
    """Probes in a row that must fail before a ready engine is taken to be lost."""
    stall_seconds: float = 30.0
    """How long all that an engine has to do may be streams that bring nothing after they began."""
    start_seconds: float = 1800.0
    """How long an engine may take to get ready, first or again, before its start is taken to be hung."""


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
        self._streams: dict[RequestId, bytes | None] = {}
        self._silent_before: dict[RequestId, bytes | None] = {}
        self._silent_since: Instant | None = None
        self._starting_since: Instant | None = None
        self.on_hung: Callable[[], None] = lambda: None
        """Called when the engine is lost, or does not get ready, though nobody said that it ended."""

    @property
    def is_ready(self) -> bool:
        return self.engine.id in self._cluster.statuses

    def engine_exited(self, reason: str) -> None:
        """The engine's process ended: there is nothing to probe for."""
        self.last_error = reason
        self.last_report = None
        self._starting_since = None
        self._cluster.lost(self.engine.id, reason)

    def told(self, report: InstanceReport, age: Duration, steps: StepTotals) -> None:
        """The engine told of itself, unasked; `age` is how long ago it was as it says."""
        self.steps = steps
        self._silent_since = None
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
        self._streams = self._cluster.streams_at(self.engine.id)
        try:
            status = await self.engine.probe()
        except EngineError as error:
            self._num_failures += 1
            if not self.is_ready:
                self.last_error = error.message
                self._look_at_start()
            elif self._num_failures >= self._settings.num_failures_max:
                self._lose(f"{self._num_failures} probes in a row failed: {error.message}")
            elif self._is_silent():
                self._lose(f"no stream brings anything, and a probe failed: {error.message}")
            return
        self._num_failures = 0
        self._starting_since = None
        self._cluster.try_again(self.engine.id)
        if self._is_stalled():
            self._lose(f"its streams brought nothing for {self._settings.stall_seconds:g} s")
            return
        if not self.is_ready:
            self.last_error = None
            self._cluster.started(status)
        await self._take_report()

    def _lose(self, reason: str) -> None:
        self.last_error = reason
        self.last_report = None
        self._cluster.lost(self.engine.id, reason)
        self.on_hung()

    def _look_at_start(self) -> None:
        now = self._cluster.loop.now()
        self._starting_since = self._starting_since or now
        if now - self._starting_since >= seconds(self._settings.start_seconds):
            self.last_error = f"it was not ready within {self._settings.start_seconds:g} s: {self.last_error}"
            self._starting_since = None
            self.on_hung()

    def _is_silent(self) -> bool:
        """Whether there were streams at the engine, and none brought anything since the look began."""
        now = self._cluster.streams_at(self.engine.id)
        return bool(now) and all(now.get(request_id, last) is last for request_id, last in self._streams.items())

    def _is_stalled(self) -> bool:
        """Whether streams are all that the engine has to do, and have brought nothing for too long."""
        streams, before = self._cluster.streams_at(self.engine.id), self._silent_before
        self._silent_before = streams
        has_more = self._cluster.num_in_flight()[self.engine.id] > len(streams)
        if not streams or has_more or any(before.get(request_id) is not last for request_id, last in streams.items()):
            self._silent_since = None
            return False
        now = self._cluster.loop.now()
        self._silent_since = self._silent_since or now
        return now - self._silent_since >= seconds(self._settings.stall_seconds)

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
