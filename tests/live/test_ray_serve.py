"""`--on ray`: three nodes, one of them killed under load, and nobody notices.

pytest -m slow -s tests/live/test_ray_serve.py
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
from ray.cluster_utils import Cluster  # noqa: E402
from tests.live.ray_nodes import kill, nodes, until  # noqa: E402
from tests.worlds.test_simulated_failover import COMPLETION, ask, body_of, said  # noqa: E402

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


def plan(folder: Path, index: int, **changed: Any) -> SimulatedPlan:
    return SimulatedPlan(f"ray-{index}", str(folder), "llama-3.1-8b-a100", **changed)


@asynccontextmanager
async def served(folder: Path, num_engines: int = 3) -> AsyncIterator[tuple[RunningRouter, list[RayEngine]]]:
    cluster = RayCluster(None, Needs())
    engines = [RayEngine(plan(folder, index), cluster) for index in range(num_engines)]
    async with running_router(num_simulated=0, engines=engines, serve=QUICK) as running:
        await running.router.wait_ready(num_engines, timeout_seconds=60)
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
