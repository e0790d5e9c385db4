"""The fleet of a Ray cluster, over a cluster that is told how much room it has."""

import asyncio
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra ray is not installed")
from rota.base.errors import EngineError
from rota.base.instant import seconds
from rota.serving.api import StartOffer, StartSource
from rota.serving.engines.ray.cluster import Needs, num_that_fit
from rota.serving.engines.ray.fleet import RayFleet
from rota.serving.model.instance import InstanceId


class Room:
    """A cluster with places for so many engines; fewer once Ray has placed one."""

    needs = Needs(num_cpus=2.0)

    def __init__(self, num_rooms: int | Exception, *, awaits_nodes: bool = False) -> None:
        self.says = num_rooms
        self.awaits_nodes = awaits_nodes

    def num_rooms(self) -> int:
        if isinstance(self.says, Exception):
            raise self.says
        return self.says


class Engine:
    def __init__(self, instance_id: InstanceId, error: EngineError | None = None) -> None:
        self.id = instance_id
        self.node_id: str | None = None
        self.error = error
        self.num_stopped = 0

    async def start(self) -> None:
        if self.error is not None:
            raise self.error

    async def stop(self) -> None:
        self.num_stopped += 1


def fleet_of(room: Room, built: list[Engine] | None = None, error: EngineError | None = None) -> RayFleet:
    def build(instance_id: InstanceId) -> Any:
        engine = Engine(instance_id, error)
        (built if built is not None else []).append(engine)
        return engine

    return RayFleet(build, room, start_up=seconds(5), node_start_up=seconds(50))  # type: ignore[arg-type]


async def start(fleet: RayFleet, name: str) -> Any:
    return await fleet.start(InstanceId(name), StartSource.COLD)


async def offered(fleet: RayFleet) -> list[StartOffer]:
    fleet.offers()
    await fleet._looking  # type: ignore[misc]
    return list(fleet.offers())


@pytest.mark.asyncio
async def test_one_room_is_given_once() -> None:
    fleet = fleet_of(Room(1))
    done = await asyncio.gather(start(fleet, "a"), start(fleet, "b"), return_exceptions=True)
    refused = [each for each in done if isinstance(each, EngineError)]
    assert len(refused) == 1
    assert refused[0].message == "b: no node of the Ray cluster has room for it (CPU 2)"
    assert "--await-nodes" in (refused[0].hint or "")
    await fleet.stop(done[0])
    await start(fleet, "c")


@pytest.mark.asyncio
async def test_one_that_is_placed_is_in_rays_own_account() -> None:
    room = Room(2)
    fleet = fleet_of(room)
    (await start(fleet, "a")).node_id = "n1"
    room.says = 1
    assert await offered(fleet) == [StartOffer(StartSource.PAGE_CACHE, seconds(5), 1)]


@pytest.mark.asyncio
async def test_what_is_offered() -> None:
    cold = StartOffer(StartSource.COLD, seconds(50))
    assert await offered(fleet_of(Room(3))) == [StartOffer(StartSource.PAGE_CACHE, seconds(5), 3)]
    assert await offered(fleet_of(Room(0))) == []
    assert await offered(fleet_of(Room(0, awaits_nodes=True))) == [cold]
    with_nodes = await offered(fleet_of(Room(1, awaits_nodes=True)))
    assert with_nodes == [StartOffer(StartSource.PAGE_CACHE, seconds(5), 1), cold]


@pytest.mark.asyncio
async def test_a_cluster_that_does_not_answer_has_no_room_and_breaks_nothing() -> None:
    fleet = fleet_of(Room(RuntimeError("the control store is away")))
    assert await offered(fleet) == []
    with pytest.raises(EngineError, match="has room"):
        await start(fleet, "a")


@pytest.mark.asyncio
async def test_a_start_waits_for_a_node_where_one_may_come() -> None:
    fleet = fleet_of(Room(0, awaits_nodes=True))
    assert (await start(fleet, "a")).id == "a"


@pytest.mark.asyncio
async def test_a_start_that_fails_leaves_nothing_behind() -> None:
    built: list[Engine] = []
    fleet = fleet_of(Room(1), built, EngineError("Ray takes no request"))
    with pytest.raises(EngineError, match="takes no request"):
        await start(fleet, "a")
    assert built[0].num_stopped == 1
    assert await offered(fleet) == [StartOffer(StartSource.PAGE_CACHE, seconds(5), 1)]


def test_how_many_fit_on_a_node() -> None:
    needs = Needs(num_cpus=2, num_gpus=0.1, resources={"tpu": 1})
    assert num_that_fit(needs, {"CPU": 8.0, "GPU": 0.3, "tpu": 9.0}) == 3
    assert num_that_fit(needs, {"CPU": 1.9, "GPU": 1.0, "tpu": 9.0}) == 0
    assert num_that_fit(needs, {"CPU": 8.0, "GPU": 1.0}) == 0
    assert num_that_fit(Needs(num_cpus=0), {}) == 1
