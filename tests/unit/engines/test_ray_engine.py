"""The router's half of an engine on Ray, against an actor that is told what to say."""

import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra ray is not installed")
from rota import __version__
from rota.base.errors import EngineError
from rota.serving.engines.process import ProcessSpec
from rota.serving.engines.ray import engine as ray_engine
from rota.serving.engines.ray import host as host_module
from rota.serving.engines.ray.cluster import Needs
from rota.serving.engines.ray.engine import RayEngine
from rota.serving.engines.ray.host import EngineHost, Refused, Whereabouts
from rota.serving.engines.ray.plans import SimulatedPlan
from rota.testing.scripted import ScriptedServer, answers

PLAN = SimulatedPlan("ray-0", "/nowhere", "llama-3.1-8b-a100")


class Told:
    """Cluster and actor in one: `says` is what the next questions are answered, or raised."""

    needs = Needs()

    def __init__(self) -> None:
        self.says: Any = None
        self.num_asked = self.num_ended = self.num_placed = 0
        self.told_has_served = False
        self.where = SimpleNamespace(remote=self._where)

    def place(self, plan: object) -> "Told":
        self.num_placed += 1
        return self

    def keep_room(self, instance_id: str, wanted: bool) -> None: ...

    def end(self, actor: object, *, restart: bool = False) -> None:
        self.num_ended += 1

    def _where(self, owner: str, version: str, plan: object, has_served: bool) -> Any:
        self.num_asked += 1
        self.told_has_served = has_served
        answer: Future[Any] = Future()
        if isinstance(self.says, Exception):
            answer.set_exception(self.says)
        elif self.says is not None:
            # Another object each time, as Ray has it.
            answer.set_result(type(self.says)(*(getattr(self.says, name) for name in self.says.__struct_fields__)))
        return SimpleNamespace(future=lambda: answer)


@asynccontextmanager
async def followed(told: Told, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[RayEngine, list[str]]]:
    monkeypatch.setattr(ray_engine, "LOOK_SECONDS", 0.01)
    engine = RayEngine(PLAN, told)  # type: ignore[arg-type]
    exits: list[str] = []
    engine.on_exit(exits.append)
    await engine.start()
    try:
        yield engine, exits
    finally:
        told.says = RuntimeError("it is over")
        await engine.stop()


async def until(holds: Any) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.005)


@pytest.mark.asyncio
async def test_a_slow_probe_is_no_sign_of_another_incarnation(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ScriptedServer(answers)
    url = await server.start()
    slowly = asyncio.Event()
    monkeypatch.setattr(server, "answers_gets", slowly.wait)
    told = Told()
    told.says = Whereabouts(url, "first", "node")
    async with followed(told, monkeypatch) as (engine, exits):
        await until(lambda: engine.node_id == "node")
        probing = asyncio.create_task(engine.probe())
        before = told.num_asked
        await until(lambda: told.num_asked > before + 5)
        slowly.set()
        assert (await probing).spec.id == "ray-0"
        assert not exits
    server.die()


@pytest.mark.asyncio
async def test_another_incarnation_is_a_loss_and_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    told.says = Whereabouts("http://127.0.0.1:9", "first", "one")
    async with followed(told, monkeypatch) as (engine, exits):
        await until(lambda: engine.node_id == "one")
        told.says = Whereabouts("http://127.0.0.1:10", "second", "another")
        await until(lambda: exits)
        assert (engine.client.url, engine.node_id) == ("http://127.0.0.1:10", "another")
        assert exits == ["Ray started it anew on node another"]
        told.says = Whereabouts("http://127.0.0.1:10", "second", "another", ended="exited with status 3")
        await until(lambda: len(exits) == 2)
        with pytest.raises(EngineError, match="ray-0: exited with status 3"):
            await engine.probe()


@pytest.mark.asyncio
async def test_one_that_died_before_its_host_heard_that_it_had_worked_is_not_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = ScriptedServer(answers)
    url = await server.start()
    told = Told()
    told.says = Whereabouts(url, "first", "one")
    async with followed(told, monkeypatch) as (engine, exits):
        await until(lambda: engine.node_id == "one")
        await engine.probe()
        told.says = Whereabouts(url, "first", "one", ended="exited with status -9", given_up=True)
        await until(lambda: exits)
        assert (exits, engine.given_up) == (["exited with status -9"], None)
        assert told.told_has_served
    server.die()


@pytest.mark.asyncio
@pytest.mark.parametrize("worked", [True, False])
async def test_a_host_that_hears_it_late_leaves_to_be_started_anew(
    monkeypatch: pytest.MonkeyPatch, worked: bool
) -> None:
    context = SimpleNamespace(was_current_actor_reconstructed=False, get_node_id=lambda: "one")
    monkeypatch.setattr(host_module.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(host_module.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    left: list[float] = []

    async def leave(seconds: float) -> None:
        left.append(seconds)

    monkeypatch.setattr(host_module, "_leave_after", leave)
    spec = ProcessSpec(name="ray-0", command=("false",), log_path=os.devnull)
    plan = SimpleNamespace(instance_id="ray-0", process=lambda host, port: spec)
    host = EngineHost(plan)  # type: ignore[arg-type]
    async with asyncio.timeout(20):
        while (where := await host.where("me", __version__, plan, False)).ended is None:  # type: ignore[arg-type]
            await asyncio.sleep(0.01)
    assert where.given_up
    assert not left
    late = await host.where("me", __version__, plan, worked)  # type: ignore[arg-type]
    await asyncio.sleep(0)
    assert (late.given_up, bool(left)) == (not worked, worked)


@pytest.mark.asyncio
async def test_a_leftover_is_replaced_and_what_another_router_uses_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = Told()
    told.says = Refused(False, "it was started with other settings")
    async with followed(told, monkeypatch) as (engine, _):
        await until(lambda: told.num_ended)
        assert engine.given_up is None
        monkeypatch.setattr(ray_engine, "OWNER_SECONDS", 0.0)
        told.says = Refused(True, "another router uses it")
        await until(lambda: engine.given_up is not None)
        ended = told.num_ended
        engine.kill()
    assert told.num_ended == ended


@pytest.mark.asyncio
async def test_what_ray_can_never_start_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    told.says = ray_engine.ActorDiedError()
    async with followed(told, monkeypatch) as (engine, _):
        await until(lambda: engine.given_up is not None)
        assert told.num_placed == ray_engine.NUM_PLACED_MAX
        with pytest.raises(EngineError, match="Ray cannot start it"):
            await engine.probe()
