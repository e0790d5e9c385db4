"""Runs a router from start to end: engines, watches, front door, and an orderly stop."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec

from rota.base.errors import ConfigError, EngineError
from rota.runtime.live import LiveLoop
from rota.serving.cluster.machine import ClusterMachine
from rota.serving.engines.engine import Engine, SupervisedEngine
from rota.serving.engines.vllm.engine import VllmEngine
from rota.serving.frontdoor.app import SHUTTING_DOWN, FrontDoor
from rota.serving.frontdoor.http1 import HttpLimits
from rota.serving.frontdoor.key_watch import KeyWatch
from rota.serving.frontdoor.keys import KeyFile, KeyRing
from rota.serving.frontdoor.problems import Problem
from rota.serving.frontdoor.scaling import Scaling
from rota.serving.live.cluster import LiveCluster
from rota.serving.live.fleet import Fleet
from rota.serving.live.watch import EngineWatch, WatchSettings
from rota.serving.model.instance import InstanceId, Role

_NO_ROLES: Mapping[InstanceId, Role] = MappingProxyType({})

_log = logging.getLogger(__name__)


class ServeConfig(msgspec.Struct, frozen=True):
    """How a router serves. What decides is in the machine, not here."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 lets the system choose."""
    drain_seconds: float = 30.0
    """How long requests under way may go on after the first SIGINT or SIGTERM."""
    start_timeout_seconds: float = 300.0
    """How long the first instance may take to become ready, where `serve` waits for it."""
    first_byte_timeout_seconds: float | None = None
    """After how much silence an engine is taken to hang; None is never."""
    default_max_tokens: int = 1024
    """What policies are told where a client sets no limit."""
    keys: KeyFile | None = None
    """Who may ask; None lets everybody."""
    keys_path: Path | None = None
    """The file that `keys` are of: it is read anew when it changes. None keeps them as they are."""
    resume: bool = True
    """Whether streams are followed event by event where they can then go on at another engine."""
    text_counts: bool = False
    """Whether each prompt's text is counted (never kept), for a ranker of lengths to learn from and go by."""
    http: HttpLimits = HttpLimits()
    watch: WatchSettings = WatchSettings()


class Router:
    """A running router. `async with` starts and stops it; tests use it so, `serve` adds the signals."""

    def __init__(
        self,
        config: ServeConfig,
        loop: LiveLoop,
        machine: ClusterMachine,
        engines: Sequence[Engine],
        fleet: Fleet | None = None,
        roles: Mapping[InstanceId, Role] = _NO_ROLES,
    ) -> None:
        """`fleet` starts and stops instances where the machine's stack scales them; raises `ConfigError` for such a
        stack without one. `roles` are those of the engines that are not for both phases."""
        self.config = config
        self.engines = list(engines)
        self.cluster = LiveCluster(
            loop, machine, engines, first_byte_timeout_seconds=config.first_byte_timeout_seconds, roles=roles
        )
        self.watches = [EngineWatch(engine, self.cluster, config.watch) for engine in engines]
        ring = None if config.keys is None else KeyRing(config.keys)
        self.door = FrontDoor(
            self.cluster,
            self.watches,
            limits=config.http,
            default_max_tokens=config.default_max_tokens,
            resume=config.resume,
            keys=ring,
            text_counts=config.text_counts,
        )
        if ring is not None and config.keys is not None and config.keys_path is not None:
            self.door.key_watch = KeyWatch(config.keys_path, ring, config.keys, self.door.keys_changed)
        self._reading_keys: asyncio.Task[None] | None = None
        self._watching: dict[InstanceId, asyncio.Task[None]] = {}
        self._started: list[Engine] = []
        self._scaling: Scaling | None = None
        self._looking: asyncio.Task[None] | None = None
        if machine.fleet is not None:
            if fleet is None:
                raise ConfigError(
                    "the stack's scaling policy wants instances started, and these engines cannot be",
                    hint='scale --engine vllm or simulated on this machine, or leave scaling = "none"',
                )
            every = machine.fleet.scale_every
            self._scaling = Scaling(self.cluster, fleet, every, attach=self._attach, detach=self._detach)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.config.host}:{self.door.server.port}"

    async def __aenter__(self) -> "Router":
        try:
            await self._start()
        except BaseException:
            await self.stop(drain_seconds=0.0)
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop(drain_seconds=0.0)

    async def _start(self) -> None:
        try:
            await self.door.server.start(self.config.host, self.config.port)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {self.config.host}:{self.config.port}: {error.strerror or error}",
                hint="another server may have the port; choose another with --port",
            ) from None
        if self.door.key_watch is not None:
            self._reading_keys = asyncio.create_task(self.door.key_watch.run(), name="keys")
        if self._scaling is not None:
            self._scaling.begin_with(self.engines)
        for engine, watch in zip(list(self.engines), list(self.watches), strict=True):
            _connect(engine, watch)
            self._started.append(engine)
            await engine.start()
            self._watch(watch)
        if self._scaling is not None:
            self._looking = asyncio.create_task(self._scaling.run(), name="scaling")

    def _watch(self, watch: EngineWatch) -> None:
        self._watching[watch.engine.id] = asyncio.create_task(watch.run(), name=f"watch {watch.engine.id}")

    def _attach(self, engine: Engine) -> None:
        """An engine that was started while the router runs is known and watched from now on."""
        watch = EngineWatch(engine, self.cluster, self.config.watch)
        _connect(engine, watch)
        self.cluster.add_engine(engine)
        self.engines.append(engine)
        self.watches.append(watch)
        self._watch(watch)

    def _detach(self, instance_id: InstanceId) -> Engine | None:
        """An engine is to be stopped: it is neither watched nor known any more. None if it was not."""
        watch = next((each for each in self.watches if each.engine.id == instance_id), None)
        if watch is None:
            return None
        self._watching.pop(instance_id).cancel()
        self.cluster.remove_engine(instance_id)
        self.watches.remove(watch)
        self.engines.remove(watch.engine)
        if watch.engine in self._started:
            self._started.remove(watch.engine)
        return watch.engine

    async def wait_ready(self, num_instances: int = 1, timeout_seconds: float | None = None) -> None:
        """Wait until so many instances are ready. Raises `EngineError` that says why they are not."""
        limit = self.config.start_timeout_seconds if timeout_seconds is None else timeout_seconds
        try:
            async with asyncio.timeout(limit):
                while len(self.cluster.statuses) < num_instances:
                    self._raise_if_hopeless()
                    await asyncio.sleep(0.02)
        except TimeoutError:
            why = "\n".join(f"{watch.engine.id}: {watch.last_error}" for watch in self.watches if not watch.is_ready)
            raise EngineError(
                f"after {limit:g} s only {len(self.cluster.statuses)} of {num_instances} instances are ready:\n{why}"
            ) from None

    def _raise_if_hopeless(self) -> None:
        given_up = [
            engine.given_up
            for engine in self.engines
            if isinstance(engine, SupervisedEngine) and engine.given_up is not None
        ]
        if given_up and len(given_up) == len(self.engines):
            raise EngineError("\n".join(given_up))

    @property
    def num_unfinished(self) -> int:
        """Requests that clients wait for."""
        return len(self.cluster.flights) + self.door.large_bodies.num_unread

    async def drain(self, seconds: float) -> int:
        """Take nothing new and let what is under way go on for so long. Returns how many requests are left."""
        self.door.server.stop_accepting()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.num_unfinished:
                    await asyncio.sleep(0.02)
        return self.num_unfinished

    async def stop(self, *, drain_seconds: float) -> None:
        """Stop in order: new requests, requests under way, watches, engines, connections."""
        num_left = await self.drain(drain_seconds)
        if num_left:
            _log.warning("%d requests were not finished in time and end with an error", num_left)
            self.cluster.fail_all(SHUTTING_DOWN)
        await self.door.large_bodies.close(Problem(503, SHUTTING_DOWN, code="shutting_down"))
        for looking in (self._looking, self._reading_keys):
            if looking is not None:
                looking.cancel()
        if self._scaling is not None:
            await self._scaling.close()
        watching = list(self._watching.values())
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        await asyncio.gather(*(engine.stop() for engine in self._started))
        await asyncio.sleep(0)  # Let what was written last get away.
        self.door.server.close()
        self.cluster.loop.close()


async def serve(
    config: ServeConfig,
    *,
    loop: LiveLoop,
    machine: ClusterMachine,
    engines: Sequence[Engine],
    fleet: Fleet | None = None,
    roles: Mapping[InstanceId, Role] = _NO_ROLES,
    num_ready: int = 1,
    on_ready: Callable[[Router], None] = lambda router: None,
) -> None:
    """Serve until SIGINT or SIGTERM, then drain and stop; a second signal stops at once. SIGHUP reads the keys anew.

    `on_ready` is called when `num_ready` instances take requests. Raises `ConfigError` if the port cannot be had, and
    `EngineError` if no instance gets ready in time. `loop` should be new: the router adds its machine to it.
    """
    stopping, hurrying = asyncio.Event(), asyncio.Event()

    def signalled() -> None:
        (hurrying if stopping.is_set() else stopping).set()

    running = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        running.add_signal_handler(number, signalled)
    router = Router(config, loop, machine, engines, fleet, roles)
    signals = [signal.SIGINT, signal.SIGTERM]
    if router.door.key_watch is not None:
        running.add_signal_handler(signal.SIGHUP, router.door.key_watch.told)
        signals.append(signal.SIGHUP)
    try:
        async with router:
            if await _unless(stopping, router.wait_ready(num_ready)):
                on_ready(router)
                await stopping.wait()
            draining = asyncio.create_task(router.drain(config.drain_seconds))
            if not await _unless(hurrying, draining):
                for engine in router.engines:
                    if isinstance(engine, SupervisedEngine):
                        engine.kill()
    finally:
        for number in signals:
            running.remove_signal_handler(number)


def _connect(engine: Engine, watch: EngineWatch) -> None:
    """Have the watch hear what the engine says by itself."""
    if isinstance(engine, SupervisedEngine):
        engine.on_exit(watch.engine_exited)
        watch.on_hung = engine.kill
    if isinstance(engine, VllmEngine):
        engine.on_report(watch.told)


async def _unless(event: asyncio.Event, work: asyncio.Task[int] | Coroutine[object, object, None]) -> bool:
    """Await `work`, unless the event comes first; whether it was the work."""
    task = asyncio.ensure_future(work)
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
            return True
        return False
    finally:
        task.cancel()
        waiting.cancel()
