"""`--on ray`: three nodes, one of them killed under load, and nobody notices.

pytest -m slow -s tests/live/test_ray_serve.py
"""

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
from ray.cluster_utils import Cluster  # noqa: E402
from tests.live.ray_nodes import kill, nodes, pids, standing_request, until  # noqa: E402
from tests.worlds.test_simulated_failover import COMPLETION, ask, body_of, said  # noqa: E402

from rota.base.errors import ConfigError, EngineError  # noqa: E402
from rota.serving.engines.ray.cluster import Needs, RayCluster  # noqa: E402
from rota.serving.engines.ray.engine import RayEngine  # noqa: E402
from rota.serving.engines.ray.plans import SimulatedPlan  # noqa: E402
from rota.serving.frontdoor.serve import ServeConfig  # noqa: E402
from rota.serving.live.watch import WatchSettings  # noqa: E402
from rota.testing.router import RunningRouter, running_router  # noqa: E402

pytestmark = pytest.mark.slow

QUICK = ServeConfig(port=0, watch=WatchSettings(interval_seconds=0.2, starting_interval_seconds=0.1))
NUM_CLIENTS = 6
NUM_TOKENS = 100


@pytest.fixture(scope="module")
def three() -> Iterator[Cluster]:
    with nodes(3, num_cpus=2) as cluster:
        yield cluster


STACK = 'order = "strict_priority"\n'


def plan(folder: Path, index: int, **changed: Any) -> SimulatedPlan:
    return SimulatedPlan(
        f"ray-{index}", str(folder), **{"profile": "llama-3.1-8b-a100", "stack_text": STACK, **changed}
    )


@asynccontextmanager
async def served(
    folder: Path, num_engines: int = 3, *, needs: Needs | None = None, **changed: Any
) -> AsyncIterator[tuple[RunningRouter, list[RayEngine]]]:
    cluster = RayCluster(None, needs or Needs())
    engines = [RayEngine(plan(folder, index, **changed), cluster) for index in range(num_engines)]
    async with running_router(num_simulated=0, engines=engines, serve=QUICK, ready_seconds=60.0) as running:
        yield running, engines


@pytest.mark.asyncio
async def test_a_node_is_killed_under_load(three: Cluster, tmp_path: Path) -> None:
    bodies = [
        body_of(COMPLETION, f"tell me {n} things", max_tokens=NUM_TOKENS, return_token_ids=True) for n in range(5)
    ]
    async with served(tmp_path) as (running, engines), aiohttp.ClientSession() as session:
        cluster = running.router.cluster
        assert len({engine.node_id for engine in engines}) == 3, "Ray spreads engines over nodes"
        expected = [said(await ask(session, running.url, COMPLETION, body)) for body in bodies]
        stop = asyncio.Event()
        heard: list[tuple[int, Any]] = []

        async def client(turn: int) -> None:
            while not stop.is_set():
                which = turn % len(bodies)
                heard.append((which, said(await ask(session, running.url, COMPLETION, bodies[which]))))
                turn += NUM_CLIENTS

        clients = [asyncio.create_task(client(offset)) for offset in range(NUM_CLIENTS)]
        try:
            victim = next(engine for engine in engines if engine.node_id != three.head_node.node_id)
            node_id, before = victim.node_id, victim.client.url
            await until(lambda: cluster.num_in_flight()[victim.id] > 0, "the victim has streams")
            began = time.monotonic()
            await asyncio.to_thread(kill, three, node_id)
            await until(lambda: victim.id not in cluster.statuses, "its loss is noticed")
            noticed, num_before = time.monotonic() - began, len(heard)
            await until(lambda: len(heard) >= num_before + NUM_CLIENTS, "streams end while it is gone")
            await until(lambda: victim.id in cluster.statuses, "Ray started it again", seconds=90)
            back = time.monotonic() - began
            num_back = len(heard)
            await until(lambda: len(heard) >= num_back + 2 * NUM_CLIENTS, "streams go on")
        finally:
            stop.set()
            await asyncio.gather(*clients)
        wrong = [each for which, each in heard if each != expected[which]]
        num_resumed = cluster.machine.counts().num_resumed
        print(
            f"noticed after {noticed:.1f} s, back after {back:.1f} s; "
            f"{len(heard)} streams, {len(wrong)} wrong, {num_resumed} went on elsewhere"
        )
        assert not wrong, wrong[0]
        assert num_resumed
        assert victim.node_id != node_id
        assert victim.client.url != before
        cluster.machine.check()


def rota_serve(address: str, folder: Path, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "rota.cli.main", "serve", "--engine", "simulated", "--port", "0", "--json"),
            *("--on", f"ray={address}", "--run-dir", str(folder), "--drain", "5", *words),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def url_of(router: "subprocess.Popen[str]") -> str:
    lines = []
    for line in router.stdout or ():
        lines.append(line)
        if line.startswith("}"):
            break
    assert lines, router.stderr and router.stderr.read()
    return str(json.loads("".join(lines))["url"])


def engines_of(folder: Path) -> list[int]:
    """Engine processes of this test: their command lines have the stack file that lies there."""
    return pids(str(folder / "ray-"))


def actors() -> list[dict[str, str]]:
    return list(ray.util.list_named_actors(all_namespaces=True))


@pytest.mark.asyncio
async def test_a_router_that_is_killed_leaves_its_engines_to_the_next_one(three: Cluster, tmp_path: Path) -> None:
    stack = tmp_path / "stack.toml"
    stack.write_text(STACK)
    words = ("--instances", "2", "--stack", str(stack), "--wait-for-all")
    body = body_of(COMPLETION, "tell me more")
    first = rota_serve(three.address, tmp_path, *words)
    async with aiohttp.ClientSession() as session:
        expected = said(await ask(session, url_of(first).removesuffix("/v1"), COMPLETION, body))
        running = engines_of(tmp_path)
        assert len(running) == 2
        other = rota_serve(three.address, tmp_path, *words)
        _, talk = await asyncio.to_thread(other.communicate, timeout=60)
        assert other.returncode == 1
        assert "another router uses the engine ray-0" in talk
        first.kill()
        first.communicate()
        second = rota_serve(three.address, tmp_path, *words)
        assert said(await ask(session, url_of(second).removesuffix("/v1"), COMPLETION, body)) == expected
    assert engines_of(tmp_path) == running, "an engine was started anew"
    second.send_signal(signal.SIGINT)
    _, talk = second.communicate(timeout=60)
    assert second.returncode == 0, talk
    assert "Traceback" not in talk
    assert not actors()
    await until(lambda: not engines_of(tmp_path), "the engines are gone")


@pytest.mark.asyncio
async def test_an_engine_that_dies_is_started_again_by_ray(three: Cluster, tmp_path: Path) -> None:
    async with served(tmp_path, 2) as (running, engines):
        statuses, url = running.router.cluster.statuses, engines[0].client.url
        (pid,) = pids(str(tmp_path / "ray-0"))
        os.kill(pid, signal.SIGKILL)
        await until(lambda: engines[0].id not in statuses, "its loss is noticed")
        await until(lambda: engines[0].id in statuses, "it is back")
        assert engines[0].client.url != url
        assert engines[1].id in statuses
        running.router.cluster.machine.check()
    assert not actors()
    await until(lambda: not engines_of(tmp_path), "the engines are gone")


@pytest.mark.asyncio
async def test_a_leftover_with_other_settings_is_replaced(three: Cluster, tmp_path: Path) -> None:
    cluster = RayCluster(None, Needs())
    cluster.place(plan(tmp_path, 0, seed=7))
    async with served(tmp_path, 1) as (_, engines):
        assert engines[0].given_up is None
        assert len(engines_of(tmp_path)) == 1


@pytest.mark.asyncio
async def test_an_engine_that_nobody_asks_for_ends(three: Cluster, tmp_path: Path) -> None:
    cluster = RayCluster(None, Needs())
    cluster.keep_room("ray-0", True)
    cluster.place(plan(tmp_path, 0), lease_seconds=4.0)
    await until(lambda: bool(engines_of(tmp_path)), "it runs")
    await until(lambda: not engines_of(tmp_path) and not actors(), "it is gone")
    assert not standing_request(), "nodes are kept for nobody"


@pytest.mark.asyncio
async def test_an_engine_that_never_works_is_an_error_that_says_why(three: Cluster, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no-such-profile"):
        async with served(tmp_path, 1, profile="no-such-profile"):
            pass
    assert not actors()


def test_what_no_node_has_is_named(three: Cluster) -> None:
    with pytest.raises(ConfigError, match=r"none has GPU 2 \(the most of one node is 0\), tpu 1") as raised:
        RayCluster(None, Needs(num_gpus=2, resources={"tpu": 1}))
    assert "--await-nodes" in (raised.value.hint or "")
    RayCluster(None, Needs(num_gpus=2), await_nodes=True)


@pytest.mark.asyncio
async def test_an_engine_without_room_waits_says_so_and_can_be_stopped(three: Cluster, tmp_path: Path) -> None:
    stray: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: stray.append(context))
    cluster = RayCluster(None, Needs(num_cpus=64), await_nodes=True)
    engine = RayEngine(plan(tmp_path, 0), cluster)
    await engine.start()
    await until(lambda: "room" in engine._why_not, "it has asked")
    with pytest.raises(EngineError, match=r"no node of the Ray cluster has room for it yet \(CPU 64\)"):
        await engine.probe()
    await engine.stop()
    await asyncio.sleep(0.5)
    gc.collect()
    assert not actors()
    assert not stray, stray


def test_the_autoscaler_is_asked_for_room(three: Cluster) -> None:
    cluster = RayCluster(None, Needs(num_cpus=0.5, resources={"tpu": 1}), await_nodes=True)
    asked = []
    for name, wanted in (("a", True), ("b", True), ("a", True), ("a", False), ("b", False)):
        cluster.keep_room(name, wanted)
        asked.append(standing_request())
    assert [len(bundles) for bundles in asked] == [1, 2, 2, 1, 0]
    assert asked[0] == [{"CPU": 0.5, "tpu": 1.0}]
