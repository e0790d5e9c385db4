"""The live host of the cluster machine: it carries dispatches out against real engines and reports what comes of them.

Every request that entered ends exactly once, and its client hears of that end: an answer, a refusal or a failure. An
answer that is not streamed is handed on only when it is whole, so until then its request can be tried again elsewhere;
a stream can be tried again until its first byte. After that it goes on elsewhere where the engine tells token ids and
the request's terms travel (`Request.movable`); otherwise it ends with an error.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import msgspec

from rota.base.errors import EngineError, LawBroken, RotaError
from rota.base.instant import Duration, Instant, milliseconds, to_seconds
from rota.runtime.live import LiveLoop
from rota.serving.assemble import CLUSTER
from rota.serving.cluster.machine import ClusterMachine
from rota.serving.engines.engine import Engine, EngineCall, EngineStatus, TellsText
from rota.serving.engines.vllm.tickets import Ticket
from rota.serving.live.attempt import Attempt, Client, Flight, FollowedAttempt
from rota.serving.live.breaker import BreakerRule, CircuitBreaker
from rota.serving.live.moves import Heard, Moves
from rota.serving.live.resumption import Resumption
from rota.serving.model.capabilities import Capability
from rota.serving.model.commands import (
    Abort,
    AbortMigration,
    ClusterCommand,
    Commit,
    CopyOut,
    Dispatch,
    Fail,
    HandOver,
    Migrate,
    MoveRefused,
    Reject,
    SetRole,
    StartInstance,
    StopInstance,
    Way,
)
from rota.serving.model.events import (
    ClientLeft,
    ClusterEvent,
    InstanceDraining,
    InstanceLost,
    InstanceReported,
    InstanceStarted,
    MoveAsked,
    RequestArrived,
    RequestFailed,
)
from rota.serving.model.instance import InstanceId, InstanceReport, Role, SequenceReport
from rota.serving.model.request import RequestId

_WAIT_TOLD = milliseconds(50)
"""Engines are told of a wait at the router from here on: for less a body is not written anew."""
_TEXT_SECONDS = 10.0
"""How long the next engine may take to say what a handful of tokens say."""

_log = logging.getLogger(__name__)


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
        breaker: BreakerRule | None = None,
        roles: Mapping[InstanceId, Role] = MappingProxyType({}),
    ) -> None:
        """`first_byte_timeout_seconds` is how long an engine may be silent before its attempt is given up as hung: for
        a stream the time to its first byte, otherwise to the whole answer. None is for ever. `roles` are those of the
        engines that have one; no engine knows its own, since each can do both."""
        self.loop = loop
        self.machine = machine
        self.engines: dict[InstanceId, Engine] = {engine.id: engine for engine in engines}
        self.first_byte_timeout_seconds = first_byte_timeout_seconds
        self.answer_bytes_max = answer_bytes_max
        self.flights: dict[RequestId, Flight] = {}
        """Unfinished requests, oldest first. Written here and by the attempts only."""
        self.statuses: dict[InstanceId, EngineStatus] = {}
        """The instances that are well, and what they are."""
        self.drained: set[InstanceId] = set()
        """The instances that were told to take nothing new, whether they are well or not."""
        self.roles: dict[InstanceId, Role] = dict(roles)
        """What each instance is for. Who is not here is for both."""
        self.moves = Moves(self)
        self._asking: set[asyncio.Task[None]] = set()
        self._breakers = {engine_id: CircuitBreaker(breaker or BreakerRule()) for engine_id in self.engines}
        self._breaker_rule = breaker or BreakerRule()
        self.on_fleet: Callable[[StartInstance | StopInstance], None] = lambda command: None
        """Who starts and stops instances, where they are scaled."""
        loop.add_machine(CLUSTER, machine, self._carry_out)

    # --- from the front door -----------------------------------------------------------------------------------------

    def submit(self, call: EngineCall, client: Client) -> None:
        """A request arrives. Its client may hear of its end from within this call."""
        request_id = call.request.id
        flight = self.flights[request_id] = Flight(call, client)
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
            self._let_go(flight)
            self.tell(ClientLeft(request_id))

    def client_stalled(self, request_id: RequestId, stalled: bool) -> None:
        """The client of a request reads too slowly, or has caught up."""
        flight = self.flights.get(request_id)
        if flight is None:
            return
        flight.is_stalled = stalled
        engine = None if flight.attempt is None else self.engines.get(flight.attempt.instance_id)
        if engine is not None:
            engine.pause(request_id, stalled)

    def fail_all(self, reason: str) -> None:
        """End every unfinished request with an error: the router stops."""
        for request_id, flight in list(self.flights.items()):
            del self.flights[request_id]
            self._let_go(flight)
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
            if status is not None and self.takes_requests(instance_id):
                self.tell(InstanceStarted(status.spec))

    def ask_to_move(self, request_id: RequestId, destination: InstanceId, way: Way | None, heard: Heard) -> None:
        """Have a running request moved now. `heard` is told once what came of it."""
        self.moves.expect(request_id, heard)
        error = self.tell(MoveAsked(request_id, destination, way))
        if error is not None:
            self.moves.refused(request_id, f"the router could not decide: {error}")

    def takes_requests(self, instance_id: InstanceId) -> bool:
        """Whether an instance is well, not drained, and its breaker closed."""
        breaker = self._breakers.get(instance_id)
        return (
            breaker is not None
            and breaker.open_until is None
            and instance_id in self.statuses
            and instance_id not in self.drained
        )

    def num_in_flight(self) -> dict[InstanceId, int]:
        """Requests that were dispatched and have not ended, for each instance."""
        counts = dict.fromkeys(self.engines, 0)
        for flight in self.flights.values():
            if flight.attempt is not None and not flight.attempt.is_over:
                counts[flight.attempt.instance_id] += 1
        return counts

    # --- engines that come and go ------------------------------------------------------------------------------------

    def add_engine(self, engine: Engine) -> None:
        """One more engine, which is watched from now on."""
        self.engines[engine.id] = engine
        self._breakers[engine.id] = CircuitBreaker(self._breaker_rule)

    def remove_engine(self, instance_id: InstanceId) -> None:
        """An engine that is gone for good. What it still had is lost to it, as in a crash."""
        self.lost(instance_id, "it was stopped")
        self.drained.discard(instance_id)
        self._breakers.pop(instance_id, None)
        self.engines.pop(instance_id, None)

    # --- from those who watch the engines ----------------------------------------------------------------------------

    def started(self, status: EngineStatus) -> None:
        """An instance is well, for the first time or again. One that was drained stays out."""
        spec = msgspec.structs.replace(status.spec, role=self.roles.get(status.spec.id, Role.MIXED))
        self.statuses[spec.id] = msgspec.structs.replace(status, spec=spec)
        if spec.id not in self.drained:
            self.tell(InstanceStarted(spec))

    def _set_role(self, command: SetRole) -> None:
        """An instance that has nothing left is for something else from now on. It computes as before, so this is done
        at once; one that is drained by hand or not well has its new role when it is back."""
        instance_id = command.instance_id
        self.roles[instance_id] = command.role
        status = self.statuses.get(instance_id)
        if status is None:
            return
        spec = msgspec.structs.replace(status.spec, role=command.role)
        self.statuses[instance_id] = msgspec.structs.replace(status, spec=spec)
        if self.takes_requests(instance_id):
            self.tell(InstanceStarted(spec))

    def lost(self, instance_id: InstanceId, reason: str) -> None:
        """An instance died or cannot be reached: its requests are reported one by one."""
        if self.statuses.pop(instance_id, None) is None:
            return
        # What is started anew is judged anew.
        self._breakers[instance_id] = CircuitBreaker(self._breaker_rule)
        self.tell(InstanceLost(instance_id, reason))
        for flight in list(self.flights.values()):
            attempt = flight.attempt
            if attempt is not None and attempt.instance_id == instance_id and not attempt.is_over:
                self.abandon(flight, attempt, f"the instance was lost: {reason}")

    def streams_at(self, instance_id: InstanceId) -> dict[RequestId, bytes | None]:
        """The streams that began at an instance and whose clients keep up, and what came of each last."""
        streams: dict[RequestId, bytes | None] = {}
        for request_id, flight in self.flights.items():
            attempt = flight.attempt
            if attempt is None or attempt.instance_id != instance_id or attempt.is_over or flight.is_stalled:
                continue
            if attempt.last_heard is not None:
                streams[request_id] = attempt.last_heard
        return streams

    def try_again(self, instance_id: InstanceId) -> None:
        """A probe was well: an instance that was taken out by its breaker comes back when its pause is over."""
        breaker = self._breakers[instance_id]
        if breaker.open_until is not None and breaker.open_until <= self.loop.now():
            breaker.try_again()
            if self.takes_requests(instance_id):
                self.tell(InstanceStarted(self.statuses[instance_id].spec))

    def reported(self, report: InstanceReport, delay: Duration) -> None:
        """A report of an instance's load arrived. Engines do not tell of their sequences: where a policy looks at them,
        the router says what it knows."""
        if self.machine.reads_sequences and not report.running:
            report = msgspec.structs.replace(report, running=self._running_at(report.instance_id))
        self.tell(InstanceReported(report, delay))

    def _running_at(self, instance_id: InstanceId) -> tuple[SequenceReport, ...]:
        """All requests at an instance, oldest first, with the blocks that their tokens need. Of a stream that is not
        followed, and of a whole answer, the prompt alone is known: leaving them out would make the instance look
        freer than it is."""
        status = self.statuses.get(instance_id)
        if status is None:
            return ()
        block_size = status.spec.limits.block_size
        running = []
        for request_id, flight in self.flights.items():
            attempt, resumption, request = flight.attempt, flight.resumption, flight.call.request
            if attempt is None or attempt.is_over or attempt.instance_id != instance_id:
                continue
            is_followed = resumption is not None and resumption.num_output_tokens is not None
            num_tokens = resumption.num_tokens if resumption and is_followed else request.num_prompt_tokens
            running.append(SequenceReport(request_id, num_tokens, -(-num_tokens // block_size), request.priority))
        return tuple(running)

    def abandon(self, flight: Flight, attempt: Attempt, reason: str) -> None:
        """Take a request back from its instance, as a failed attempt."""
        request_id = flight.call.request.id
        self.engines[attempt.instance_id].abort(request_id)
        attempt.on_failed(reason)

    def attempt_failed(self, failed: RequestFailed) -> None:
        """An attempt is over without an end of its request."""
        if failed.retryable:
            self._judge(failed.instance_id)
        if not self.moves.attempt_failed(failed):
            self.tell(failed)

    def _judge(self, instance_id: InstanceId) -> None:
        """One more failure at an instance: if that is too many, it gets nothing for a while, unless it is the last."""
        if instance_id not in self.statuses:
            return
        now, breaker = self.loop.now(), self._breakers[instance_id]
        others = (each for each in self.engines if each != instance_id and self.takes_requests(each))
        if breaker.failed(now) and self.takes_requests(instance_id) and any(others):
            pause = breaker.open(now)
            _log.warning("%s fails again and again, and gets nothing for %g s", instance_id, to_seconds(pause))
            self.tell(InstanceDraining(instance_id))

    def ended_well(self, instance_id: InstanceId) -> None:
        """An instance finished a request."""
        self._breakers[instance_id].ended_well()

    def go_on(
        self,
        flight: Flight,
        instance_id: InstanceId,
        *,
        on_first: Callable[[float], None] | None = None,
        ticket: Ticket | None = None,
    ) -> None:
        """Have an instance go on with a stream, from the tokens that the client has got: it pulls what the ticket of
        the instance before names, or computes all anew."""
        resumption = flight.resumption
        if resumption is None or resumption.num_output_tokens is None:
            raise LawBroken(f"law 2: {flight.call.request.id} cannot go on at {instance_id}: its tokens are unknown")
        resumption.num_resumed += 1
        flight.answer = None
        flight.attempt = attempt = FollowedAttempt(self, flight, instance_id, resumption, on_first=on_first)
        engine = self.engines[instance_id]
        if resumption.num_unsure and isinstance(engine, TellsText):
            asking = asyncio.create_task(self._go_on_from_whole(engine, attempt, resumption, ticket))
            self._asking.add(asking)
            asking.add_done_callback(self._asking.discard)
        else:
            engine.submit(resumption.next_call(ticket), attempt)

    async def _go_on_from_whole(
        self, engine: Engine, attempt: Attempt, resumption: Resumption, ticket: Ticket | None
    ) -> None:
        """Leave out what begins a character before going on: vLLM, given such a beginning at the end of a prompt,
        answers with the text of the whole prompt."""
        assert isinstance(engine, TellsText)
        try:
            async with asyncio.timeout(_TEXT_SECONDS):
                while resumption.num_unsure and not attempt.is_over:
                    if not (await engine.text_of(resumption.unsure_ids())).endswith("\ufffd"):
                        break
                    if not attempt.is_over:
                        resumption.leave_out_last()
        except (EngineError, TimeoutError) as error:
            attempt.on_failed(f"it does not say whether a character ends with the last token: {error}")
        if not attempt.is_over:
            resumption.num_unsure = 0
            engine.submit(resumption.next_call(ticket), attempt)

    def can_resume(self, instance_id: InstanceId) -> bool:
        """Whether an instance is well and goes on from token ids."""
        status = self.statuses.get(instance_id)
        return status is not None and Capability.RESUME_FROM_TOKENS in status.spec.capabilities

    def _let_go(self, flight: Flight) -> None:
        """Its client is no more. The machine has the owner stop; one that it is just handed to, it does not know."""
        if flight.attempt is not None:
            flight.attempt.over()
            if self.moves.forget(flight.call.request.id):
                self.engines[flight.attempt.instance_id].abort(flight.call.request.id)

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
            self._dispatch(command)
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
        elif isinstance(command, StartInstance | StopInstance):
            self.on_fleet(command)
        elif isinstance(command, SetRole):
            self._set_role(command)
        elif isinstance(command, Migrate | MoveRefused | CopyOut | HandOver | Commit | AbortMigration):
            self.moves.carry_out(command)

    def _dispatch(self, command: Dispatch) -> None:
        instance_id = command.instance_id
        flight = self.flights.get(command.request_id)
        engine = self.engines.get(instance_id)
        if flight is None:
            return  # The client left meanwhile; the machine is about to hear of it.
        if engine is None:
            raise LawBroken(f"law 1: {command.request_id} was dispatched to {instance_id}, which is unknown")
        flight.client.on_dispatched(instance_id, command.attempt)
        if command.num_output_tokens:
            self.go_on(flight, instance_id)
            return
        flight.answer = flight.resumption = None
        call = flight.call
        waited = Duration(self.loop.now() - call.request.arrived_at)
        if waited >= _WAIT_TOLD:
            call = msgspec.structs.replace(call, waited=waited)
        if call.stream and call.request.movable and self.can_resume(instance_id):
            flight.resumption = Resumption(call)
            call = flight.resumption.first_call()
            flight.attempt = FollowedAttempt(self, flight, instance_id, flight.resumption)
        else:
            flight.attempt = Attempt(self, flight, instance_id)
        engine.submit(call, flight.attempt)
