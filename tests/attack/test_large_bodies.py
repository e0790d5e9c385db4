"""Large bodies, over real sockets: read beside the router, answered as small ones are, whatever becomes of the process
that reads them or of the client."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop
from tests.attack.wire import ALICE, BOB, GOOD, answer_to, error_to, get, keys_of_three, post

from rota.serving.frontdoor import http1
from rota.serving.frontdoor.keys import TenantTerms
from rota.serving.frontdoor.reading import CHAT, COMPLETIONS
from rota.serving.frontdoor.serve import ServeConfig
from rota.serving.model.events import RequestArrived
from rota.serving.model.instance import InstanceLimits
from rota.testing.router import RunningRouter, running_router

ROOM = InstanceLimits(num_blocks=400_000, max_model_len=4_000_000)
"""For prompts of two million tokens."""


def large(num_bytes: int = 600_000, **fields: Any) -> dict[str, Any]:
    return {**GOOD, "messages": [{"role": "user", "content": "lorem " * (num_bytes // 6)}], **fields}


def serve(**terms: TenantTerms) -> ServeConfig:
    return ServeConfig(port=0, keys=keys_of_three(**terms))


def child_of(running: RunningRouter) -> int | None:
    process = running.router.door.large_bodies._process
    return None if process is None else process.pid


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.01)


async def stopped_child(running: RunningRouter) -> int:
    """A process that has read something, and gets no further until it is told to."""
    assert (await answer_to(running.router.door.server.port, post(large())))[0] == 200
    child = child_of(running)
    assert child is not None
    os.kill(child, signal.SIGSTOP)
    return child


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.asyncio
async def test_small_bodies_start_no_process_and_large_ones_share_one_that_goes_with_the_router(keys: bool) -> None:
    key = ALICE if keys else None
    config = serve() if keys else ServeConfig(port=0)
    async with running_router(num_simulated=2, limits=ROOM, serve=config) as running:
        port = running.router.door.server.port
        assert (await answer_to(port, post(large(100_000), key=key)))[0] == 200
        for num, path in ((30_000, COMPLETIONS), (50_000, CHAT)):
            ids = {"prompt": "x" * num, "messages": GOOD["messages"], "max_tokens": 2}
            assert (await answer_to(port, post(ids, path=path, key=key)))[0] == 200
        assert child_of(running) is None
        assert (await answer_to(port, post({"prompt": "x" * 50_000}, path=COMPLETIONS, key=key)))[0] == 200
        assert child_of(running) is not None
        for body in (large(), large(8_000_000), large(max_tokens=3)):
            status, _, answer = await answer_to(port, post(body, key=key))
            assert (status, json.loads(answer)["object"]) == (200, "chat.completion")
        first = child_of(running)
        assert first is not None
        heard = await streamed(port, post(large(7_000_000, stream=True), "connection: close", key=key))
        assert heard.startswith(b"HTTP/1.1 200")
        assert heard.count(b"data: ") > 2
        assert b"data: [DONE]" in heard
        refused = {
            "no JSON": b"{" * 600_000,
            "of no type": large(max_tokens="x"),
            "not UTF-8": b'"' + b"\xff" * 600_000,
        }
        assert [(await error_to(port, post(body, key=key)))[::2] for body in refused.values()] == [
            (400, "malformed_json"), (400, "invalid_type"), (400, "malformed_json"),
        ]  # fmt: skip
        assert child_of(running) == first, "one process reads them all"
    assert not Path(f"/proc/{first}").exists()


async def streamed(port: int, sent: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    heard = await asyncio.wait_for(reader.read(-1), 30)
    writer.close()
    return heard


@pytest.mark.asyncio
async def test_what_a_key_does_not_grant_is_refused_in_large_bodies_too() -> None:
    async with running_router(num_simulated=1, limits=ROOM, serve=serve()) as running:
        port = running.router.door.server.port
        claimed = large(vllm_xargs={"tenant": "bob"})
        assert await error_to(port, post(claimed)) == (403, "vllm_xargs.tenant", "not_granted")
        assert await error_to(port, post(large(priority=-6))) == (403, "priority", "not_granted")
        header = "x-gateway-inference-fairness-id"
        assert await error_to(port, post(large(), f"{header}: bob")) == (403, header, "not_granted")
        assert child_of(running) is not None


@pytest.mark.asyncio
async def test_others_are_served_while_a_body_is_read_and_it_arrived_when_it_was_complete() -> None:
    async with running_router(num_simulated=1, limits=ROOM, serve=serve()) as running:
        port = running.router.door.server.port
        child = await stopped_child(running)
        asked = asyncio.create_task(answer_to(port, post(large(7_000_000))))
        await until(lambda: running.router.door.large_bodies.num_unread == 1)
        between = running.router.cluster.loop.now()
        assert (await answer_to(port, post(GOOD, key=BOB)))[0] == 200
        assert running.router.num_unfinished == 1
        os.kill(child, signal.SIGCONT)
        assert (await asked)[0] == 200
        rows = [row for row in running.journal.rows if isinstance(row.event, RequestArrived)]
        assert rows[-1].event.request.arrived_at < between < rows[-1].at


@pytest.mark.asyncio
async def test_a_child_killed_in_the_middle_costs_one_body_a_503_and_the_next_is_read(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running_router(num_simulated=1, limits=ROOM, serve=serve()) as running:
        port = running.router.door.server.port
        child = await stopped_child(running)
        asked = asyncio.create_task(answer_to(port, post(large(7_000_000))))
        await until(lambda: running.router.door.large_bodies._being_read)
        waits = asyncio.create_task(answer_to(port, post(large(), key=BOB)))
        await until(lambda: running.router.door.large_bodies.num_unread == 2)
        os.kill(child, signal.SIGKILL)
        status, headers, body = await asked
        assert (status, headers["retry-after"], json.loads(body)["error"]["code"]) == (503, "1", "body_not_read")
        assert (await waits)[0] == 200
        assert child_of(running) not in (None, child)
        assert not running.router.cluster.flights
    assert "the process that reads large bodies was lost" in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.asyncio
async def test_who_leaves_while_its_body_waits_or_is_read_leaves_nothing_behind() -> None:
    async with running_router(num_simulated=1, limits=ROOM, serve=serve()) as running:
        door = running.router.door
        child = await stopped_child(running)
        num_before = door.server._connections
        writers = []
        for number in range(3):
            _, writer = await asyncio.open_connection("127.0.0.1", door.server.port)
            writer.write(post(large(1_000_000)))
            writers.append(writer)
            await until(lambda number=number: door.large_bodies.num_unread == number + 1)  # type: ignore[misc]
        for writer in writers:
            writer.transport.abort()
        await until(lambda: not num_before)
        assert door.large_bodies.num_unread == 0
        assert not door.large_bodies._waiting
        os.kill(child, signal.SIGCONT)
        assert (await answer_to(door.server.port, post(large(), key=BOB)))[0] == 200
        counts = running.router.cluster.machine.counts()
        assert (counts.num_finished, counts.num_failed) == (2, 0), "nothing of theirs was submitted"
        page = (await answer_to(door.server.port, get("/metrics")))[2].decode()
        assert 'outcome="left",tenant="alice"} 3.0' in page


@pytest.mark.asyncio
async def test_draining_waits_for_what_is_read_and_stopping_says_so() -> None:
    async with running_router(num_simulated=1, limits=ROOM, serve=serve()) as running:
        router = running.router
        child = await stopped_child(running)
        asked = [asyncio.create_task(answer_to(router.door.server.port, post(large()))) for _ in range(3)]
        await until(lambda: router.door.large_bodies.num_unread == 3)
        assert await router.drain(0.1) == 3
        os.kill(child, signal.SIGCONT)
        assert await router.drain(20.0) == 0
        assert [status for status, _, _ in await asyncio.gather(*asked)] == [200] * 3
    async with running_router(num_simulated=1, limits=ROOM, serve=serve()) as running:
        child = await stopped_child(running)
        door = running.router.door
        asked = [asyncio.create_task(answer_to(door.server.port, post(large()))) for _ in range(3)]
        await until(lambda: door.large_bodies.num_unread == 3)
    for status, _, body in await asyncio.gather(*asked):
        assert (status, json.loads(body)["error"]["code"]) == (503, "shutting_down")
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.asyncio
async def test_large_bodies_in_a_pipeline_are_answered_in_their_order() -> None:
    async with running_router(num_simulated=1, limits=ROOM, serve=serve()) as running:
        bodies = [large(), GOOD, large(vllm_xargs={"tenant": "bob"}), GOOD]
        sent = b"".join(post(body) for body in bodies) + post(large(300_000), "connection: close")
        heard = await streamed(running.router.door.server.port, sent)
        assert [part[:3] for part in heard.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"403", b"200", b"200"]


def test_of_one_connection_little_is_read_in_a_pass_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system would hand on megabytes at once, and everybody else would wait for that."""
    in_this_pass, most = 0, 0
    received = http1.HttpConnection.data_received

    def counted(self: http1.HttpConnection, data: bytes) -> None:
        nonlocal in_this_pass, most
        in_this_pass += len(data)
        most = max(most, in_this_pass)
        received(self, data)

    def next_pass() -> None:
        nonlocal in_this_pass
        in_this_pass = 0
        asyncio.get_running_loop().call_soon(next_pass)

    async def scenario() -> None:
        async with running_router(num_simulated=1, limits=ROOM, serve=serve()) as running:
            monkeypatch.setattr(http1.HttpConnection, "data_received", counted)
            next_pass()
            assert (await answer_to(running.router.door.server.port, post(large(8_000_000))))[0] == 200

    uvloop.run(scenario())
    assert 0 < most <= 512 * 1024


SERVE = """
import asyncio, sys, time
sys.path[:0] = {path!r}
from tests.attack.test_large_bodies import ROOM, answer_to, child_of, large, post
from rota.serving.frontdoor.serve import ServeConfig
from rota.testing.router import running_router

async def main():
    async with running_router(num_simulated=1, limits=ROOM, serve=ServeConfig(port=0)) as running:
        await answer_to(running.router.door.server.port, post(large(), key=None))
        print(child_of(running), flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


def test_a_router_that_is_killed_leaves_no_process() -> None:
    script = SERVE.format(path=[str(Path(__file__).resolve().parents[2])])
    router = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert router.stdout is not None
        child = Path("/proc") / router.stdout.readline().strip()
        assert child.exists()
    finally:
        router.kill()
        router.wait()
    deadline = time.monotonic() + 20
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not child.exists() or " Z " in (child / "stat").read_text()
