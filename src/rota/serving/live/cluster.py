"""The live host of the cluster machine: it carries dispatches out against real engines and reports what comes of them.

Every request that entered ends exactly once, and its client hears of that end: an answer, a refusal or a failure. An
answer that is not streamed is handed on only when it is whole, so until then its request can be tried again elsewhere;
a stream can be tried again until its first byte.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import msgspec

from rota.base.errors import LawBroken, RotaError
from rota.base.instant import Duration, Instant
from rota.runtime.live import LiveLoop
from rota.serving.assemble import CLUSTER
from rota.serving.cluster.machine import ClusterMachine
from rota.serving.engines.engine import Engine, EngineCall, EngineStatus, Headers
from rota.serving.live.usage import num_output_tokens, num_streamed_tokens
from rota.serving.model.commands import Abort, ClusterCommand, Dispatch, Fail, Reject
from rota.serving.model.events import (
    ClientLeft,
    ClusterEvent,
    FirstTokenSeen,
    InstanceDraining,
    InstanceLost,
    InstanceReported,
    InstanceStarted,
    RequestArrived,
    RequestFailed,
    RequestFinished,
)
from rota.serving.model.instance import InstanceId, InstanceReport
from rota.serving.model.request import RequestId

_log = logging.getLogger(__name__)
_EXCERPT_BYTES = 200
_NUM_TAIL_READS = 4


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


class _Flight:
    """One unfinished request."""

    __slots__ = ("answer", "attempt", "call", "client")

    def __init__(self, call: EngineCall, client: Client) -> None:
        self.call = call
        self.client = client
        self.attempt: _Attempt | None = None
        self.answer: Answer | None = None
        """The last answer that was an error."""


class _Attempt:
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

    def __init__(self, cluster: "LiveCluster", flight: _Flight, instance_id: InstanceId) -> None:
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
        self.on_chunks: Callable[[bytes], None] | None = None
        """None until the stream began, and when this attempt is over."""
        self._timer: asyncio.TimerHandle | None = None
        if cluster.first_byte_timeout_seconds is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(cluster.first_byte_timeout_seconds, self._hung)

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
            self._num_bytes += len(data)
            if self._num_bytes > self._cluster.answer_bytes_max:
                self._cluster.abandon(self._flight, self, f"the answer exceeds {self._cluster.answer_bytes_max} bytes")
            else:
                self._body.append(data)

    def _on_chunks(self, data: bytes) -> None:
        self._tail.append(data)
        if self._pass_chunks_on is not None:
            self._pass_chunks_on(data)

    def on_end(self) -> None:
        if self.is_over:
            return
        flight, cluster, request_id = self._flight, self._cluster, self._flight.call.request.id
        if self._status == 200 and flight.call.stream:
            if not self._has_started:
                self._start(b"")
            self.over()
            num_tokens = num_streamed_tokens(b"".join(self._tail))
            cluster.flights.pop(request_id, None)
            flight.client.on_end(num_tokens)
            cluster.tell(RequestFinished(request_id, self.instance_id, num_tokens))
            return
        self.over()
        answer = Answer(self._status, self._headers, b"".join(self._body))
        if self._status < 400:
            num_tokens = num_output_tokens(answer.body)
            cluster.flights.pop(request_id, None)
            flight.client.on_answer(answer, num_tokens)
            cluster.tell(RequestFinished(request_id, self.instance_id, num_tokens))
            return
        flight.answer = answer
        excerpt = answer.body[:_EXCERPT_BYTES].decode("utf-8", "replace")
        cluster.tell(
            RequestFailed(
                request_id, self.instance_id, f"answered {self._status}: {excerpt}", retryable=self._status >= 500
            )
        )

    def on_failed(self, reason: str) -> None:
        if not self.is_over:
            self.over()
            self._flight.answer = None
            self._cluster.tell(RequestFailed(self._flight.call.request.id, self.instance_id, reason))

    def over(self) -> None:
        """Nothing more is expected of this attempt."""
        self.is_over = True
        self.on_chunks = self._pass_chunks_on = None
        if self._timer is not None:
            self._timer.cancel()

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


class LiveCluster:
    """Joins the cluster machine, on a live loop, to its engines."""

    def __init__(
        self,
        loop: LiveLoop,
        machine: ClusterMachine,
        engines: Iterable[Engine],
        *,
        first_byte_timeout_seconds: float | None = None,
        answer_bytes_max: int = 64 * 1024 * 1024,
    ) -> None:
        """`first_byte_timeout_seconds` is how long an engine may be silent before its attempt is given up as hung: for
        a stream the time to its first byte, otherwise to the whole answer. None is for ever."""
        self.loop = loop
        self.machine = machine
        self.engines: Mapping[InstanceId, Engine] = {engine.id: engine for engine in engines}
        self.first_byte_timeout_seconds = first_byte_timeout_seconds
        self.answer_bytes_max = answer_bytes_max
        self.flights: dict[RequestId, _Flight] = {}
        """Unfinished requests, oldest first. Written here and by the attempts only."""
        self.statuses: dict[InstanceId, EngineStatus] = {}
        """The instances that are well, and what they are."""
        self.drained: set[InstanceId] = set()
        """The instances that were told to take nothing new, whether they are well or not."""
        loop.add_machine(CLUSTER, machine, self._carry_out)

    # --- from the front door -----------------------------------------------------------------------------------------

    def submit(self, call: EngineCall, client: Client) -> None:
        """A request arrives. Its client may hear of its end from within this call."""
        request_id = call.request.id
        flight = self.flights[request_id] = _Flight(call, client)
        error = self.tell(RequestArrived(call.request))
        if (
            error is not None
            and self.machine.owner(request_id) is None
            and self.flights.pop(request_id, None) is flight
        ):
            client.on_failed(f"the router could not decide: {error}", None)

    def client_left(self, request_id: RequestId) -> None:
        """The client of a request left; its engine is told to stop."""
        flight = self.flights.pop(request_id, None)
        if flight is not None:
            if flight.attempt is not None:
                flight.attempt.over()
            self.tell(ClientLeft(request_id))

    def client_stalled(self, request_id: RequestId, stalled: bool) -> None:
        """The client of a request reads too slowly, or has caught up."""
        flight = self.flights.get(request_id)
        if flight is not None and flight.attempt is not None:
            self.engines[flight.attempt.instance_id].pause(request_id, stalled)

    def fail_all(self, reason: str) -> None:
        """End every unfinished request with an error: the router stops."""
        for request_id, flight in list(self.flights.items()):
            del self.flights[request_id]
            if flight.attempt is not None:
                flight.attempt.over()
            self.tell(ClientLeft(request_id))
            flight.client.on_failed(reason, None)

    def drain(self, instance_id: InstanceId) -> None:
        """Dispatch nothing more to an instance, which finishes what it has; also after a restart, until `undrain`."""
        if instance_id not in self.drained:
            self.drained.add(instance_id)
            self.tell(InstanceDraining(instance_id))

    def undrain(self, instance_id: InstanceId) -> None:
        """Take an instance back, as one that has just started: what it has cached is found out anew."""
        if instance_id in self.drained:
            self.drained.discard(instance_id)
            status = self.statuses.get(instance_id)
            if status is not None:
                self.tell(InstanceStarted(status.spec))

    def takes_requests(self, instance_id: InstanceId) -> bool:
        """Whether an instance is well and not drained."""
        return instance_id in self.statuses and instance_id not in self.drained

    def num_in_flight(self) -> dict[InstanceId, int]:
        """Requests that were dispatched and have not ended, for each instance."""
        counts = dict.fromkeys(self.engines, 0)
        for flight in self.flights.values():
            if flight.attempt is not None and not flight.attempt.is_over:
                counts[flight.attempt.instance_id] += 1
        return counts

    # --- from those who watch the engines ----------------------------------------------------------------------------

    def started(self, status: EngineStatus) -> None:
        """An instance is well, for the first time or again. One that was drained stays out."""
        self.statuses[status.spec.id] = status
        if status.spec.id not in self.drained:
            self.tell(InstanceStarted(status.spec))

    def lost(self, instance_id: InstanceId, reason: str) -> None:
        """An instance died or cannot be reached: its requests are reported one by one."""
        if self.statuses.pop(instance_id, None) is None:
            return
        self.tell(InstanceLost(instance_id, reason))
        for flight in list(self.flights.values()):
            attempt = flight.attempt
            if attempt is not None and attempt.instance_id == instance_id and not attempt.is_over:
                self.abandon(flight, attempt, f"the instance was lost: {reason}")

    def reported(self, report: InstanceReport, delay: Duration) -> None:
        """A report of an instance's load arrived."""
        self.tell(InstanceReported(report, delay))

    def abandon(self, flight: _Flight, attempt: _Attempt, reason: str) -> None:
        """Take a request back from its instance, as a failed attempt."""
        request_id = flight.call.request.id
        self.engines[attempt.instance_id].abort(request_id)
        attempt.on_failed(reason)

    # --- to and from the machine -------------------------------------------------------------------------------------

    def tell(self, event: ClusterEvent) -> Exception | None:
        """Submit an event. An error, of a policy say, is logged and returned: it must not take the host down."""
        try:
            self.loop.submit(CLUSTER, event)
        except RotaError as error:
            _log.error("%s%s", error.message, f" (hint: {error.hint})" if error.hint else "")
            return error
        except Exception as error:
            _log.exception("the cluster machine failed on %s", type(event).__name__)
            return error
        return None

    def _carry_out(self, name: str, command: ClusterCommand, now: Instant) -> None:
        if isinstance(command, Dispatch):
            flight = self.flights.get(command.request_id)
            engine = self.engines.get(command.instance_id)
            if flight is None:
                return  # The client left meanwhile; the machine is about to hear of it.
            if engine is None:
                raise LawBroken(
                    f"law 1: {command.request_id} was dispatched to {command.instance_id}, which is unknown"
                )
            flight.answer = None
            flight.attempt = _Attempt(self, flight, command.instance_id)
            flight.client.on_dispatched(command.instance_id, command.attempt)
            engine.submit(flight.call, flight.attempt)
        elif isinstance(command, Abort):
            self.engines[command.instance_id].abort(command.request_id)
        elif isinstance(command, Reject):
            flight = self.flights.pop(command.request_id, None)
            if flight is not None:
                flight.client.on_refused(command.status, command.reason, command.retry_after)
        elif isinstance(command, Fail):
            flight = self.flights.pop(command.request_id, None)
            if flight is not None:
                flight.client.on_failed(command.reason, flight.answer)
