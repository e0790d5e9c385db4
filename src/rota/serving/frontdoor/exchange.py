"""One request of a connection and its one answer."""

import asyncio
import ipaddress
from http import HTTPStatus
from typing import Protocol

Headers = list[tuple[bytes, bytes]]

REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


class Asker(Protocol):
    """Who asks, as far as the headers say."""

    @property
    def max_body_bytes(self) -> int | None:
        """The largest body that it may send, where that is less than anybody's."""
        ...


class HttpRequest:
    """One complete request. Header names are lower-case bytes; repeated headers are joined with a comma."""

    __slots__ = ("asker", "headers", "method", "parts", "path")

    def __init__(self, method: str, path: str, headers: Headers, *parts: bytes, asker: Asker | None = None) -> None:
        self.method = method
        self.path = path
        self.headers = headers
        self.parts = parts
        """The body as it came. To put a large one together takes milliseconds."""
        self.asker = asker
        """Whom the headers were found to be of, before the body was read."""

    @property
    def body(self) -> bytes:
        """The whole body."""
        return self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)

    @property
    def num_body_bytes(self) -> int:
        return sum(map(len, self.parts))

    def header(self, name: bytes) -> bytes | None:
        """The value of a header, or None."""
        found: bytes | None = None
        for key, value in self.headers:
            if key == name:
                found = value if found is None else found + b", " + value
        return found


class ExchangeListener(Protocol):
    """Who answers an exchange, and so wants to know what becomes of the client."""

    def client_left(self) -> None:
        """The client closed its connection before the answer was complete. Nothing may be written any more."""
        ...

    def client_stalled(self, stalled: bool) -> None:
        """The client reads more slowly than it is written to (True), or has caught up (False)."""
        ...


class Connection(Protocol):
    """What an exchange needs of the connection that it is on."""

    transport: asyncio.Transport | None

    def write(self, data: bytes) -> None: ...

    def cut(self) -> None: ...

    def answered(self, exchange: "Exchange") -> None: ...


class Exchange:
    """One request and its one answer: either `respond`, or `start`, any number of `write`, and `end` or `cut`."""

    __slots__ = ("_connection", "_keep_alive", "done", "is_chunked", "listener", "request", "status")

    def __init__(self, connection: Connection, request: HttpRequest, *, keep_alive: bool, chunked: bool) -> None:
        self.request = request
        self.listener: ExchangeListener | None = None
        self.status = 0
        """Status of the answer, once it began."""
        self.done = False
        """Nothing more may be written: the answer is complete, or the client left."""
        self._connection = connection
        self._keep_alive = keep_alive
        self.is_chunked = chunked
        """The client understands chunks: it speaks HTTP/1.1."""

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """Answer in one piece."""
        if self.done:
            return
        self.status = status
        head = self._head(status, headers)
        head.append(b"content-length: %d\r\n\r\n" % len(body))
        if self.request.method != "HEAD":
            head.append(body)
        self._connection.write(b"".join(head))
        self._finish()

    def start(self, status: int, headers: Headers, first: bytes = b"") -> None:
        """Begin an answer of unknown length; `first` saves a system call where the first bytes are at hand."""
        if self.done:
            return
        self.status = status
        if not self.is_chunked:
            self._keep_alive = False
        head = self._head(status, headers)
        head.append(b"transfer-encoding: chunked\r\n\r\n" if self.is_chunked else b"\r\n")
        if first:
            head.append(b"%x\r\n%b\r\n" % (len(first), first) if self.is_chunked else first)
        self._connection.write(b"".join(head))

    def write(self, data: bytes) -> None:
        """Pass on some bytes of a started answer."""
        if self.done or not data:
            return
        transport = self._connection.transport
        if transport is not None:
            transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self.is_chunked else data)

    def write_chunks(self, data: bytes) -> None:
        """Pass on whole chunks of a started answer as they are; only where `is_chunked`."""
        transport = self._connection.transport
        if transport is not None and not self.done:
            transport.write(data)

    def end(self, last: bytes = b"") -> None:
        """End a started answer, whole."""
        if self.done:
            return
        if self.is_chunked:
            self._connection.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(last), last) if last else b"0\r\n\r\n")
        elif last:
            self._connection.write(last)
        self._finish()

    def cut(self) -> None:
        """Break a started answer off, so that the client sees that it is not whole."""
        if not self.done:
            self.done = True
            self._connection.cut()

    @property
    def is_from_here(self) -> bool:
        """Whether the client's end of the connection is on this machine."""
        transport = self._connection.transport
        peer = None if transport is None else transport.get_extra_info("peername")
        if not peer:
            return False
        address = ipaddress.ip_address(str(peer[0]).partition("%")[0])
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return (mapped or address).is_loopback

    @property
    def close_after(self) -> bool:
        return not self._keep_alive

    def _head(self, status: int, headers: Headers) -> list[bytes]:
        head = [b"HTTP/1.1 %d %b\r\n" % (status, REASONS.get(status, b""))]
        head.extend(b"%b: %b\r\n" % header for header in headers)
        if not self._keep_alive:
            head.append(b"connection: close\r\n")
        return head

    def _finish(self) -> None:
        self.done = True
        self._connection.answered(self)
