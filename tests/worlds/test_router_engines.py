"""The conformance suite of engines, called on each engine there is."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import openai
import pytest

from rota.base.errors import ConfigError, EngineError
from rota.runtime.clocks import SystemClock
from rota.runtime.live import LiveLoop
from rota.serving.assemble import SystemConfig, build
from rota.serving.engines.http_client import HttpClient
from rota.serving.engines.openai import OpenAIEngine
from rota.serving.frontdoor.simulated_server import build_server
from rota.serving.live.simulated import SimulatedEngine, simulated_engines
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.predictors.step_time.affine import AffineStepTime
from rota.serving.stack import StackConfig
from rota.testing.engine import check_engine
from rota.testing.router import running_router
from rota.testing.scripted import answers, engines_of, scripted

STEP_TIME = AffineStepTime(base_ms=3.0, token_us=0.0, kv_token_ns=0.0, seq_us=0.0)
LIMITS = InstanceLimits(num_blocks=1024)


class InProcess:
    def __init__(self, engine: SimulatedEngine) -> None:
        self.engine = engine

    def lose(self) -> None:
        self.engine.lose()

    def num_unfinished(self) -> int:
        return len(self.engine._machine.unfinished())


@contextlib.asynccontextmanager
async def in_process() -> AsyncIterator[InProcess]:
    config = SystemConfig(instances=(InstanceSpec(InstanceId("sim"), LIMITS),))
    (engine,) = simulated_engines(loop := LiveLoop(SystemClock()), build(config), config, STEP_TIME)
    yield InProcess(engine)
    await engine.stop()
    loop.close()


class OverHttp:
    def __init__(self, engine: OpenAIEngine, behind: SimulatedEngine, server: object) -> None:
        self.engine = engine
        self._behind = behind
        self._server = server

    def lose(self) -> None:
        self._server.close()  # type: ignore[attr-defined]

    def num_unfinished(self) -> int:
        return len(self._behind._machine.unfinished())


@contextlib.asynccontextmanager
async def over_http() -> AsyncIterator[OverHttp]:
    simulated = build_server(InstanceId("sim"), LIMITS, StackConfig(), STEP_TIME, seed=0)
    await simulated.server.start("127.0.0.1", 0)
    engine = OpenAIEngine(InstanceId("http"), f"http://127.0.0.1:{simulated.server.port}/v1")
    yield OverHttp(engine, simulated.engine, simulated.server)
    await engine.stop()
    simulated.server.close()
    await asyncio.sleep(0)


@pytest.mark.asyncio
async def test_the_simulated_engine_conforms() -> None:
    await check_engine(in_process)


@pytest.mark.asyncio
async def test_an_openai_server_conforms() -> None:
    await check_engine(over_http)


@pytest.mark.asyncio
async def test_a_servers_size_and_load_are_read_from_its_metrics() -> None:
    async with over_http() as under_test:
        status = await under_test.engine.probe()
        assert status.spec.limits.num_blocks == 1024
        assert status.spec.limits.block_size == 16
        assert [model["id"] for model in status.models] == ["simulated"]
        report = await under_test.engine.report()
        assert report is not None
        assert (report.num_running, report.num_free_blocks) == (0, 1024)


@pytest.mark.asyncio
async def test_only_vllm_is_sent_our_ids() -> None:
    """llama-cpp-python answers an empty 400 to an id that is no UUID."""
    async with scripted(answers) as servers:
        engines = await engines_of(servers)
        async with running_router(num_simulated=0, engines=engines) as running:
            client = openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
            await client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": "hi"}])
        assert b"x-request-id" not in servers[0].heads[0].lower()


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host", "http://", "http://host:99999", "http://host:x"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        OpenAIEngine(InstanceId("x"), url)


@pytest.mark.asyncio
async def test_a_server_that_is_not_there_says_so() -> None:
    engine = OpenAIEngine(InstanceId("x"), "http://127.0.0.1:1")
    with pytest.raises(EngineError, match="cannot connect"):
        await engine.probe()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"garbage\r\n\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 40_000, "no end"),
        (b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n", "answered 500"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc", "closed the connection"),
        (b"", "closed the connection before it answered"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "does not speak HTTP"),
    ],
)
@pytest.mark.asyncio
async def test_a_server_that_misbehaves_is_an_error_that_says_how(answer: bytes, words: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    with pytest.raises(EngineError, match=words):
        await client.fetch("GET", "/", timeout_seconds=5)
    client.close()
    server.close()


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", b"until the end"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi", b"hi"),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi", b"hi"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nh\r\n1\r\ni\r\n0\r\n\r\n", b"hi"),
    ],
)
@pytest.mark.asyncio
async def test_every_way_to_end_an_answer_is_understood(answer: bytes, body: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    assert await client.fetch("GET", "/", timeout_seconds=5) == body
    client.close()
    server.close()


@pytest.mark.asyncio
async def test_a_connection_that_was_closed_while_idle_is_not_a_failure() -> None:
    num_served = 0

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_served
        await reader.readuntil(b"\r\n\r\n")
        num_served += 1
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi")
        await reader.read(10)  # the next request meets a closing connection
        writer.close()

    server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
    client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    for _ in range(3):
        assert await client.fetch("GET", "/", timeout_seconds=5) == b"hi"
    assert num_served == 3
    client.close()
    server.close()
