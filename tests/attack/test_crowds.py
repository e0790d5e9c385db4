"""Many clients, slow clients, strangers with much to say, names without end: whoever has a key is served meanwhile, and
what is kept stays bounded."""

import asyncio
import contextlib
import resource
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from tests.attack.wire import ALICE, GOOD, answer_to, get, keys_of_three, post

from rota.serving.engines.openai import OpenAIEngine
from rota.serving.frontdoor.http1 import HttpLimits
from rota.serving.frontdoor.serve import ServeConfig
from rota.serving.frontdoor.tenant_metrics import NUM_TENANTS_MAX, TenantMetrics
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import TenantId
from rota.testing.router import RunningRouter, running_router

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def crowd(port: int, num: int, sent: bytes) -> AsyncIterator[list[Connection]]:
    """So many connections, each of which says so much and no more."""
    opened: list[Connection] = []
    try:
        for _ in range(num):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            opened.append((reader, writer))
        yield opened
    finally:
        for _, writer in opened:
            writer.transport.abort()


async def until_gone(running: RunningRouter, most: int = 0) -> None:
    connections = running.router.door.server._connections
    async with asyncio.timeout(30):
        while len(connections) > most:
            await asyncio.sleep(0.05)


SLOW = {
    "silent": b"",
    "half a line": b"POST /v1/chat/comple",
    "half a head": b"GET /health HTTP/1.1\r\nx: y\r\n",
    "half a body": post(GOOD)[:-5],
}


@pytest.mark.asyncio
async def test_slow_clients_are_cut_and_keep_nobody_out() -> None:
    limits = HttpLimits(read_timeout_seconds=0.5, idle_timeout_seconds=0.5)
    async with running_router(num_simulated=1, serve=ServeConfig(port=0, keys=keys_of_three(), http=limits)) as running:
        port = running.router.door.server.port
        async with contextlib.AsyncExitStack() as stack:
            for sent in SLOW.values():
                await stack.enter_async_context(crowd(port, 50, sent))
            assert (await answer_to(port, post(GOOD)))[0] == 200
            await until_gone(running)
            assert not running.router.cluster.flights, "nothing of what is half said was taken in"
        assert (await answer_to(port, post(GOOD)))[0] == 200


@pytest.mark.asyncio
async def test_a_strangers_body_is_not_kept() -> None:
    async with running_router(num_simulated=1, serve=ServeConfig(port=0, keys=keys_of_three())) as running:
        port = running.router.door.server.port
        announced = post(b"x" * 4_000_000, key="rota-nobodys")
        async with crowd(port, 20, announced[: 3 * 1024 * 1024]) as opened:
            for reader, _ in opened:
                assert b" 401 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
            kept = [sum(map(len, each._body)) for each in running.router.door.server._connections]
            assert sum(kept) == 0
            assert (await answer_to(port, post(GOOD)))[0] == 200


@pytest.mark.asyncio
async def test_invented_names_are_nowhere_on_the_metrics_page() -> None:
    async with running_router(num_simulated=1, serve=ServeConfig(port=0)) as running:
        port = running.router.door.server.port
        for number in range(40):
            header = f"x-gateway-inference-fairness-id: invented-{number}"
            assert (await answer_to(port, post({**GOOD, "model": f"m-{number}"}, header, key=None)))[0] == 200
            await answer_to(port, get(f"/invented/{number}"))
        page = (await answer_to(port, get("/metrics")))[2].decode()
    assert "invented" not in page
    assert "m-1" not in page
    assert "tenant" not in page


def test_tenants_beyond_the_bound_share_one_label() -> None:
    registry = CollectorRegistry()
    metrics = TenantMetrics(registry)
    for number in range(3 * NUM_TENANTS_MAX):
        counts = metrics.of(TenantId(f"t{number}"))
        counts.ended("served")
        counts.prompt_tokens.inc(10)
    page = generate_latest(registry).decode().splitlines()
    prompts = {line.split()[0]: float(line.split()[1]) for line in page if "prompt_tokens_total{" in line}
    assert len(prompts) == NUM_TENANTS_MAX + 1
    assert prompts['rota:tenant_prompt_tokens_total{tenant="other"}'] == 2 * NUM_TENANTS_MAX * 10
    assert metrics.of(TenantId("t5")) is metrics.of(TenantId("t5"))
    assert len(metrics._counts) == NUM_TENANTS_MAX + 1


@pytest.mark.asyncio
async def test_what_a_tenant_had_is_on_the_metrics_page_and_in_no_other_tenants_row() -> None:
    async with running_router(num_simulated=1, serve=ServeConfig(port=0, keys=keys_of_three())) as running:
        port = running.router.door.server.port
        for _ in range(3):
            assert (await answer_to(port, post({**GOOD, "ignore_eos": True})))[0] == 200
        page = (await answer_to(port, get("/metrics")))[2].decode()
    assert 'rota:tenant_requests_total{outcome="served",tenant="alice"} 3.0' in page
    assert 'rota:tenant_generation_tokens_total{tenant="alice"} 6.0' in page
    assert "bob" not in page


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An engine that is well when probed, and whose answers have no end."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"POST"):
                break
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
            await writer.drain()
    writer.close()


@pytest.mark.asyncio
async def test_an_answer_without_end_is_broken_off_and_others_are_served() -> None:
    server = await asyncio.start_server(endless, "127.0.0.1", 0)
    evil = OpenAIEngine(InstanceId("evil"), f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    async with running_router(num_simulated=1, engines=[evil], serve=ServeConfig(port=0)) as running:
        running.router.cluster.answer_bytes_max = 1024 * 1024
        port = running.router.door.server.port
        answers = await asyncio.gather(*(answer_to(port, post(GOOD, key=None)) for _ in range(8)))
        assert [status for status, _, _ in answers] == [200] * 8, "tried again at the other engine"
        assert all(b"xxxx" not in body for _, _, body in answers)
        assert not running.router.cluster.flights
    server.close()


OPEN_MANY = """
import socket, sys
opened = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(int(sys.argv[2]))]
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.asyncio
async def test_ten_thousand_connections_cost_little_and_keep_no_tenant_out() -> None:
    num, limits = 10_000, resource.getrlimit(resource.RLIMIT_NOFILE)
    assert limits[1] >= num + 500, f"this needs {num + 500} open files: raise the hard limit (ulimit -Hn)"
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    http = HttpLimits(max_connections=num + 100, idle_timeout_seconds=600)
    try:
        async with running_router(
            num_simulated=1, serve=ServeConfig(port=0, keys=keys_of_three(), http=http)
        ) as running:
            port = running.router.door.server.port
            assert (await answer_to(port, post(GOOD)))[0] == 200
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            words = [sys.executable, "-c", OPEN_MANY, str(port), str(num)]
            crowded = await asyncio.create_subprocess_exec(*words, stdin=PIPE, stdout=PIPE)
            assert crowded.stdin is not None
            assert crowded.stdout is not None
            async with asyncio.timeout(120):
                assert await crowded.stdout.readline() == b"open\n"
                while len(running.router.door.server._connections) < num:
                    await asyncio.sleep(0.05)
            for _ in range(20):
                assert (await answer_to(port, post(GOOD, key=ALICE)))[0] == 200
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / num
            assert grown < 16, f"{grown:.1f} KiB for each connection"
            beyond = [await asyncio.open_connection("127.0.0.1", port) for _ in range(120)]
            assert (await answer_to(port, post(GOOD)))[0] == 200
            assert len(running.router.door.server._connections) <= http.max_connections
            for _, writer in beyond:
                writer.transport.abort()
            crowded.kill()
            await crowded.wait()
            await until_gone(running)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("name", [*SLOW, "with a wrong key", "on /health"])
@pytest.mark.asyncio
async def test_strangers_who_hold_every_connection_keep_no_tenant_out(name: str) -> None:
    sent = {**SLOW, "with a wrong key": post(GOOD, key="rota-nobodys")[:-5], "on /health": get("/health")}[name]
    sent = sent.replace(ALICE.encode(), b"rota-nobodys")
    http = HttpLimits(max_connections=20)
    async with running_router(num_simulated=1, serve=ServeConfig(port=0, keys=keys_of_three(), http=http)) as running:
        port = running.router.door.server.port
        kept_reader, kept = await asyncio.open_connection("127.0.0.1", port)
        kept.write(post(GOOD))
        assert b" 200 " in await asyncio.wait_for(kept_reader.readuntil(b"\r\n\r\n"), 20)
        async with crowd(port, 60, sent):
            for _ in range(10):
                assert (await answer_to(port, post(GOOD)))[0] == 200
            assert len(running.router.door.server._connections) <= 20
        kept.write(post(GOOD, "connection: close"))
        assert b" 200 " in await asyncio.wait_for(kept_reader.read(-1), 20), "a tenant's own was not cut for them"
        kept.close()
        await until_gone(running)


@pytest.mark.asyncio
async def test_without_keys_those_who_never_finish_a_request_make_room_for_those_who_do() -> None:
    http = HttpLimits(max_connections=20)
    async with running_router(num_simulated=1, serve=ServeConfig(port=0, http=http)) as running:
        port = running.router.door.server.port
        async with crowd(port, 30, post(GOOD, key=None)[:-5]):
            for _ in range(10):
                assert (await answer_to(port, post(GOOD, key=None)))[0] == 200
        await until_gone(running)
