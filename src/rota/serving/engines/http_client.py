"""HTTP/1.1, the client's side, on llhttp: pooled connections to one server, answers handed on as they come."""

import asyncio
import ssl
from collections.abc import Callable
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from rota.base.errors import ConfigError, EngineError
from rota.serving.engines.chunks import are_whole_chunks

Headers = list[tuple[bytes, bytes]]

_NUM_IDLE_MAX = 512
_HEAD_BYTES_MAX = 64 * 1024
_PASS_BYTES = 256 * 1024
"""Of a body no more is written in a pass of the event loop."""


class ResponseSink(Protocol):
    """Who hears a response: see `rota.serving.engines.engine.AnswerSink`."""

    @property
    def on_chunks(self) -> Callable[[bytes], bool] | None: ...
    def on_head(self, status: int, headers: Headers) -> None: ...
    def on_data(self, data: bytes) -> None: ...
    def on_end(self) -> None: ...
    def on_failed(self, reason: str) -> None: ...


class HttpClient:
    """Sends requests to one server, over as many connections as there are requests under way."""

    def __init__(self, url: str, *, connect_timeout_seconds: float = 5.0) -> None:
        """`url` is the server's root; a path on it is put before every path asked for. Raises `ConfigError`."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            raise ConfigError(f"{url}: the port is not a number from 0 to 65535") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url}: not the URL of a server", hint="write it like http://127.0.0.1:8000")
        self.url = url
        self.host = parts.hostname
        self.port = port or (443 if parts.scheme == "https" else 80)
        self._prefix = parts.path.rstrip("/").encode()
        self._host_header = parts.netloc.rpartition("@")[2].encode()
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._connect_timeout = connect_timeout_seconds
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()

    def send(
        self,
        method: str,
        path: str,
        headers: Headers,
        body: bytes | memoryview,
        sink: ResponseSink,
        *,
        lead: bytes = b"",
    ) -> "Call":
        """Send one request, `lead` being the beginning of its body; returns the handle to cancel it with. The sink is
        never called from in here."""
        head = [b"%b %b%b HTTP/1.1\r\nhost: %b\r\n" % (method.encode(), self._prefix, path.encode(), self._host_header)]
        head.extend([b"%b: %b\r\n" % header for header in headers])
        if body or method == "POST":
            head.append(b"content-length: %d\r\n" % (len(lead) + len(body)))
        head.append(b"\r\n")
        head.append(lead)
        call = Call(self, b"".join(head), body, sink)
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closing():
                call.is_reused = True
                connection.begin(call)
                return call
        call.dial()
        return call

    async def fetch(
        self, method: str, path: str, *, timeout_seconds: float, body: bytes = b"", body_bytes_max: int = 4 << 20
    ) -> bytes:
        """A small answer in one piece; `body` is JSON. Raises `EngineError` unless it is 200 and in time."""
        collected = _Collected(body_bytes_max)
        headers = [(b"content-type", b"application/json")] if body else []
        call = self.send(method, path, headers, body, collected)
        try:
            # Not `wait_for`: until Python 3.12 it may lose a cancellation that comes with the answer.
            async with asyncio.timeout(timeout_seconds):
                status = await collected.done
        except TimeoutError:
            raise EngineError(f"{self.url}{path}: no answer within {timeout_seconds:g} s") from None
        except EngineError as error:
            raise EngineError(f"{self.url}{path}: {error.message}") from None
        finally:
            call.cancel()
        if status != 200:
            raise EngineError(f"{self.url}{path}: answered {status}")
        return b"".join(collected.body)

    def close(self) -> None:
        """Close every connection; requests under way fail."""
        for connection in list(self._open):
            connection.close()
        self._idle.clear()

    async def connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        connecting = loop.create_connection(lambda: _Connection(self), self.host, self.port, ssl=self._ssl)
        async with asyncio.timeout(self._connect_timeout):
            _, connection = await connecting
        return connection

    def opened(self, connection: "_Connection") -> None:
        self._open.add(connection)

    def closed(self, connection: "_Connection") -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def released(self, connection: "_Connection") -> None:
        if len(self._idle) < _NUM_IDLE_MAX:
            self._idle.append(connection)
        else:
            connection.close()


class Call:
    """One request under way."""

    __slots__ = ("_body", "_client", "_connection", "_dialling", "_head", "is_over", "is_reused", "sink")

    def __init__(self, client: HttpClient, head: bytes, body: bytes | memoryview, sink: ResponseSink) -> None:
        self._client = client
        self._head = head
        self._body: bytes | memoryview = body
        self.sink = sink
        self._connection: _Connection | None = None
        self._dialling: asyncio.Task[None] | None = None
        self.is_over = False
        self.is_reused = False
        """It went out on a connection that had served before, and which the server may have been about to close."""

    def cancel(self) -> None:
        """Close the connection, which makes the server stop; the sink hears nothing more."""
        self.is_over = True
        if self._dialling is not None:
            self._dialling.cancel()
        if self._connection is not None:
            self._connection.close()

    def pause(self, paused: bool) -> None:
        """Stop or go on reading the answer."""
        if self._connection is not None:
            self._connection.pause(paused)

    def dial(self) -> None:
        self._dialling = asyncio.get_running_loop().create_task(self._dial())

    async def _dial(self) -> None:
        try:
            connection = await self._client.connect()
        except TimeoutError:
            self.failed("connecting took too long")
        except OSError as error:
            self.failed(f"cannot connect: {error.strerror or error}")
        else:
            self._dialling = None
            if self.is_over:
                connection.close()
            else:
                connection.begin(self)

    # --- from the connection -----------------------------------------------------------------------------------------

    def begun(self, connection: "_Connection") -> tuple[bytes, bytes | memoryview]:
        """Head and body, for the connection to send."""
        self._connection = connection
        return self._head, self._body

    def head(self, status: int, headers: Headers) -> None:
        if not self.is_over:
            self._body = b""
            self.sink.on_head(status, headers)

    def ended(self) -> None:
        self._connection = None
        if not self.is_over:
            self.is_over = True
            self.sink.on_end()

    def failed(self, reason: str) -> None:
        self._connection = None
        if not self.is_over:
            self.is_over = True
            self.sink.on_failed(reason)

    def lost(self, reason: str, *, was_silent: bool) -> None:
        """The connection broke. One that had idled may have been closed just as we wrote: try once more on a new
        one."""
        self._connection = None
        if self.is_reused and was_silent and not self.is_over:
            self.is_reused = False
            self.dial()
        else:
            self.failed(reason)


class _Connection(asyncio.Protocol):
    """One connection: at most one call at a time."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._body: list[bytes] = []
        # What the parser says of a body. Bound to the list itself: this is called for every token of a stream.
        self.on_body = self._body.append
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._call: Call | None = None
        self._is_full = False
        """The server takes no more for now."""
        self._reset()

    def _reset(self) -> None:
        self._headers: Headers = []
        self._body.clear()
        self._num_head_bytes = 0
        self._is_headed = False
        self._is_complete = False
        self._ends_with_connection = False
        self._is_silent = True
        self._keep_alive = True
        self._paused = False
        self._unsent = memoryview(b"")
        """What is still to be written of the request's body."""
        self._is_chunked = False
        self._is_in_chunk = False
        self._pass_on: Callable[[bytes], bool] | None = None
        """Takes whole chunks unparsed, or says that they are to be parsed; None where the parser has to see what comes
        next."""

    def begin(self, call: Call) -> None:
        self._reset()
        self._call = call
        assert self._transport is not None
        head, body = call.begun(self)
        if len(body) <= _PASS_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._unsent = memoryview(body)
            self._write_on()

    def _write_on(self) -> None:
        """Write some of a large body in this pass of the event loop, and some in the next: at once it would hold up
        everybody."""
        if self._transport is None or self._is_full or not self._unsent:
            return
        part, self._unsent = self._unsent[:_PASS_BYTES], self._unsent[_PASS_BYTES:]
        self._transport.write(part)
        asyncio.get_running_loop().call_soon(self._write_on)

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        self._write_on()

    def is_closing(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def pause(self, paused: bool) -> None:
        if self._transport is None or paused == self._paused:
            return
        self._paused = paused
        if paused:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    # --- what the event loop says ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._client.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._client.closed(self)
        call, self._call = self._call, None
        if call is None:
            return
        if self._is_headed and self._ends_with_connection and exc is None:
            call.ended()
        else:
            why = f"the connection broke: {exc}" if exc is not None else "the server closed the connection"
            call.lost(why + (" before it answered" if self._is_silent else ""), was_silent=self._is_silent)

    def data_received(self, data: bytes) -> None:
        # Nearly all that a router does happens here: an event of a stream, which is a whole chunk, goes on as it came.
        # The parser is between two chunks then, and does not miss one that it is not shown.
        pass_on = self._pass_on
        if pass_on is not None and are_whole_chunks(data) and pass_on(data):
            return
        call = self._call
        if call is None:  # Bytes that nobody asked for.
            self.close()
            return
        self._is_silent = False
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._call = None
            self.close()
            call.failed(f"the server does not speak HTTP/1.1: {error}")
            return
        if not self._is_headed:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > _HEAD_BYTES_MAX:
                self._call = None
                self.close()
                call.failed("the server's headers have no end")
            return
        if self._body:
            body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
            self._body.clear()
            if not call.is_over:
                call.sink.on_data(body)
        if self._is_complete:
            self._call = None
            if self._keep_alive and not self._paused and not call.is_over and not self._unsent:
                self._client.released(self)
            else:
                self.close()
            call.ended()
        elif self._is_chunked:
            # After a chunk that is complete its line end is the last that was read, unless more of the next one was.
            is_between = not self._is_in_chunk and data.endswith(b"\r\n")
            self._pass_on = call.sink.on_chunks if is_between else None

    # --- what the parser says ----------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            self._headers = []
            return
        self._is_headed = True
        self._keep_alive = self._parser.should_keep_alive()
        sized = any(name in (b"content-length", b"transfer-encoding") for name, _ in self._headers)
        self._ends_with_connection = not sized and status not in (204, 304)
        self._is_chunked = any(
            name == b"transfer-encoding" and value.lower() == b"chunked" for name, value in self._headers
        )
        if self._call is not None:
            self._call.head(status, self._headers)

    def on_chunk_header(self) -> None:
        self._is_in_chunk = True

    def on_chunk_complete(self) -> None:
        self._is_in_chunk = False

    def on_message_complete(self) -> None:
        if self._is_headed:
            self._is_complete = True


class _Collected:
    """A sink that keeps a small body."""

    on_chunks = None

    def __init__(self, body_bytes_max: int) -> None:
        self.body: list[bytes] = []
        self.done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._room = body_bytes_max
        self._status = 0

    def on_head(self, status: int, headers: Headers) -> None:
        self._status = status

    def on_data(self, data: bytes) -> None:
        self._room -= len(data)
        if self._room >= 0:
            self.body.append(data)
        else:
            self.on_failed("the answer is too large")

    def on_end(self) -> None:
        if not self.done.done():
            self.done.set_result(self._status)

    def on_failed(self, reason: str) -> None:
        if not self.done.done():
            self.done.set_exception(EngineError(reason))
