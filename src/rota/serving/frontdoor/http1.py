"""HTTP/1.1, the server's side, on llhttp: one connection at a time, bounded in every direction.

A request reaches the handler when it is complete. Whatever is malformed, too large or too slow is answered here, and
never reaches it. The handler is a plain function; it answers at once or later, through the `Exchange` it was given.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import cast

import httptools
import msgspec

from rota.serving.frontdoor.exchange import REASONS, Asker, Exchange, Headers, HttpRequest
from rota.serving.frontdoor.problems import Problem

_UPGRADE_HEADERS = (b"upgrade", b"connection", b"http2-settings")
_NUM_PIPELINED_MAX = 16
_SLICE_BYTES = 2 * 1024
_PASS_BYTES = 64 * 1024
"""Of one connection no more is read in a pass of the event loop, once there is so much at once."""
_DISCARDED_BYTES_MAX = 64 * 1024 * 1024
_SWEEP_SECONDS = 1.0


class HttpLimits(msgspec.Struct, frozen=True):
    """What one client may ask of the server. Every limit has an answer: 413, 431, 408, 503."""

    max_body_bytes: int = 8 * 1024 * 1024
    """About twice the text of a prompt of a million tokens."""
    max_head_bytes: int = 32 * 1024
    """Request line and headers together."""
    max_connections: int = 8192
    """Beyond it those on which nobody who may ask has asked make room."""
    read_timeout_seconds: float = 60.0
    """From the first byte of a request to its last."""
    idle_timeout_seconds: float = 75.0
    """How long a connection may stay open between requests."""
    write_timeout_seconds: float = 300.0
    """How long a client may leave what it asked for unread, before its connection is cut."""
    write_buffer_bytes: int = 256 * 1024
    """Bytes waiting for a slow client above which its source is asked to pause."""


class HttpConnection(asyncio.Protocol):
    """One client connection. llhttp parses; this class bounds, queues and answers."""

    def __init__(self, server: "HttpServer") -> None:
        self._server = server
        self._limits = server.limits
        self._parser = httptools.HttpRequestParser(self)
        self.transport: asyncio.Transport | None = None
        self._current: Exchange | None = None
        self._pipelined: deque[Exchange] = deque()
        self._closing = False
        self._num_discarded_bytes = 0
        self.waiting_since = time.monotonic()
        """Start of the idle time, of the request being read, or of a write that does not get away."""
        self._stalled = False
        self._reading = False
        self._unread = b""
        """What was received and not parsed yet."""
        self._begin_message()

    def _begin_message(self) -> None:
        self._url = b""
        self._headers: Headers = []
        self._body: list[bytes] = []
        self._num_announced_bytes = 0
        self._num_body_bytes = 0
        self._num_head_bytes = 0
        self._in_head = True
        self._problem: Problem | None = None
        self._asker: Asker | None = None
        self._max_body_bytes = self._limits.max_body_bytes

    # --- what the event loop says ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=self._limits.write_buffer_bytes)
        if not self._server.opened(self):
            self._refuse(Problem(503, "too many connections", code="too_many_connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.closed(self)
        self._closing = True
        self.transport = None
        for exchange in [*([self._current] if self._current else []), *self._pipelined]:
            if not exchange.done:
                exchange.done = True
                if exchange.listener is not None:
                    exchange.listener.client_left()
        self._current = None
        self._pipelined.clear()

    def data_received(self, data: bytes) -> None:
        if self._closing:
            self._num_discarded_bytes += len(data)
            if self._num_discarded_bytes > _DISCARDED_BYTES_MAX:
                self.cut()
            return
        if not self._reading:
            self._reading = True
            self.waiting_since = time.monotonic()
        self._read(self._unread + data)
        if len(data) >= _PASS_BYTES and self.transport is not None and self.transport.is_reading():
            # Others have their turn between this and what else has come: the system would hand on megabytes at once.
            self.transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._read_on)

    def _read_on(self) -> None:
        if self.transport is not None and not self._closing and len(self._pipelined) < _NUM_PIPELINED_MAX:
            self.transport.resume_reading()

    def _read(self, data: bytes) -> None:
        """Parse what has come, a slice at a time, until enough requests wait for those before them. The rest is kept,
        and nothing more is read: the parser cannot be stopped, and one packet may hold a thousand requests."""
        self._unread = b""
        begin = 0
        while begin < len(data):
            if self._problem is not None or self._closing:
                return
            if len(self._pipelined) >= _NUM_PIPELINED_MAX:
                self._unread = data[begin:]
                return
            # Of a body as much as there is of it, since nothing else can be in there.
            end = begin + max(_SLICE_BYTES, self._num_announced_bytes - self._num_body_bytes)
            part = data[begin:end]
            begin = end
            if self._in_head:
                self._num_head_bytes += len(part)
            self._feed(part)

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._problem is None and not self._closing:
                self._decline_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError as error:
            if self._problem is None:
                self._problem = Problem(400, f"malformed HTTP request: {error}", code="malformed_http")
        if self._problem is None and self._in_head and self._num_head_bytes > self._limits.max_head_bytes:
            self._problem = self._head_too_large()
        if self._problem is not None:
            self._refuse(self._problem)

    def _decline_upgrade(self, rest: bytes) -> None:
        """Go on with HTTP/1.1, as a server may: some clients offer HTTP/2 with every request. The parser has stopped
        after the headers, so they are parsed again without the offer."""
        method = self._parser.get_method()
        if method == b"CONNECT":
            self._refuse(Problem(405, "CONNECT is not served here", code="method_not_allowed"))
            return
        kept = [b"%b: %b" % header for header in self._headers if header[0] not in _UPGRADE_HEADERS]
        head = b"\r\n".join([method + b" " + self._url + b" HTTP/1.1", *kept])
        self._parser = httptools.HttpRequestParser(self)
        self._feed(head + b"\r\n\r\n" + rest)

    def eof_received(self) -> bool:
        return False  # A client that will say no more is taken to have left.

    def pause_writing(self) -> None:
        self._stalled = True
        self.waiting_since = time.monotonic()
        self._tell_stalled(True)

    def resume_writing(self) -> None:
        self._stalled = False
        self._tell_stalled(False)

    def _tell_stalled(self, stalled: bool) -> None:
        if self._current is not None and self._current.listener is not None:
            self._current.listener.client_stalled(stalled)

    # --- what the parser says ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._problem is not None:
            return  # What follows a request that is refused is not answered, least of all in its place.
        head_bytes = self._num_head_bytes
        self._begin_message()
        self._num_head_bytes = head_bytes

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._problem is not None:
            return
        if self._num_head_bytes > self._limits.max_head_bytes and self._head_bytes() > self._limits.max_head_bytes:
            self._problem = self._head_too_large()
            return
        if self._server.check_head is not None:
            try:
                self._asker = self._server.check_head(self._server.path_of(self._url), self._headers)
            except Problem as problem:
                self._problem = problem
                return
            if self._asker is not None:
                self._server.recognised(self)
                if self._asker.max_body_bytes is not None:
                    self._max_body_bytes = min(self._max_body_bytes, self._asker.max_body_bytes)
        for name, value in self._headers:
            if name == b"content-length":
                self._num_announced_bytes = int(value)
                if self._num_announced_bytes > self._max_body_bytes:
                    self._problem = self._body_too_large()
                    return
            if name == b"expect" and self._parser.get_http_version() == "1.1":
                if value.lower() != b"100-continue":
                    self._problem = Problem(417, "the only expectation understood is 100-continue", param="expect")
                    return
                if self._current is None:
                    self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        if self._problem is None:
            self._num_body_bytes += len(body)
            if self._num_body_bytes > self._max_body_bytes:
                self._problem = self._body_too_large()
                self._body.clear()
            else:
                self._body.append(body)

    def on_message_complete(self) -> None:
        self._in_head = True
        self._num_head_bytes = 0
        self._reading = False
        if self._problem is not None or self._parser.should_upgrade():
            return
        if self._server.check_head is None:
            self._server.recognised(self)
        method = self._parser.get_method().decode("ascii", "replace")
        path = self._server.path_of(self._url)
        request = HttpRequest(method, path, self._headers, *self._body, asker=self._asker)
        self._body = []
        is_http11 = self._parser.get_http_version() == "1.1"
        keep_alive = self._parser.should_keep_alive() and not self._server.draining
        exchange = Exchange(self, request, keep_alive=keep_alive, chunked=is_http11)
        if self._current is None:
            self._current = exchange
            self._server.handle(exchange)
        else:
            self._pipelined.append(exchange)
            if len(self._pipelined) >= _NUM_PIPELINED_MAX and self.transport is not None:
                self.transport.pause_reading()

    # --- answering ---------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def answered(self, exchange: Exchange) -> None:
        """The answer to `exchange` is complete: close, or go on with the next request of this connection."""
        self.waiting_since = time.monotonic()
        self._current = None
        if self.transport is None:
            return
        if exchange.close_after:
            self._closing = True
            self.transport.close()
        elif self._pipelined and not self._closing:
            # At once, so that a request that is parsed meanwhile does not take its place.
            following = self._current = self._pipelined.popleft()
            self._read(self._unread)
            if len(self._pipelined) < _NUM_PIPELINED_MAX:
                self.transport.resume_reading()
            # Through the loop, so that a long pipeline of instant answers does not nest.
            asyncio.get_running_loop().call_soon(self._answer_next, following)
        elif self._problem is not None:
            self._refuse(self._problem)

    def _answer_next(self, exchange: Exchange) -> None:
        if not exchange.done:
            self._server.handle(exchange)

    def cut(self) -> None:
        """Close at once, with whatever was not written yet lost."""
        self._closing = True
        if self.transport is not None:
            self.transport.abort()

    def _refuse(self, problem: Problem) -> None:
        """Answer what cannot be parsed and close. Answers to earlier requests on the connection go first."""
        if self._closing or self.transport is None or self._current is not None:
            return
        self._closing = True
        held = self._server.refused(problem, self._asker)
        self.waiting_since = time.monotonic() + (held or 0.0)
        if held is None:
            self.cut()
        elif held:
            # What else the client sends waits in its own buffers.
            self.transport.pause_reading()
            asyncio.get_running_loop().call_later(held, self._say_refusal, problem)
        else:
            self._say_refusal(problem)

    def _say_refusal(self, problem: Problem) -> None:
        if self.transport is None:
            return
        body = problem.body()
        headers = b"".join(b"%b: %b\r\n" % header for header in problem.headers())
        self.transport.write(
            b"HTTP/1.1 %d %b\r\n%bcontent-length: %d\r\nconnection: close\r\n\r\n%b"
            % (problem.status, REASONS.get(problem.status, b""), headers, len(body), body)
        )
        # Half-closed, and read on for a while: a reset would destroy the answer under a client that still sends.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.transport.resume_reading()

    def overdue(self, now: float) -> None:
        """Called about once a second: end what takes too long."""
        waited = now - self.waiting_since
        if self._closing:
            if waited > 2.0:
                self.cut()
        elif self._stalled:
            if waited > self._limits.write_timeout_seconds:
                self.cut()
        elif self._current is None:
            if self._reading and waited > self._limits.read_timeout_seconds:
                self._refuse(Problem(408, "the request did not arrive in time", code="request_timeout"))
            elif not self._reading and (waited > self._limits.idle_timeout_seconds or self._server.draining):
                self.cut()

    def _head_bytes(self) -> int:
        return len(self._url) + sum(len(name) + len(value) + 4 for name, value in self._headers)

    def _head_too_large(self) -> Problem:
        return Problem(
            431, f"request line and headers exceed {self._limits.max_head_bytes} bytes", code="head_too_large"
        )

    def _body_too_large(self) -> Problem:
        return Problem(413, f"the body exceeds {self._max_body_bytes} bytes", code="body_too_large")


class HttpServer:
    """A listening socket and its connections. `handle` is called with each complete request."""

    def __init__(
        self,
        handle: Callable[[Exchange], None],
        *,
        limits: HttpLimits | None = None,
        refused: Callable[[Problem, Asker | None], float | None] = lambda problem, asker: 0.0,
        check_head: Callable[[str, Headers], Asker | None] | None = None,
    ) -> None:
        """`check_head` sees path and headers before a body is read, says whose they are, and may raise `Problem`.
        `refused` hears of each refusal of what never reaches `handle`, and says for how many seconds it is kept back;
        None is for ever: the connection is cut."""
        self.handle = handle
        self.limits = limits or HttpLimits()
        self.refused = refused
        self.check_head = check_head
        self.draining = False
        """Connections close as soon as they have nothing under way."""
        self.port = 0
        """The port listened on, once it is."""
        self._connections: set[HttpConnection] = set()
        self._unrecognised: OrderedDict[HttpConnection, None] = OrderedDict()
        """Those on which nobody who may ask has asked yet, oldest first: no head that `check_head` knew, or where
        nobody checks heads no complete request."""
        self._turned_away: set[HttpConnection] = set()
        """Those that are being told that there are too many."""
        self._paths: dict[bytes, str] = {}
        self._listener: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    async def start(self, host: str, port: int) -> None:
        """Listen. Raises OSError where the address cannot be had."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(lambda: HttpConnection(self), host, port, backlog=2048)
        self.port = int(self._listener.sockets[0].getsockname()[1])
        self._sweeper = loop.call_later(_SWEEP_SECONDS, self._sweep)

    def stop_accepting(self) -> None:
        """Take no new connections, and close those that have nothing under way."""
        self.draining = True
        if self._listener is not None:
            self._listener.close()
        self._sweep()

    def close(self) -> None:
        """Close everything at once."""
        self.stop_accepting()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self._connections):
            connection.cut()

    def opened(self, connection: HttpConnection) -> bool:
        """Whether there is room for a connection. Where all are taken, who has been silent or unknown for longest makes
        room, so that strangers who hold all of them keep nobody out."""
        is_full = len(self._connections) - len(self._turned_away) >= self.limits.max_connections
        if is_full and self._unrecognised:
            oldest, _ = self._unrecognised.popitem(last=False)
            self.closed(oldest)
            oldest.cut()
            is_full = False
        self._connections.add(connection)
        if is_full:
            self._turned_away.add(connection)
        else:
            self._unrecognised[connection] = None
        return not is_full

    def recognised(self, connection: HttpConnection) -> None:
        """Somebody who may ask has asked on a connection: it is not cut to make room any more."""
        self._unrecognised.pop(connection, None)

    def closed(self, connection: HttpConnection) -> None:
        self._connections.discard(connection)
        self._turned_away.discard(connection)
        self._unrecognised.pop(connection, None)

    def path_of(self, url: bytes) -> str:
        """The path of a request target; the few that are served are parsed once."""
        path = self._paths.get(url)
        if path is None:
            try:
                path = httptools.parse_url(url).path.decode("latin-1") or "/"
            except (httptools.HttpParserInvalidURLError, AttributeError):
                path = ""
            if len(self._paths) < 64:
                self._paths[url] = path
        return path

    def _sweep(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        now = time.monotonic()
        for connection in list(self._connections):
            connection.overdue(now)
        self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)
