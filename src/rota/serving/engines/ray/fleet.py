"""Instances of a Ray cluster that come and go: Ray finds each its node, and has an autoscaler find the machines."""

import asyncio
from collections.abc import Callable, Sequence

from rota.base.errors import EngineError
from rota.base.instant import Duration, seconds
from rota.serving.engines.engine import Engine
from rota.serving.engines.ray.cluster import RayCluster
from rota.serving.engines.ray.engine import RayEngine
from rota.serving.model.fleet import StartOffer, StartSource
from rota.serving.model.instance import InstanceId


class RayFleet:
    """A `Fleet` of actors. Each start asks Ray for one more actor with the resources of an engine, and each stop gives
    it back; what all of them need together is the cluster's standing request, by which Ray's autoscaler adds nodes and
    lets idle ones go.

    Where nodes may come, a start waits for one; where they may not, it fails if no node has room, rather than keep the
    rest of the fleet from shrinking while it waits for what will not come."""

    def __init__(
        self,
        build: Callable[[InstanceId], RayEngine],
        cluster: RayCluster,
        *,
        start_up: Duration = seconds(60),
        node_start_up: Duration = seconds(180),
    ) -> None:
        """`build` makes an engine that is not started. `start_up` is what the router believes of a start on a node that
        is there, and `node_start_up` of one whose node comes first, until it has seen one of each."""
        self._build = build
        self._cluster = cluster
        self._start_up = start_up
        self._node_start_up = node_start_up
        self._started: dict[InstanceId, RayEngine] = {}
        self._num_rooms = 0
        """As it was found last."""
        self._looking: asyncio.Task[None] | None = None
        self._one_by_one = asyncio.Lock()
        """Two starts at a time would both take the last room."""

    def offers(self) -> Sequence[StartOffer]:
        """`page_cache` are places on nodes that are there, `cold` those on nodes that would have to come. As Ray said
        when this was asked last, since its answer may take a while."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(), name="rooms of the Ray cluster")
        rooms = [StartOffer(StartSource.PAGE_CACHE, self._start_up, self._num_rooms)] if self._num_rooms else []
        return rooms + ([StartOffer(StartSource.COLD, self._node_start_up)] if self._cluster.awaits_nodes else [])

    async def start(self, instance_id: InstanceId, source: StartSource) -> Engine:
        async with self._one_by_one:
            return await self._start(instance_id)

    async def _start(self, instance_id: InstanceId) -> Engine:
        await self._look()
        if not (self._num_rooms or self._cluster.awaits_nodes):
            raise EngineError(
                f"{instance_id}: no node of the Ray cluster has room for it ({self._cluster.needs})",
                hint="add nodes, or --await-nodes where an autoscaler starts them",
            )
        engine = self._build(instance_id)
        try:
            await engine.start()
        except EngineError:
            await engine.stop()
            raise
        self._started[instance_id] = engine
        return engine

    async def stop(self, engine: Engine) -> None:
        self._started.pop(engine.id, None)
        await engine.stop()

    async def _look(self) -> None:
        """How many more engines Ray has room for, less those that it has not placed yet. None where it does not say."""
        num_unplaced = sum(engine.node_id is None for engine in self._started.values())
        try:
            num_rooms = await asyncio.to_thread(self._cluster.num_rooms)
        except Exception:  # whatever Ray has to say
            num_rooms = 0
        self._num_rooms = max(0, num_rooms - num_unplaced)
