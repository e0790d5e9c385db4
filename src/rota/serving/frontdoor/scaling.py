"""Carries out what the router orders of its fleet: starts engines, watches them, stops them, and says when to look."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

import msgspec

from rota.base.errors import EngineError
from rota.base.instant import Duration, Instant, to_seconds
from rota.serving.engines.engine import Engine, SupervisedEngine
from rota.serving.live.cluster import LiveCluster
from rota.serving.live.fleet import Fleet
from rota.serving.model.commands import StartInstance, StopInstance
from rota.serving.model.events import InstanceStarting, InstanceStopped, ScalingDue, StartFailed
from rota.serving.model.fleet import StartOffer, StartSource
from rota.serving.model.instance import InstanceId

_log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
"""How often it is looked at who has become ready, and who never will."""


class Scaling:
    """One fleet of a running router. What takes time is a task of its own, one after the other for each instance."""

    def __init__(
        self,
        cluster: LiveCluster,
        fleet: Fleet,
        scale_every: Duration,
        *,
        attach: Callable[[Engine], None],
        detach: Callable[[InstanceId], Engine | None],
    ) -> None:
        """`attach` has an engine watched and known, `detach` undoes it and returns the engine, if it was."""
        self._cluster = cluster
        self._fleet = fleet
        self._scale_every = scale_every
        self._attach = attach
        self._detach = detach
        self._ours: set[InstanceId] = set()
        """Those that the fleet started, as against those that the router began with."""
        self._tasks: dict[InstanceId, asyncio.Task[None]] = {}
        self._starting: dict[InstanceId, tuple[StartSource, Instant]] = {}
        self._took: dict[StartSource, Duration] = {}
        """How long the last start from each source took."""
        cluster.on_fleet = self.carry_out

    def begin_with(self, engines: Sequence[Engine]) -> None:
        """Tell the router which engines are started without its order."""
        for engine in engines:
            self._cluster.tell(InstanceStarting(engine.id))

    async def run(self) -> None:
        """Look regularly, until cancelled."""
        waited = 0.0
        while True:
            await asyncio.sleep(POLL_SECONDS)
            self._note_ready()
            self._note_hopeless()
            waited += POLL_SECONDS
            if waited >= to_seconds(self._scale_every):
                waited = 0.0
                self._cluster.tell(ScalingDue(self.offers()))

    def offers(self) -> tuple[StartOffer, ...]:
        """What the fleet offers, with the times that starts took here where they are known."""
        offers = [
            msgspec.structs.replace(offer, start_up=self._took.get(offer.source, offer.start_up))
            for offer in self._fleet.offers()
        ]
        return tuple(sorted(offers, key=lambda offer: offer.start_up))

    def carry_out(self, command: StartInstance | StopInstance) -> None:
        """Begin what was ordered; what comes of it, the router is told."""
        if isinstance(command, StartInstance):
            _log.info("%s is started: %s", command.instance_id, command.reason)
            self._ours.add(command.instance_id)
            self._after(command.instance_id, self._start, command)
        else:
            _log.info("%s is stopped: %s", command.instance_id, command.reason)
            self._after(command.instance_id, self._stop, command)

    async def close(self) -> None:
        """Stop all that the fleet started and has not been told to stop."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        engines = [self._detach(instance_id) for instance_id in self._ours]
        await asyncio.gather(*(self._fleet.stop(engine) for engine in engines if engine is not None))

    def _after(self, instance_id: InstanceId, work: Callable[..., object], command: object) -> None:
        """Do it when what was begun with this instance is over."""
        before = self._tasks.get(instance_id)

        async def do() -> None:
            if before is not None:
                await asyncio.wait([before])
            try:
                await work(command)  # type: ignore[misc]
            except Exception:
                _log.exception("the fleet failed on %s", command)
            if self._tasks.get(instance_id) is asyncio.current_task():
                del self._tasks[instance_id]

        self._tasks[instance_id] = asyncio.create_task(do(), name=f"fleet {instance_id}")

    async def _start(self, order: StartInstance) -> None:
        began_at = self._cluster.loop.now()
        try:
            engine = await self._fleet.start(order.instance_id, order.source)
        except EngineError as error:
            self._ours.discard(order.instance_id)
            self._cluster.tell(StartFailed(order.instance_id, error.message))
            return
        self._starting[order.instance_id] = (order.source, began_at)
        self._attach(engine)

    async def _stop(self, order: StopInstance) -> None:
        await self._give_back(order.instance_id)
        self._cluster.tell(InstanceStopped(order.instance_id))

    async def _give_back(self, instance_id: InstanceId) -> None:
        self._starting.pop(instance_id, None)
        engine = self._detach(instance_id)
        is_ours = instance_id in self._ours
        self._ours.discard(instance_id)
        if engine is not None:
            # An engine that cannot be stopped is no reason to believe that it is still there.
            with contextlib.suppress(EngineError):
                await (self._fleet.stop(engine) if is_ours else engine.stop())

    def _note_ready(self) -> None:
        for instance_id, (source, began_at) in list(self._starting.items()):
            if instance_id in self._cluster.statuses:
                del self._starting[instance_id]
                self._took[source] = Duration(self._cluster.loop.now() - began_at)

    def _note_hopeless(self) -> None:
        """An engine that will not be started again is no member of the fleet."""
        for engine in list(self._cluster.engines.values()):
            if isinstance(engine, SupervisedEngine) and engine.given_up is not None and engine.id not in self._tasks:
                self._after(engine.id, self._bury, engine)

    async def _bury(self, engine: SupervisedEngine) -> None:
        why, was_starting = engine.given_up or "", engine.id in self._starting
        await self._give_back(engine.id)
        self._cluster.tell(StartFailed(engine.id, why) if was_starting else InstanceStopped(engine.id))
