"""One dispatch of a request: what the engine says of it, told to the client and to the cluster machine."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import msgspec

from rota.base.instant import Duration
from rota.serving.engines.engine import EngineCall, Headers
from rota.serving.live.events import EventReader
from rota.serving.live.resumption import Resumption
from rota.serving.live.usage import num_output_tokens, num_streamed_tokens, says_done
from rota.serving.model.events import FirstTokenSeen, RequestFailed, RequestFinished
from rota.serving.model.instance import InstanceId

if TYPE_CHECKING:
    from rota.serving.live.cluster import LiveCluster

_EXCERPT_BYTES = 200
_NUM_TAIL_READS = 4
_END_BYTES = 64
"""More than the end of any stream has."""


class Answer(msgspec.Struct, frozen=True, gc=False):
    """A whole answer of an engine."""

    status: int
    headers: Headers
    body: bytes


class Client(Protocol):
    """Who waits for an answer. Hears exactly one of `on_answer`, `on_refused`, `on_failed` and `on_end`; before
    `on_end`, and perhaps before `on_failed`, `on_start` and any number of `on_data`."""

    def on_dispatched(self, instance_id: InstanceId, attempt: int) -> None:
        """The request went to an instance."""
        ...

    def on_start(self, status: int, headers: Headers, first: bytes) -> None:
        """A stream begins."""
        ...

    def on_data(self, data: bytes) -> None:
        """More of the stream."""
        ...

    @property
    def on_chunks(self) -> Callable[[bytes], None] | None:
        """Takes more of the stream in whole HTTP/1.1 chunks, framing included. Asked for once the stream began; None
        has everything go to `on_data`."""
        ...

    def on_resumed(self, gap_seconds: float) -> None:
        """A stream goes on at another engine, which was asked to so long ago."""
        ...

    def on_end(self, num_output_tokens: int | None) -> None:
        """The stream is whole."""
        ...

    def on_answer(self, answer: Answer, num_output_tokens: int | None) -> None:
        """The answer, whole."""
        ...

    def on_refused(self, status: int, reason: str, retry_after: Duration | None) -> None:
        """The request did not enter."""
        ...

    def on_failed(self, reason: str, answer: Answer | None) -> None:
        """The request ended in an error. `answer` is what the engine itself said, if it did."""
        ...


class Flight:
    """One unfinished request."""

    __slots__ = ("answer", "attempt", "call", "client", "is_stalled", "resumption")

    def __init__(self, call: EngineCall, client: Client) -> None:
        self.call = call
        self.client = client
        self.attempt: Attempt | None = None
        self.answer: Answer | None = None
        """The last answer that was an error."""
        self.resumption: Resumption | None = None
        """What it can go on from, if it can."""
        self.is_stalled = False
        """Its client reads too slowly."""


class Attempt:
    """One dispatch of a request: hears what the engine says, until it is over."""

    __slots__ = (
        "_body",
        "_cluster",
        "_flight",
        "_has_started",
        "_headers",
        "_num_bytes",
        "_pass_chunks_on",
        "_pass_on",
        "_status",
        "_tail",
        "_timer",
        "instance_id",
        "is_over",
        "on_chunks",
    )

    def __init__(self, cluster: "LiveCluster", flight: Flight, instance_id: InstanceId) -> None:
        self._cluster = cluster
        self._flight = flight
        self.instance_id = instance_id
        self.is_over = False
        self._status = 0
        self._headers: Headers = []
        self._body: list[bytes] = []
        self._num_bytes = 0
        self._has_started = False
        self._tail: deque[bytes] = deque(maxlen=_NUM_TAIL_READS)
        """What came last of a stream: there it says how many tokens it had."""
        self._pass_on = flight.client.on_data
        self._pass_chunks_on: Callable[[bytes], None] | None = None
        self.on_chunks: Callable[[bytes], bool] | None = None
        """None until the stream began, and when this attempt is over."""
        self._timer: asyncio.TimerHandle | None = None
        if cluster.first_byte_timeout_seconds is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(cluster.first_byte_timeout_seconds, self._hung)

    @property
    def last_heard(self) -> bytes | None:
        """What came last of a stream that began: another object whenever something came."""
        return self._tail[-1] if self._tail else None

    def on_head(self, status: int, headers: Headers) -> None:
        self._status = status
        self._headers = headers

    def on_data(self, data: bytes) -> None:
        if self.is_over:
            return
        if self._has_started:
            self._tail.append(data)
            self._pass_on(data)
        elif self._status == 200 and self._flight.call.stream:
            self._start(data)
        else:
            self._collect(data)

    def _on_chunks(self, data: bytes) -> bool:
        self._tail.append(data)
        if self._pass_chunks_on is not None:
            self._pass_chunks_on(data)
        return True

    def on_end(self) -> None:
        if self.is_over:
            return
        if self._status == 200 and self._flight.call.stream:
            tail = b"".join(self._tail)
            if self._is_cut_short(tail):
                self.on_failed("the stream ended without [DONE]")
                return
            if not self._has_started:
                self._start(b"")
            self._finish_stream(num_streamed_tokens(tail))
        else:
            self._end_whole()

    def on_failed(self, reason: str) -> None:
        if not self.is_over:
            self.over()
            self._flight.answer = None
            self._fail(reason)

    def over(self) -> None:
        """Nothing more is expected of this attempt."""
        self.is_over = True
        self.on_chunks = self._pass_chunks_on = None
        if self._timer is not None:
            self._timer.cancel()

    def _is_cut_short(self, tail: bytes) -> bool:
        """Whether a stream is not whole, although its connection ended in good order: as Ollama's does when the process
        that runs the model dies."""
        if not any(name == b"content-type" and b"text/event-stream" in value for name, value in self._headers):
            return False
        if len(self._tail) == _NUM_TAIL_READS and len(tail) < _END_BYTES:
            return False  # It came in such small pieces that its end was not kept.
        return not says_done(tail)

    def _collect(self, data: bytes) -> None:
        self._num_bytes += len(data)
        if self._num_bytes > self._cluster.answer_bytes_max:
            self._cluster.abandon(self._flight, self, f"the answer exceeds {self._cluster.answer_bytes_max} bytes")
        else:
            self._body.append(data)

    def _finish_stream(self, num_tokens: int | None) -> None:
        request_id = self._flight.call.request.id
        self.over()
        self._cluster.flights.pop(request_id, None)
        self._flight.client.on_end(num_tokens)
        self._cluster.ended_well(self.instance_id)
        self._cluster.tell(RequestFinished(request_id, self.instance_id, num_tokens))

    def _end_whole(self) -> None:
        """An answer that is not streamed, or an error in the place of a stream, is whole."""
        flight, request_id = self._flight, self._flight.call.request.id
        self.over()
        answer = Answer(self._status, self._headers, b"".join(self._body))
        if self._status < 400:
            num_tokens = num_output_tokens(answer.body)
            self._cluster.flights.pop(request_id, None)
            flight.client.on_answer(answer, num_tokens)
            self._cluster.ended_well(self.instance_id)
            self._cluster.tell(RequestFinished(request_id, self.instance_id, num_tokens))
            return
        flight.answer = answer
        excerpt = answer.body[:_EXCERPT_BYTES].decode("utf-8", "replace")
        self._fail(f"answered {self._status}: {excerpt}", retryable=self._status >= 500)

    def _fail(self, reason: str, *, retryable: bool = True) -> None:
        resumption = self._flight.resumption
        num_tokens = None if resumption is None else resumption.num_output_tokens
        failed = RequestFailed(self._flight.call.request.id, self.instance_id, reason, retryable, num_tokens)
        self._cluster.attempt_failed(failed)

    def _start(self, first: bytes) -> None:
        self._has_started = True
        self._tail.append(first)
        if self._timer is not None:
            self._timer.cancel()
        client = self._flight.client
        client.on_start(self._status, self._headers, first)
        if client.on_chunks is not None:
            self._pass_chunks_on = client.on_chunks
            self.on_chunks = self._on_chunks
        self._cluster.tell(FirstTokenSeen(self._flight.call.request.id, self.instance_id))

    def _hung(self) -> None:
        limit = self._cluster.first_byte_timeout_seconds
        self._cluster.abandon(self._flight, self, f"no byte of an answer within {limit:g} s")


class FollowedAttempt(Attempt):
    """An attempt whose stream is followed event by event, so that another can go on where it ends. It may be such
    another itself; then the client has heard the beginning."""

    __slots__ = ("_has_ended", "_on_kept_end", "_reader", "_resumption", "_stopped_at", "on_first")

    def __init__(
        self,
        cluster: "LiveCluster",
        flight: Flight,
        instance_id: InstanceId,
        resumption: Resumption,
        *,
        on_first: Callable[[float], None] | None = None,
    ) -> None:
        """`on_first(gap_seconds)` is called before the client gets the first token of this attempt."""
        super().__init__(cluster, flight, instance_id)
        self._resumption = resumption
        self._reader = EventReader(resumption)
        self.on_first = on_first
        self._has_ended = False
        self._on_kept_end: Callable[[], None] | None = None
        self._stopped_at = asyncio.get_running_loop().time() if resumption.has_started else None

    def on_head(self, status: int, headers: Headers) -> None:
        super().on_head(status, headers)
        if self._flight.is_stalled:
            self._cluster.engines[self.instance_id].pause(self._flight.call.request.id, True)

    def on_data(self, data: bytes) -> None:
        if self.is_over:
            return
        if self._status != 200:
            self._collect(data)
            return
        self._tail.append(data)
        out = self._reader.feed(data)
        if out:
            self._hand_on(out)
        if self._reader.has_frame and self.on_chunks is None and not self.is_over:
            self._pass_chunks_on = self._flight.client.on_chunks
            self.on_chunks = self._pass_chunks_on and self._on_chunks
        if self._reader.broken is not None and not self.is_over:
            self._cluster.abandon(self._flight, self, self._reader.broken)

    def _on_chunks(self, data: bytes) -> bool:
        if self._pass_chunks_on is None:
            return True  # It is over: another attempt writes the resumption by now.
        out = self._reader.glance(data)
        if out is None:
            return False
        self._tail.append(data)
        self._pass_chunks_on(out)
        return True

    def on_end(self) -> None:
        if self.is_over:
            return
        if self._status != 200:
            self._end_whole()
            return
        if self._reader.has_kept_end and self._on_kept_end is not None:
            self._has_ended = True
            self._on_kept_end()
            return
        self._reader.end()
        if self._reader.broken is not None:
            self.on_failed(self._reader.broken)
        else:
            self._finish_stream(len(self._resumption.output_token_ids))

    def keep_end(self, on_kept: Callable[[], None]) -> None:
        """The engine is asked to let go of the request: keep an end by length from the client, and call `on_kept` when
        the engine has said all, until `settle`."""
        self._reader.keep_end()
        self._on_kept_end = on_kept

    def settle(self, *, is_inner: bool) -> None:
        """It is known whose end was kept, or would be: the answer's own, or that of this engine's part, after which
        another has to go on."""
        self._on_kept_end = None
        out = self._reader.settle(is_inner=is_inner)
        if out:
            self._hand_on(out)
        broken = self._reader.broken or (self._resumption.why_not if is_inner else None)
        if broken is not None and not self.is_over:
            self._cluster.abandon(self._flight, self, broken)
        elif self._has_ended and not is_inner and not self.is_over:
            self.on_end()

    def _hand_on(self, data: bytes) -> None:
        if self._has_started:
            self._pass_on(data)
            return
        self._has_started = True
        if self._timer is not None:
            self._timer.cancel()
        gap_seconds = 0.0
        if self._stopped_at is None:
            self._flight.client.on_start(self._status, self._headers, data)
        else:
            gap_seconds = asyncio.get_running_loop().time() - self._stopped_at
            self._flight.client.on_resumed(gap_seconds)
            self._pass_on(data)
        if self.on_first is None:
            self._cluster.tell(FirstTokenSeen(self._flight.call.request.id, self.instance_id))
        else:
            self.on_first(gap_seconds)
            self.on_first = None

    def _fail(self, reason: str, *, retryable: bool = True) -> None:
        if self._resumption.has_finished:
            # Only what comes after the last token was lost with the engine, and that is known here.
            if not self._reader.is_done:
                self._pass_on(self._resumption.tail())
            self._finish_stream(len(self._resumption.output_token_ids))
        else:
            super()._fail(reason, retryable=retryable)
