"""OpenAI servers that misbehave on request, on ports of their own: what a router must survive."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from rota.serving.engines.openai import OpenAIEngine
from rota.serving.model.instance import InstanceId

Script = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]

DELTA = {"index": 0, "delta": {"content": "hi"}, "finish_reason": None}
CHUNK_BODY = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [DELTA]}
CHUNK = b"data: " + json.dumps(CHUNK_BODY).encode() + b"\n\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def framed(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def plain(status: int, body: object) -> bytes:
    """A whole answer in JSON."""
    raw = json.dumps(body).encode()
    return b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (status, len(raw), raw)


class ScriptedServer:
    """A server that is healthy, and does with each POST what its script says."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.healthy = True
        self.num_posts = 0
        self.heads: list[bytes] = []
        self.gets: dict[bytes, bytes] = {}
        """Answers to further GETs, by path."""
        self.num_dropped = 0
        """POST connections that the router closed before the script was over."""
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def answers_gets(self) -> None:
        """Returns when the server answers GETs; this one always does."""

    def die(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await self.answers_gets()
                if head.startswith(b"GET") and (path := head.split(b" ")[1]) in self.gets:
                    writer.write(self.gets[path])
                elif head.startswith(b"GET /health"):
                    writer.write(plain(200 if self.healthy else 503, {}))
                elif head.startswith(b"GET /v1/models"):
                    writer.write(plain(200, {"object": "list", "data": [{"id": "scripted", "object": "model"}]}))
                elif head.startswith(b"GET"):
                    writer.write(plain(404, {}))
                else:
                    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                    body = await reader.readexactly(length)
                    self.num_posts += 1
                    self.heads.append(head)
                    script = asyncio.ensure_future(self.script(body, reader, writer))
                    gone = asyncio.ensure_future(reader.read(1))
                    await asyncio.wait((script, gone), return_when=asyncio.FIRST_COMPLETED)
                    if not script.done():
                        self.num_dropped += 1
                        script.cancel()
                        return
                    gone.cancel()
                    return  # one POST a connection keeps the script simple
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()


@asynccontextmanager
async def scripted(*scripts: Script) -> AsyncIterator[list[ScriptedServer]]:
    """One server for each script; gone when the block ends."""
    servers = [ScriptedServer(script) for script in scripts]
    try:
        yield servers
    finally:
        for server in servers:
            server.die()


async def engines_of(servers: list[ScriptedServer]) -> list[OpenAIEngine]:
    """Start the servers, and give an engine for each: `http-0`, `http-1`, …"""
    return [OpenAIEngine(InstanceId(f"http-{index}"), await server.start()) for index, server in enumerate(servers)]


async def answers(body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer well: `fine`, or a stream of two `hi`."""
    message = {"role": "assistant", "content": "fine"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}
    full = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    if b'"stream": true' in body or b'"stream":true' in body:
        writer.write(STREAM_HEAD + framed(CHUNK) + framed(CHUNK) + framed(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    else:
        writer.write(plain(200, full))
    await writer.drain()


async def drops_at_once(body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close the connection without a word."""
    writer.transport.abort()


async def drops_after_head(body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close it after the head of an answer."""
    writer.write(STREAM_HEAD if b"stream" in body else b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{")
    await writer.drain()
    await asyncio.sleep(0.02)
    writer.transport.abort()


async def drops_mid_stream(body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close it after the first event of a stream."""
    writer.write(STREAM_HEAD + framed(CHUNK))
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.transport.abort()


async def breaks(body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer 500."""
    writer.write(plain(500, {"error": {"message": "boom", "type": "InternalServerError", "param": None, "code": 500}}))
    await writer.drain()


async def speaks_no_http(body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer with something that is not HTTP."""
    writer.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
    await writer.drain()


async def hangs(body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Never answer."""
    await asyncio.sleep(60)
