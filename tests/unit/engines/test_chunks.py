"""Whole chunks pass unparsed; whatever else a server sends reaches the parser, and the client the same bytes."""

from itertools import pairwise
from typing import Any

import httptools
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rota.serving.engines.chunks import are_whole_chunks
from rota.serving.engines.http_client import Headers, HttpClient, _Connection
from rota.serving.live.usage import num_streamed_tokens

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"
payloads = st.lists(
    st.binary(min_size=1, max_size=40) | st.sampled_from([b"\r\n", b"0\r\n\r\n", b"x" * 5000]), max_size=8
)


def framed(payload: bytes, extension: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(payload), extension, payload)


class Parsed:
    """What llhttp makes of chunks that follow a head."""

    def __init__(self, data: bytes) -> None:
        self.body = b""
        self.is_in_chunk = self.is_complete = self.is_refused = False
        parser = httptools.HttpResponseParser(self)
        parser.feed_data(HEAD)
        try:
            parser.feed_data(data)
        except httptools.HttpParserError:
            self.is_refused = True

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_chunk_header(self) -> None:
        self.is_in_chunk = True

    def on_chunk_complete(self) -> None:
        self.is_in_chunk = False

    def on_message_complete(self) -> None:
        self.is_complete = True


@given(payloads.filter(bool))
def test_chunks_as_servers_send_them_are_recognised(parts: list[bytes]) -> None:
    assert are_whole_chunks(b"".join(framed(part) for part in parts))


@given(st.lists(st.sampled_from([b"0", b"1", b"a", b"F", b"x", b"_", b" ", b"+", b"\r", b"\n", b"\r\n", b";", b"-"])))
@example([b"+", b"1", b"\r\n", b"a", b"\r\n"])
@example([b"0", b"x", b"1", b"\r\n", b"a", b"\r\n"])
@example([b"1", b"\r\n", b"a", b"\r\n", b"0", b"\r\n", b"\r\n"])
def test_what_is_taken_for_whole_chunks_is_so_for_the_parser(words: list[bytes]) -> None:
    data = b"".join(words)
    for _ in range(2):  # the second time from memory
        if data and are_whole_chunks(data):
            parsed = Parsed(data)
            assert not (parsed.is_refused or parsed.is_in_chunk or parsed.is_complete)
            assert parsed.body


def test_a_known_size_does_not_excuse_a_missing_line_end() -> None:
    assert are_whole_chunks(b"5\r\nhello\r\n")
    assert not are_whole_chunks(b"5\r\nhellooo")


class Heard:
    """A sink that takes chunks once it heard data, as a stream's client does."""

    def __init__(self, *, takes_chunks: bool, declined_size: int | None = None) -> None:
        """Data of `declined_size` bytes modulo 3 is left to the parser after all."""
        self.body = b""
        self.num_chunks_passed = 0
        self.ends: list[str] = []
        self._takes_chunks = takes_chunks
        self._declined_size = declined_size

    @property
    def on_chunks(self) -> Any:
        return self._take if self._takes_chunks and self.body else None

    def _take(self, data: bytes) -> bool:
        if len(data) % 3 == self._declined_size:
            return False
        self.num_chunks_passed += 1
        self.body += Parsed(data).body
        return True

    def on_head(self, status: int, headers: Headers) -> None: ...

    def on_data(self, data: bytes) -> None:
        self.body += data

    def on_end(self) -> None:
        self.ends.append("end")

    def on_failed(self, reason: str) -> None:
        self.ends.append(reason)


class NoTransport:
    def write(self, data: bytes) -> None: ...
    def abort(self) -> None: ...
    def is_closing(self) -> bool:
        return False


def deliver(pieces: list[bytes], sink: Heard) -> None:
    """Let a connection receive an answer in these pieces."""
    client = HttpClient("http://127.0.0.1:1")
    connection = _Connection(client)
    connection.connection_made(NoTransport())  # type: ignore[arg-type]
    client.released(connection)
    client.send("POST", "/v1/completions", [], b"{}", sink)
    for piece in pieces:
        connection.data_received(piece)


@given(
    payloads,
    st.sampled_from([b"", b";a=b"]),
    st.sampled_from([b"", b"checksum: 1\r\n"]),
    st.lists(st.integers(0, 400), max_size=12),
    st.booleans(),
    st.none() | st.integers(0, 2),
)
@example([b"z", b"x\r\n1\r\na\r\n"], b"", b"", [len(HEAD) + 6, len(HEAD) + 12, len(HEAD) + 18], True, None)
@example([b"z", b"a\r\nb\r\n" + b"y" * 11], b"", b"", [len(HEAD) + 6, len(HEAD) + 7, len(HEAD) + 29], True, None)
def test_however_a_stream_is_cut_up_it_arrives_whole(
    parts: list[bytes], extension: bytes, trailer: bytes, cuts: list[int], takes_chunks: bool, declined_size: int | None
) -> None:
    """The examples: a chunk lies within a chunk, and half a size is a size."""
    wire = HEAD + b"".join(framed(part, extension) for part in parts) + b"0\r\n" + trailer + b"\r\n"
    edges = sorted({0, *(cut for cut in cuts if cut < len(wire)), len(wire)})
    sink = Heard(takes_chunks=takes_chunks, declined_size=declined_size)
    deliver([wire[start:end] for start, end in pairwise(edges)], sink)
    assert sink.body == b"".join(parts)
    assert sink.ends == ["end"]


def test_events_that_come_one_by_one_pass_unparsed() -> None:
    sink = Heard(takes_chunks=True)
    deliver([HEAD, *(framed(b"data: %d\n\n" % number) for number in range(10)), LAST], sink)
    assert sink.num_chunks_passed == 9  # all but the first, with which the stream begins
    assert sink.ends == ["end"]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_the_tokens_of_a_stream_are_read_through_its_framing(line_end: bytes) -> None:
    events = [b'data: {"choices":[]}', b'data: {"usage":{"completion_tokens":7}}', b"data: [DONE]"]
    assert num_streamed_tokens(b"".join(framed(event + 2 * line_end) for event in events)) == 7
    assert num_streamed_tokens(b"".join(event + 2 * line_end for event in events)) == 7
