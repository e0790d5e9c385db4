"""Real vLLM engines on three Ray nodes, one of which is killed under load.

pytest -m live -s tests/live/test_ray_vllm.py
"""

import asyncio
import time
from pathlib import Path

import aiohttp
import pytest

pytest.importorskip("ray", reason="the extra ray is not installed")
from tests.live.ray_nodes import kill, members, nodes, pids, until
from tests.live.test_failover import Heard, ask, body_of, wrong_among

from rota.serving.engines.model_package import prepare_model
from rota.serving.engines.ray.cluster import Needs, RayCluster
from rota.serving.engines.ray.engine import RayEngine
from rota.serving.engines.ray.plans import VllmPlan
from rota.serving.frontdoor.serve import ServeConfig
from rota.serving.live.watch import WatchSettings
from rota.testing.router import running_router

pytestmark = pytest.mark.live

SERVE = ServeConfig(port=0, watch=WatchSettings(interval_seconds=0.5, starting_interval_seconds=0.5))
SETTINGS = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 512}
NUM_CLIENTS = 4
START_SECONDS = 400.0
"""A vLLM takes a minute to start here, and several where the machine is busy."""


@pytest.mark.asyncio
async def test_a_node_is_killed_under_load(tmp_path: Path) -> None:
    prepare_model()
    # Room for one engine on each node but the head: the third one is for whoever loses its node.
    with nodes(3, num_cpus=1) as ray_nodes:
        cluster = RayCluster(None, Needs())
        plans = [VllmPlan(f"ray-{i}", str(tmp_path), cores=str(i), options=SETTINGS) for i in range(2)]
        # A machine that is busy is no reason to take an engine for dead: a node that is gone is noticed otherwise.
        engines = [RayEngine(plan, cluster, probe_timeout_seconds=60.0) for plan in plans]
        bodies = [body_of(index, chat=chat, max_tokens=60) for index in range(3) for chat in (True, False)]
        async with (
            running_router(num_simulated=0, engines=engines, serve=SERVE, ready_seconds=START_SECONDS) as running,
            aiohttp.ClientSession() as session,
        ):
            router, statuses = running.router.cluster, running.router.cluster.statuses
            expected = [await ask(session, running, body) for body in bodies]
            assert not [each for each in expected if each.errors or not each.is_done]
            stop = asyncio.Event()
            heard: list[tuple[int, Heard]] = []

            async def client(turn: int) -> None:
                while not stop.is_set():
                    which = turn % len(bodies)
                    heard.append((which, await ask(session, running, bodies[which])))
                    turn += NUM_CLIENTS

            clients = [asyncio.create_task(client(offset)) for offset in range(NUM_CLIENTS)]
            try:
                victim = next(each for each in engines if each.node_id != ray_nodes.head_node.node_id)
                node_id = victim.node_id
                assert node_id is not None
                (session_id,) = pids(f"--port {victim.client.port} ")
                assert len(members(session_id)) > 1
                # Streams that began, so that they have something to go on from.
                await until(lambda: any(router.streams_at(victim.id).values()), "the victim streams")
                began = time.monotonic()
                await asyncio.to_thread(kill, ray_nodes, node_id)
                await until(lambda: victim.id not in statuses, "its loss is noticed")
                noticed = time.monotonic() - began
                await until(lambda: not members(session_id), "nothing of the engine is left")
                await until(lambda: victim.id in statuses, "Ray started it again", seconds=START_SECONDS)
                back = time.monotonic() - began
                num_back = len(heard)
                await until(lambda: len(heard) >= num_back + 2 * NUM_CLIENTS, "streams go on", seconds=120)
            finally:
                stop.set()
                await asyncio.gather(*clients)
            num_resumed = router.machine.counts().num_resumed
            wrong = wrong_among(heard, expected)
            print(
                f"noticed after {noticed:.1f} s, back after {back:.1f} s; longest gap of a stream "
                f"{max(each.gap for _, each in heard):.1f} s; "
                f"{len(heard)} streams, {len(wrong)} wrong, {num_resumed} went on elsewhere"
            )
            assert not wrong, wrong[0]
            assert num_resumed
            assert victim.node_id != node_id
            router.machine.check()
