"""The server's side of HTTP/1.1: framing, order, patience and its limits."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rota.serving.frontdoor.exchange import Exchange
from rota.serving.frontdoor.http1 import HttpLimits, HttpServer

OK = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b"


@asynccontextmanager
async def serving(handle: Callable[[Exchange], None], **limits: float) -> AsyncIterator[HttpServer]:
    server = HttpServer(handle, limits=HttpLimits(**limits))  # type: ignore[arg-type]
    await server.start("127.0.0.1", 0)
    yield server
    server.close()
    await asyncio.sleep(0)


def echo(exchange: Exchange) -> None:
    exchange.respond(200, [], f"{exchange.request.method} {exchange.request.path} ".encode() + exchange.request.body)


async def talk(server: HttpServer, *parts: bytes, pause: float = 0.0) -> bytes:
    """Send the parts, then read until the server closes or says nothing for a while."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    for part in parts:
        writer.write(part)
        await asyncio.sleep(pause)
    heard = b""
    try:
        while data := await asyncio.wait_for(reader.read(65536), 0.3):
            heard += data
    except TimeoutError:
        pass
    writer.close()
    return heard


@pytest.mark.asyncio
async def test_requests_on_one_connection_are_answered_in_their_order() -> None:
    waiting: list[Exchange] = []
    async with serving(waiting.append) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"".join(b"GET /%d HTTP/1.1\r\nhost: t\r\n\r\n" % index for index in range(40)))
        for index in range(40):
            while not waiting:
                await asyncio.sleep(0.001)
            assert len(waiting) == 1, "a second request was handed out before the first was answered"
            exchange = waiting.pop()
            assert exchange.request.path == f"/{index}"
            exchange.respond(200, [], b"%d" % index)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            assert await reader.readexactly(len(str(index))) == b"%d" % index
        writer.close()


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((b"GET /a HTTP/1.1\r\n\r\n",), b"GET /a "),
        (tuple(bytes([byte]) for byte in b"GET /a?b=c HTTP/1.1\r\nhost: t\r\n\r\n"), b"GET /a "),
        ((b"POST /a HTTP/1.1\r\ncontent-length: 3\r\n\r\nabc",), b"POST /a abc"),
        ((b"POST /a HTTP/1.1\r\ncontent-length: 3\r\n\r\n", b"a", b"bc"), b"POST /a abc"),
        ((b"POST /a HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n",), b"POST /a abc"),
        ((b"GET http://host/a HTTP/1.1\r\nhost: t\r\n\r\n",), b"GET /a "),
        ((b"POST /a HTTP/1.1\r\nupgrade: h2c\r\nconnection: upgrade\r\ncontent-length: 1\r\n\r\nz",), b"POST /a z"),
        ((b"GET /a HTTP/1.1\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",), b"GET /a "),
    ],
)
@pytest.mark.asyncio
async def test_every_legal_framing_is_understood(parts: tuple[bytes, ...], expected: bytes) -> None:
    async with serving(echo) as server:
        assert await talk(server, *parts, pause=0.001) == OK % (len(expected), expected)


@pytest.mark.asyncio
async def test_a_head_request_gets_no_body() -> None:
    async with serving(echo) as server:
        heard = await talk(server, b"HEAD /a HTTP/1.1\r\n\r\n")
    assert heard == b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n"


@pytest.mark.asyncio
async def test_expecting_continue_is_answered_before_the_body() -> None:
    async with serving(echo) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /a HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"hi")
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        writer.close()


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.asyncio
async def test_streams_are_chunked_or_end_with_the_connection(version: bytes) -> None:
    def stream(exchange: Exchange) -> None:
        exchange.start(200, [], b"one")
        exchange.write(b"")
        exchange.write(b"two")
        exchange.end(b"three")
        exchange.write(b"too late")
        exchange.end()

    async with serving(stream) as server:
        heard = await talk(server, b"GET / HTTP/%b\r\nhost: t\r\n\r\n" % version)
    body = heard.split(b"\r\n\r\n", 1)[1]
    if version == b"1.1":
        assert body == b"3\r\none\r\n3\r\ntwo\r\n5\r\nthree\r\n0\r\n\r\n"
    else:
        assert b"connection: close" in heard
        assert body == b"onetwothree"


@pytest.mark.parametrize("header", [b"connection: close\r\n", b""])
@pytest.mark.asyncio
async def test_the_connection_stays_open_unless_the_client_wants_otherwise(header: bytes) -> None:
    async with serving(echo) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /a HTTP/1.1\r\n%b\r\n" % header)
        await reader.readuntil(b"GET /a ")
        if header:
            assert await asyncio.wait_for(reader.read(), 2) == b""
        else:
            writer.write(b"GET /b HTTP/1.1\r\n\r\n")
            assert await reader.readuntil(b"GET /b ")
        writer.close()


class Listening:
    def __init__(self) -> None:
        self.has_left = False
        self.stalls: list[bool] = []

    def client_left(self) -> None:
        self.has_left = True

    def client_stalled(self, stalled: bool) -> None:
        self.stalls.append(stalled)


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.asyncio
async def test_a_client_that_leaves_is_noticed_once_and_nothing_is_written_after(started: bool) -> None:
    listener, exchanges = Listening(), []

    def handle(exchange: Exchange) -> None:
        exchange.listener = listener
        exchanges.append(exchange)
        if started:
            exchange.start(200, [], b"x")

    async with serving(handle) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        while not exchanges:
            await asyncio.sleep(0.001)
        writer.close()
        while not listener.has_left:
            await asyncio.sleep(0.001)
        assert exchanges[0].done
        exchanges[0].write(b"y")
        exchanges[0].end()
        exchanges[0].respond(200, [], b"")
        assert not server._connections


@pytest.mark.asyncio
async def test_a_slow_reader_stalls_its_source_and_is_cut_in_the_end() -> None:
    listener = Listening()

    def handle(exchange: Exchange) -> None:
        exchange.listener = listener
        exchange.start(200, [])
        for _ in range(200):
            exchange.write(b"x" * 100_000)

    async with serving(handle, write_timeout_seconds=0.2, write_buffer_bytes=64 * 1024) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        async with asyncio.timeout(10):
            while not listener.has_left:
                await asyncio.sleep(0.01)
        assert listener.stalls[0] is True
        writer.close()


@pytest.mark.asyncio
async def test_a_slow_writer_is_told_and_an_idle_connection_closed() -> None:
    async with serving(echo, read_timeout_seconds=0.2, idle_timeout_seconds=0.2) as server:
        slow = asyncio.ensure_future(asyncio.open_connection("127.0.0.1", server.port))
        reader, writer = await slow
        writer.write(b"POST / HTTP/1.1\r\ncontent-length: 10\r\n\r\nabc")
        assert b" 408 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        with pytest.raises(ConnectionError):  # cut, without a word
            data = await asyncio.wait_for(reader.read(), 5)
            if not data:
                raise ConnectionError
        writer.close()


@pytest.mark.asyncio
async def test_connections_beyond_the_limit_are_told_so() -> None:
    async with serving(echo, max_connections=2) as server:
        opened = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(2)]
        for reader, writer in opened:
            writer.write(b"GET /a HTTP/1.1\r\n\r\n")
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        opened.append(await asyncio.open_connection("127.0.0.1", server.port))
        head = await asyncio.wait_for(opened[2][0].readuntil(b"\r\n\r\n"), 2)
        assert b" 503 " in head
        opened[0][1].write(b"GET /a HTTP/1.1\r\n\r\n")
        assert b" 200 " in await opened[0][0].readuntil(b"\r\n\r\n")
        for _, writer in opened:
            writer.close()


@pytest.mark.asyncio
async def test_a_malformed_request_waits_for_the_answers_before_it() -> None:
    waiting: list[Exchange] = []
    async with serving(waiting.append) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /a HTTP/1.1\r\n\r\nrubbish\r\n\r\n")
        await asyncio.sleep(0.02)
        waiting[0].respond(200, [], b"first")
        heard = await asyncio.wait_for(reader.read(), 5)
        assert heard.startswith(OK % (5, b"first"))
        assert b"HTTP/1.1 400 " in heard
        writer.close()


@given(
    bodies=st.lists(st.sampled_from((0, 1, 40, 3000, 9000)), min_size=1, max_size=60),
    chunked=st.lists(st.booleans(), min_size=60, max_size=60),
    cuts=st.lists(st.integers(1, 20_000), max_size=40),
)
@settings(max_examples=30, deadline=None)
def test_requests_are_the_same_however_the_bytes_of_a_pipeline_are_cut(
    bodies: list[int], chunked: list[bool], cuts: list[int]
) -> None:
    async def run() -> list[tuple[str, bytes]]:
        heard: list[tuple[str, bytes]] = []

        def handle(exchange: Exchange) -> None:
            heard.append((exchange.request.path, exchange.request.body))
            asyncio.get_running_loop().call_soon(exchange.respond, 200, [], b"")

        async with serving(handle) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            rest = wire
            for cut in cuts:
                writer.write(rest[:cut])
                rest = rest[cut:]
                await asyncio.sleep(0)
            writer.write(rest)
            for _ in expected:
                await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
            writer.close()
        return heard

    expected = [(f"/{index}", bytes([index]) * size) for index, size in enumerate(bodies)]
    wire = b"".join(
        b"POST %b HTTP/1.1\r\n" % path.encode()
        + (
            b"transfer-encoding: chunked\r\n\r\n"
            + (b"%x\r\n%b\r\n" % (len(body), body) if body else b"")
            + b"0\r\n\r\n"
            if is_chunked
            else b"content-length: %d\r\n\r\n%b" % (len(body), body)
        )
        for (path, body), is_chunked in zip(expected, chunked, strict=False)
    )
    assert asyncio.run(run()) == expected
