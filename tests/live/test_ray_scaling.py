"""Instances on a Ray cluster come and go, and nodes with them.

pytest -m slow -s tests/live/test_ray_scaling.py
"""

import asyncio
import signal
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
from tests.live.ray_nodes import alive, autoscaled, nodes, pids, standing_request, until  # noqa: E402
from tests.live.test_ray_serve import QUICK, plan, rota_serve, url_of  # noqa: E402
from tests.worlds.test_router_scaling import NEW, STACK, WISHES  # noqa: E402
from tests.worlds.test_simulated_failover import COMPLETION, ask, body_of, said  # noqa: E402

from rota.base.instant import seconds  # noqa: E402
from rota.serving.api import Start, StartOffer, StartSource, Stop  # noqa: E402
from rota.serving.engines.ray.cluster import Needs, RayCluster  # noqa: E402
from rota.serving.engines.ray.engine import RayEngine  # noqa: E402
from rota.serving.engines.ray.fleet import RayFleet  # noqa: E402
from rota.serving.engines.ray.plans import SimulatedPlan  # noqa: E402
from rota.serving.model.events import StartFailed  # noqa: E402
from rota.testing.router import running_router  # noqa: E402

pytestmark = pytest.mark.slow


async def until_still(num_nodes: int, seconds: float = 5.0) -> None:
    """Until there are so many for a while: at first Ray may count an actor that it is placing twice, and start a node
    too many, which goes when it is idle."""
    since = time.monotonic()

    def is_still() -> bool:
        nonlocal since
        if len(alive()) != num_nodes:
            since = time.monotonic()
        return time.monotonic() - since > seconds

    await until(is_still, f"{num_nodes} nodes, and no more")


@pytest.mark.asyncio
async def test_an_instance_comes_and_drains_on_nodes_that_are_there(tmp_path: Path) -> None:
    body = body_of(COMPLETION, "tell me more", max_tokens=150, return_token_ids=True)
    with nodes(2, num_cpus=1):
        cluster = RayCluster(None, Needs())
        fleet = RayFleet(
            lambda name: RayEngine(
                SimulatedPlan(name, str(tmp_path), "llama-3.1-8b-a100", stack_text=plan(tmp_path, 0).stack_text),
                cluster,
            ),
            cluster,
        )
        async with (
            running_router(
                num_simulated=0,
                engines=[RayEngine(plan(tmp_path, 0), cluster)],
                serve=QUICK,
                stack=STACK,
                ready_seconds=60.0,
                scales=True,
                fleet=fleet,
            ) as running,
            aiohttp.ClientSession() as session,
        ):
            router = running.router.cluster
            expected = said(await ask(session, running.url, COMPLETION, body))
            room = StartOffer(StartSource.PAGE_CACHE, seconds(60), 1)
            await until(lambda: list(fleet.offers()) == [room], "room for one is seen")
            WISHES.append(Start("more"))
            await until(lambda: NEW in router.statuses, "it is ready")
            assert [each["CPU"] for each in standing_request()] == [1, 1]
            streams = [asyncio.ensure_future(ask(session, running.url, COMPLETION, body)) for _ in range(6)]
            await until(lambda: router.num_in_flight().get(NEW, 0) > 0, "it gets its share")
            WISHES.append(Stop(NEW, "fewer"))
            assert [said(each) for each in await asyncio.gather(*streams)] == [expected] * 6
            await until(lambda: len(standing_request()) == 1, "its room is given back")
            await until(lambda: not pids(str(tmp_path / NEW)), "its process is gone")
            WISHES.extend([Start("one fits"), Start("two do not")])

            def failed() -> list[StartFailed]:
                return [row.event for row in running.journal.rows if isinstance(row.event, StartFailed)]

            await until(lambda: bool(failed()), "the second start fails")
            assert "no node of the Ray cluster has room for it (CPU 1)" in failed()[0].reason
            router.machine.check()
            assert not router.machine.unfinished()


@pytest.mark.asyncio
async def test_ray_adds_a_node_for_an_instance_and_takes_it_away_after(tmp_path: Path) -> None:
    stack = tmp_path / "stack.toml"
    stack.write_text(
        'scaling = "queue_reactive"\n[parameters.scaling]\n'
        "interval_seconds = 0.25\ntarget_requests = 2\nupscale_delay_seconds = 0\ndownscale_delay_seconds = 2\n"
        "[fleet]\ncool_down_seconds = 1.0\n"
    )
    body = body_of(COMPLETION, "tell me more", max_tokens=100, return_token_ids=True)
    with autoscaled(num_nodes_max=2, num_cpus=1) as address:
        words = ("--instances", "1", "--scale", "1:2", "--await-nodes", "--stack", str(stack))
        router = rota_serve(address, tmp_path, *words)
        try:
            url = (await asyncio.to_thread(url_of, router)).removesuffix("/v1")
            await until_still(2)
            before = alive()
            async with aiohttp.ClientSession() as session:
                expected = said(await ask(session, url, COMPLETION, body))
                stop, heard = asyncio.Event(), list[Any]()

                async def client() -> None:
                    while not stop.is_set():
                        heard.append(said(await ask(session, url, COMPLETION, body)))

                began = time.monotonic()
                clients = [asyncio.create_task(client()) for _ in range(4)]
                await until(lambda: bool(alive() - before), "Ray added a node", seconds=90)
                added = time.monotonic() - began
                await until(lambda: (tmp_path / f"{NEW}.log").exists(), "an engine starts there")
                num_before = len(heard)
                await until(lambda: len(heard) >= num_before + 8, "streams go on")
                stop.set()
                await asyncio.gather(*clients)
                began = time.monotonic()
                await until(lambda: not pids(str(tmp_path / NEW)), "the instance is gone")
                gone = time.monotonic() - began
                await until(lambda: len(alive()) == 2, "Ray took the node away", seconds=90)
                removed = time.monotonic() - began
                assert heard == [expected] * len(heard)
                assert said(await ask(session, url, COMPLETION, body)) == expected
            print(
                f"a node was there after {added:.1f} s; after the load the instance was gone after {gone:.1f} s, "
                f"its node after {removed:.1f} s; {len(heard)} streams, none wrong"
            )
        finally:
            router.send_signal(signal.SIGINT)
            _, talk = await asyncio.to_thread(router.communicate, timeout=60)
        assert router.returncode == 0, talk
        assert "Traceback" not in talk
        assert not standing_request()
