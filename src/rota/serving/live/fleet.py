"""Where a running router gets its instances from, and where it gives them back to."""

from collections.abc import Callable, Sequence
from typing import Protocol

from rota.base.instant import Duration, seconds
from rota.serving.engines.engine import Engine
from rota.serving.model.fleet import StartOffer, StartSource
from rota.serving.model.instance import InstanceId


class Fleet(Protocol):
    """Starts and stops engines, by whatever means: processes of this machine, or those of a cluster.

    The router watches what it was given as it watches any engine: it finds out by itself when one is ready, and when it
    is lost."""

    def offers(self) -> Sequence[StartOffer]:
        """How an engine could be started now, and how long each way takes until it is ready, the quickest first; empty
        where that is not known. Called often, and must not take long."""
        ...

    async def start(self, instance_id: InstanceId, source: StartSource) -> Engine:
        """One more engine, under this id, which was never used before. `Engine.start` has been called; whether it is
        ready is not waited for. It may be started from another source, where there is no more of this one. Raises
        `EngineError` if there is none to be had, and nothing is left behind then."""
        ...

    async def stop(self, engine: Engine) -> None:
        """Give back an engine that `start` returned, with all that it took; it is not used any more. It may be in any
        state, dead or never ready. `Engine.stop` is called here, not by the router."""
        ...


class LocalFleet:
    """Engines on this machine, one after the other from the same recipe. What the first one read of its weights is in
    memory for all that follow."""

    def __init__(self, build: Callable[[InstanceId], Engine], start_up: Duration = seconds(60)) -> None:
        """`build` makes an engine that is not started. `start_up` is what the router believes of a start until it has
        seen one."""
        self._build = build
        self._start_up = start_up

    def offers(self) -> Sequence[StartOffer]:
        return (StartOffer(StartSource.PAGE_CACHE, self._start_up),)

    async def start(self, instance_id: InstanceId, source: StartSource) -> Engine:
        engine = self._build(instance_id)
        await engine.start()
        return engine

    async def stop(self, engine: Engine) -> None:
        await engine.stop()
