"""Large bodies on their way to an engine: whole, in pieces that hold nobody up, and never cut short into the next."""

import asyncio
from typing import Any

import pytest

from rota.base.errors import EngineError
from rota.serving.engines import http_client
from rota.serving.engines.http_client import HttpClient

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


class Engine:
    """Reads requests, large ones after a while, and says what it read; `answers_early` before it has."""

    def __init__(self, answers_early: bool = False) -> None:
        self.bodies: list[bytes] = []
        self.num_connections = 0
        self._answers_early = answers_early

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                num = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
                if self._answers_early:
                    writer.write(OK)
                if num > 10_000_000:
                    await asyncio.sleep(0.1)
                self.bodies.append(await reader.readexactly(num))
                if not self._answers_early:
                    writer.write(OK)
        except (ConnectionError, asyncio.IncompleteReadError):
            writer.close()


async def client_of(engine: Engine) -> tuple[HttpClient, asyncio.Server]:
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    return HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"), server


@pytest.mark.asyncio
async def test_bodies_of_every_size_arrive_whole_one_after_the_other() -> None:
    engine = Engine()
    client, server = await client_of(engine)
    piece = http_client._PASS_BYTES
    sent = [bytes([65 + index]) * num for index, num in enumerate((5, piece, piece + 1, 30_000_000, 3 * piece, 1))]
    for body in sent:
        assert await client.fetch("POST", "/", timeout_seconds=20, body=body) == b"{}"
    assert engine.bodies == sent
    assert engine.num_connections == 1
    client.close()
    server.close()


@pytest.mark.asyncio
async def test_what_is_put_before_a_body_goes_with_it() -> None:
    engine = Engine()
    client, server = await client_of(engine)
    for num in (3, 2_000_000):
        heard = http_client._Collected(100)
        client.send("POST", "/", [], memoryview(b"-" + b"x" * num)[1:], heard, lead=b"first")
        assert await asyncio.wait_for(heard.done, 20) == 200
    assert engine.bodies == [b"first" + b"x" * 3, b"first" + b"x" * 2_000_000]
    client.close()
    server.close()


@pytest.mark.asyncio
async def test_a_connection_on_which_a_body_was_not_sent_to_its_end_is_not_used_again() -> None:
    """An engine may answer early, with 413 for one; what it is sent next must not pass for the rest."""
    engine = Engine(answers_early=True)
    client, server = await client_of(engine)
    assert await client.fetch("POST", "/", timeout_seconds=20, body=b"x" * 40_000_000) == b"{}"
    assert await client.fetch("POST", "/", timeout_seconds=5, body=b"small") == b"{}"
    assert (engine.bodies, engine.num_connections) == ([b"small"], 2)
    client.close()
    server.close()


@pytest.mark.asyncio
async def test_an_engine_that_reads_nothing_is_written_no_more_than_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    stopping = asyncio.Event()

    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await stopping.wait()
        writer.close()

    written: list[int] = []
    write_on = http_client._Connection._write_on

    def counted(self: Any) -> None:
        before = len(self._unsent)
        write_on(self)
        written.append(before - len(self._unsent))

    monkeypatch.setattr(http_client._Connection, "_write_on", counted)
    server = await asyncio.start_server(deaf, "127.0.0.1", 0)
    client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    with pytest.raises(EngineError, match="no answer within"):
        await client.fetch("POST", "/", timeout_seconds=0.5, body=b"x" * 100_000_000)
    assert max(written) == http_client._PASS_BYTES
    assert sum(written) < 50_000_000, "the rest waits here, once"
    stopping.set()
    client.close()
    server.close()
