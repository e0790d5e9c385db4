"""Streams whose events come one by one, which is when they pass the router unparsed: over real sockets, raw."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httptools
import pytest
from tests.worlds.test_router import until

from rota.testing.router import RunningRouter, running_router
from rota.testing.scripted import CHUNK, STREAM_HEAD, Script, engines_of, framed, scripted

NUM_EVENTS = 5
USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 5}}\n\n'
DONE = b"data: [DONE]\n\n"
BLOCK = framed(b"x" * 65_536)
NUM_BLOCKS = 800


def writes(*pieces: bytes, last: bytes | None = b"0\r\n\r\n") -> Script:
    """Send a stream in these pieces, each on its own; then end it, or with None break off."""

    async def script(body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in (STREAM_HEAD, *pieces):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)
        if last is None:
            writer.transport.abort()
        else:
            writer.write(last)
            await writer.drain()

    return script


async def ask(running: RunningRouter, version: str = "1.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Ask for a stream, by hand."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.router.door.server.port, limit=65_536)
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/{version}\r\nhost: x\r\nconnection: close\r\n"
    writer.write(f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    return reader, writer


@asynccontextmanager
async def router_over(script: Script) -> AsyncIterator[RunningRouter]:
    async with scripted(script) as servers:
        engines = await engines_of(servers)
        async with running_router(num_simulated=0, engines=engines) as running:
            yield running


class Answer:
    """An answer as a strict parser reads it."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.is_whole = False
        self._parser = httptools.HttpResponseParser(self)

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.is_whole = True

    async def read(self, reader: asyncio.StreamReader) -> "Answer":
        while data := await reader.read(65_536):
            self._parser.feed_data(data)
        return self


@pytest.mark.asyncio
async def test_events_arrive_as_they_were_sent_and_their_tokens_are_counted() -> None:
    async with router_over(writes(*[framed(CHUNK)] * NUM_EVENTS, framed(USAGE), framed(DONE))) as running:
        reader, writer = await ask(running)
        answer = await Answer().read(reader)
        writer.close()
        assert answer.is_whole
        assert answer.body == CHUNK * NUM_EVENTS + USAGE + DONE
        assert b"rota:generation_tokens_total 5.0" in running.router.door.telemetry.page()


@pytest.mark.asyncio
async def test_an_old_client_gets_the_events_without_framing() -> None:
    async with router_over(writes(*[framed(CHUNK)] * NUM_EVENTS, framed(DONE))) as running:
        reader, writer = await ask(running, version="1.0")
        head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
        writer.close()
        assert b"transfer-encoding" not in head
        assert body == CHUNK * NUM_EVENTS + DONE


@pytest.mark.asyncio
async def test_a_server_that_dies_within_an_event_leaves_a_stream_that_ends_in_an_error() -> None:
    half = framed(CHUNK)[:40]
    async with router_over(writes(*[framed(CHUNK)] * NUM_EVENTS, half, last=None)) as running:
        reader, writer = await ask(running)
        answer = await Answer().read(reader)
        writer.close()
        assert answer.is_whole, "the framing is in order"
        assert answer.body.startswith(CHUNK * NUM_EVENTS)
        *_, last = answer.body.removesuffix(b"\n\n").split(b"\n\n")
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_lost"


@pytest.mark.asyncio
async def test_a_client_that_does_not_read_makes_the_engine_wait_and_gets_everything_in_the_end() -> None:
    num_sent = 0

    async def floods(body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_sent
        writer.write(STREAM_HEAD)
        for _ in range(NUM_BLOCKS):
            writer.write(BLOCK)
            await writer.drain()
            num_sent += 1
        writer.write(framed(DONE) + b"0\r\n\r\n")
        await writer.drain()

    async with router_over(floods) as running:
        reader, writer = await ask(running)
        before = -1
        while num_sent != before:
            before = num_sent
            await asyncio.sleep(0.3)
        assert 0 < num_sent < NUM_BLOCKS / 2, "the router holds what a client does not read"
        (connection,) = [each for each in running.router.door.server._connections if each._current is not None]
        assert connection.transport is not None
        assert connection.transport.get_write_buffer_size() < 2 * running.router.config.http.write_buffer_bytes
        answer = await Answer().read(reader)
        writer.close()
        assert answer.is_whole
        assert len(answer.body) == NUM_BLOCKS * 65_536 + len(DONE)
        await until(lambda: not running.router.cluster.flights, "it ended")
