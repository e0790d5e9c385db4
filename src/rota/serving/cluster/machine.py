"""The router's brain: admit, hold, dispatch, retry, resume, move, and account for every request until it ends.

One request has one owner and one end. What the host owes in return for a `Dispatch` is a `FirstTokenSeen` when its next
token passes and exactly one `RequestFinished` or `RequestFailed` for that attempt, also when the instance is lost;
events about an attempt that is over are ignored. What it owes while a request moves is in
`rota.serving.cluster.migration`; from `HandedOver` on the attempt is the destination's.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import assert_never

from rota.base.errors import ConfigError, LawBroken, PolicyError
from rota.base.instant import Duration, Instant, seconds, to_seconds
from rota.serving.api import (
    Admission,
    AdmissionPolicy,
    DispatchPolicy,
    FleetRules,
    InstanceView,
    MigrationPolicy,
    OrderPolicy,
    Pick,
    QueueRules,
    ScalingPolicy,
)
from rota.serving.cluster.answers import ask_dispatch
from rota.serving.cluster.decode_places import DecodePlaces
from rota.serving.cluster.delays import Delays
from rota.serving.cluster.door import Door
from rota.serving.cluster.flips import RoleFlips
from rota.serving.cluster.instances import InstanceBook
from rota.serving.cluster.lifecycles import REQUEST_LIFECYCLE, InstanceState, RequestState
from rota.serving.cluster.migration import Cause, MigrationBook, MigrationCounts, MigrationLimits
from rota.serving.cluster.migration_rounds import MigrationRounds
from rota.serving.cluster.prefix_index import PrefixIndex
from rota.serving.cluster.queue import RouterQueue, Tried
from rota.serving.cluster.retries import RetryRule
from rota.serving.cluster.scaling import FleetBook
from rota.serving.cluster.tracked import ClusterCounts, TrackedRequest
from rota.serving.model.commands import (
    Abort,
    ClusterCommand,
    Dispatch,
    DrainInstance,
    Fail,
    Hold,
    KeepInstance,
    Migrate,
    Reject,
)
from rota.serving.model.events import (
    ClientLeft,
    ClusterEvent,
    CopyCaughtUp,
    CopyStarted,
    FirstTokenSeen,
    HandedOver,
    InstanceDraining,
    InstanceLost,
    InstanceReported,
    InstanceStarted,
    InstanceStarting,
    InstanceStopped,
    MigrationFailed,
    MoveAsked,
    RequestArrived,
    RequestFailed,
    RequestFinished,
    RoomReserved,
    ScalingDue,
    StartFailed,
)
from rota.serving.model.instance import InstanceId, InstanceSpec
from rota.serving.model.request import Request, RequestId


class ClusterMachine:
    """Decides for each request whether it enters, which instance gets it, and how it ends.

    * **Arrival.** A prompt longer than any instance seen so far can take is refused with 400. Then the admission policy
      is asked, then the dispatch policy, with the instances that are ready and large enough. If there is none, the
      request is held, and dispatched by class and arrival as soon as an instance starts; with an order policy, as soon
      as one has a place, in the policy's order.
    * **Hold.** At most `queue.max_held` arrivals are held, each for `queue.timeout_seconds` at most; then 503 with
      `retry_after`. Requests that come back from a failed attempt were accepted already, so they are held beyond that
      bound. See `rota.serving.cluster.queue`.
    * **Failure.** Before the first token a retryable failure is dispatched again, up to `max_attempts` in all, away
      from the instances that failed this request unless no other can take it, and from the one that failed it last
      unless no other is left. After the first token it ends in `Fail`, unless the host says from which token on it can
      be resumed: then it goes on at an engine that can do that, up to `max_resumptions` times. So that those who come
      back do not melt the rest, an instance is given no more than `max_resuming_per_instance` of them whose next token
      was not seen; the others are held, ahead of their class.
    * **Migration.** While work is unfinished and two instances are there, the migration policy is asked every
      `interval_seconds`, and each of its moves that still can be is begun. It stops to be asked when for `patience` no
      request arrived, was heard of or ended: what stands still is not brought on by looking at it.
    * **Instances.** `InstanceLost` stops new dispatches; the host reports the lost requests one by one with
      `RequestFailed`. Facts about a request that still crossed the loss (it had finished after all) are believed.
      `InstanceStarted` for an instance that is known means that it came back with nothing cached. A lost or draining
      instance is forgotten when its last request ended.
    * **Scaling.** When it is due, the scaling policy is asked, and what the rules of the fleet allow is done: see
      `rota.serving.cluster.scaling`.
    * **Accounting.** A request counts with its prompt tokens from dispatch to first token, then with 1 until it ends.

    Raises `LawBroken` when the host breaks its side: an id that is unfinished or ended recently arrives again (law 1:
    an answer could not say which of the two it is for, so the front door must give ids of its own), or time goes back
    (law 5). Raises `PolicyError` when a policy raises or answers with what it was not offered; an arrival then leaves
    no trace.
    """

    def __init__(
        self,
        dispatch: DispatchPolicy,
        admission: AdmissionPolicy,
        *,
        max_attempts: int = 3,
        queue: QueueRules = QueueRules(),
        order: OrderPolicy | None = None,
        retry_after: Duration = seconds(5),
        prefix_index: PrefixIndex | None = None,
        num_recent: int = 10_000,
        migration: MigrationPolicy | None = None,
        migration_limits: MigrationLimits = MigrationLimits(),
        max_resumptions: int = 3,
        max_resuming_per_instance: int = 8,
        patience: Duration = seconds(600),
        scaling: ScalingPolicy | None = None,
        fleet: FleetRules = FleetRules(),
    ) -> None:
        """`order` says who goes next where `queue` limits what an instance is given. `retry_after` is what a client is
        told when no instance could take its request. `num_recent` is how many ended requests are remembered to
        recognise an id that arrives again. Without `prefix_index` no instance has prefixes."""
        if max_resuming_per_instance < 1:
            raise ConfigError(f"max_resuming_per_instance must be at least 1, not {max_resuming_per_instance}")
        self._dispatch_policy = dispatch
        self._retries = RetryRule(max_attempts, max_resumptions)
        self._max_resuming = max_resuming_per_instance
        self._retry_after = retry_after
        self._num_recent = num_recent

        self._now: Instant | None = None
        self._requests: dict[RequestId, TrackedRequest] = {}
        self._queue = RouterQueue(queue, order, prefix_index)
        self._delays = Delays()
        self._recent: OrderedDict[RequestId, None] = OrderedDict()
        self._num_arrived = 0
        self._num_ended = dict.fromkeys(REQUEST_LIFECYCLE.final, 0)
        self._num_resumed = 0

        self._instances = InstanceBook(prefix_index, self._queue.max_outstanding)
        self._door = Door(admission, self._instances)
        self._migrations = MigrationBook(self._instances, migration_limits)
        self._decode_places = DecodePlaces(dispatch, self._instances, self._migrations)
        self._flips = RoleFlips(dispatch, self._instances, self._migrations)
        self._rounds = MigrationRounds(migration, self._instances, self._migrations, patience)
        readers = any(getattr(policy, "reads_sequences", False) for policy in (dispatch, scaling))
        self.reads_sequences = bool(self._rounds.ask_every or readers or self._queue.is_ordered)
        """Whether a policy looks at who runs and who waits at an instance, so that reports should tell."""
        is_scaled = scaling is not None and scaling.interval_seconds > 0
        self.fleet = FleetBook(scaling, fleet, self._instances) if scaling is not None and is_scaled else None
        """The instances as they are scaled, to be read; None where nobody scales them."""

    # --- the machine protocol ----------------------------------------------------------------------------------------

    def handle(self, event: ClusterEvent, now: Instant) -> Sequence[ClusterCommand]:
        self._advance(now)
        commands = self._take(event, now)
        if self._instances.is_place_free:
            self._instances.is_place_free = False
            if self._queue:
                commands = [*commands, *self._dispatch_held(now)]
        if self.fleet is not None:
            commands = [*commands, *self.fleet.heard(event, now)]
        self._rounds.keep_asking(event, bool(self._requests), now)
        return commands

    def _take(self, event: ClusterEvent, now: Instant) -> Sequence[ClusterCommand]:
        match event:
            case RequestArrived():
                return self._arrive(event.request, now)
            case FirstTokenSeen():
                tracked = self._owned(event.request_id, event.instance_id)
                if tracked is not None and tracked.state == RequestState.ASSIGNED:
                    tracked.move("first_token")
                    self._instances.first_token(tracked)
                    self._door.first_token(tracked.request)
                    if self.fleet is not None:
                        self.fleet.demand.first_token(tracked.request, now)
                    return self._decode_places.first_token(tracked, now)
                return ()
            case RequestFinished():
                tracked = self._owned(event.request_id, event.instance_id)
                if tracked is None:
                    return ()
                commands = self._migrations.abort_of(event.request_id, Cause.REQUEST_ENDED, "it ended at its source")
                if self.fleet is not None:
                    self.fleet.demand.finished(tracked.request, event.num_output_tokens, now)
                self._end(tracked, "finished", event.num_output_tokens)
                return commands
            case RequestFailed():
                return self._attempt_failed(event, now)
            case InstanceReported():
                self._instances.take_report(event.report, now)
                self._queue.reported(event.report)
                return self._flips.reported(now)
            case ClientLeft():
                return self._client_left(event.request_id)
            case InstanceStarted():
                return self._instance_started(event.spec, now)
            case InstanceLost() | InstanceStopped():
                return self._instance_left(event.instance_id, "lost")
            case InstanceDraining():
                return self._instance_left(event.instance_id, "draining")
            case MoveAsked():
                return (self._migrations.begin_asked(event, self._requests.get(event.request_id), now),)
            case RoomReserved() | CopyStarted() | CopyCaughtUp() | HandedOver() | MigrationFailed():
                return self._migrations.take(event, now)
            case ScalingDue():
                return self._scale(event, now)
            case InstanceStarting() | StartFailed():
                return ()  # The fleet hears it.
            case _:
                assert_never(event)

    def next_deadline(self) -> Instant | None:
        held_at = self._queue.next_deadline()
        if not self._rounds.ask_every and not self._migrations.moving and not self._delays:
            return held_at
        deadlines = (held_at, self._delays.next_at(), self._migrations.next_deadline(), self._rounds.ask_at)
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def expire(self, now: Instant) -> Sequence[ClusterCommand]:
        self._advance(now)
        # First, so that a policy that raises leaves no trace but that it was asked.
        moves = self._rounds.ask(now)
        commands = self._migrations.expire(now)
        waited = f"no instance could take the request within {self._queue.rules.timeout_seconds:g} s"
        commands += [self._give_up(self._requests[each], waited) for each in self._queue.overdue(now)]
        for request_id in self._delays.due(now):
            commands += self._place(self._requests[request_id], now)
        begun = [self._migrations.begin(move, self._requests.get(move.request_id), now) for move in moves]
        commands += [each for each in begun if isinstance(each, Migrate)]
        if self.fleet is not None:
            commands += self.fleet.heard(None, now)
        self._rounds.keep_asking(None, bool(self._requests), now)
        return commands

    def check(self) -> None:
        counts = self.counts()
        num_unfinished = counts.num_queued + counts.num_assigned + counts.num_running
        num_ended = counts.num_finished + counts.num_rejected + counts.num_failed + counts.num_aborted
        if num_unfinished != len(self._requests) or counts.num_arrived != num_unfinished + num_ended:
            raise LawBroken(f"law 1: {counts.num_arrived} requests arrived, but {counts} does not add up to that")
        self._instances.check(self._requests, counts.num_assigned + counts.num_running)
        self._migrations.check(self._requests)
        if self.fleet is not None:
            self.fleet.check()
        self._queue.check(self._requests, self._delays.ids)
        if len(self._recent) > self._num_recent:
            raise LawBroken(f"law 12: {len(self._recent)} ended requests are remembered, {self._num_recent} may be")

    def unfinished(self) -> Sequence[RequestId]:
        return list(self._requests)

    # --- what hosts and eyes read ------------------------------------------------------------------------------------

    def counts(self) -> ClusterCounts:
        """The requests by state; O(unfinished)."""
        states = (tracked.state for tracked in self._requests.values())
        return ClusterCounts.of(states, self._num_ended, self._num_arrived, self._num_resumed)

    def migration_counts(self) -> MigrationCounts:
        """How many migrations were begun, committed and given up, and how many moves were dropped."""
        return self._migrations.counts()

    def owner(self, request_id: RequestId) -> InstanceId | None:
        """The instance that has the request now; None if it is held, ended or unknown."""
        tracked = self._requests.get(request_id)
        return None if tracked is None else tracked.instance_id

    def instance_states(self) -> dict[InstanceId, InstanceState]:
        """Every instance that is not forgotten, by id, and its state."""
        return self._instances.states()

    def instance_views(self) -> Sequence[InstanceView]:
        """The ready instances by id, as policies see them."""
        return self._instances.ready_views

    # --- requests ----------------------------------------------------------------------------------------------------

    def _arrive(self, request: Request, now: Instant) -> Sequence[ClusterCommand]:
        if request.id in self._requests or request.id in self._recent:
            raise LawBroken(f"law 1: request {request.id} arrived twice")
        if request.arrived_at > now:
            raise LawBroken(f"law 5: request {request.id} arrived at {request.arrived_at}, after now ({now})")
        tracked = TrackedRequest(request)
        answer = self._door.ask(request, len(self._requests), now)
        refusal = answer if isinstance(answer, Reject) else None
        candidates: Sequence[InstanceView] = ()
        not_before = pick = None
        if isinstance(answer, Admission):
            tracked.admission, tracked.only, not_before = answer.reason, answer.instance_ids, answer.not_before
            candidates = self._candidates(tracked) if not_before is None else ()
            num_waiting = len(self._queue) + len(self._delays)
            if not candidates and num_waiting >= self._queue.rules.max_held:
                reason = f"no instance can take the request and {num_waiting} others wait for one already"
                refusal = Reject(request.id, reason, 503, self._retry_after)
        if candidates and not self._queue.is_ordered:
            try:
                pick = ask_dispatch(self._dispatch_policy, request, candidates, now)
            except PolicyError:
                self._door.ended(request, None)
                raise

        self._num_arrived += 1
        self._requests[request.id] = tracked
        if self.fleet is not None:
            self.fleet.demand.arrived(request)
        if refusal is not None:
            self._end(tracked, "rejected")
            return (refusal,)
        if not_before is not None:
            self._delays.add(request.id, not_before)
            admission, tracked.admission = tracked.admission, ""
            return (Hold(request.id, f"its turn comes in {to_seconds(not_before - now):g} s", admission),)
        return self._place(tracked, now) if pick is None else (self._dispatch(tracked, pick),)

    def _candidates(self, tracked: TrackedRequest) -> Sequence[InstanceView]:
        return self._instances.candidates(tracked, self._max_resuming)

    def _dispatch(self, tracked: TrackedRequest, pick: Pick) -> Dispatch:
        tracked.move("dispatched")
        tracked.num_attempts += 1
        self._queue.dispatched(tracked)
        self._instances.assign(tracked, pick.instance_id)
        self._decode_places.note(tracked, pick)
        admission, tracked.admission = tracked.admission, ""
        return Dispatch(
            tracked.request.id,
            pick.instance_id,
            self._retries.reason(tracked, pick.reason),
            tracked.num_attempts,
            pick.scores,
            admission,
            tracked.num_output_tokens,
            tracked.prefill_only,
            tracked.decode_at,
        )

    def _place(self, tracked: TrackedRequest, now: Instant) -> list[ClusterCommand]:
        """Have a request go, or hold it. Where an order policy decides, others may go in its place."""
        admission = tracked.admission
        held = self._hold(tracked, now)
        if self._queue.is_ordered:
            tracked.admission = admission
            commands = self._dispatch_held(now)
            is_held = tracked.request.id in self._queue
            tracked.admission = ""
            return [held, *commands] if is_held else commands
        candidates = self._candidates(tracked)
        if not candidates:
            return [held]
        return [self._dispatch(tracked, ask_dispatch(self._dispatch_policy, tracked.request, candidates, now))]

    def _hold(self, tracked: TrackedRequest, now: Instant) -> Hold:
        self._queue.hold(tracked, now)
        admission, tracked.admission = tracked.admission, ""
        why = self._instances.why_none(tracked)
        return Hold(tracked.request.id, f"no instance can take it: {why}", admission)

    def _dispatch_held(self, now: Instant) -> list[ClusterCommand]:
        """Dispatch what is held and can go now, as the queue has it; refuse what turns out to fit nowhere."""
        commands: list[ClusterCommand] = []

        def try_one(request_id: RequestId) -> Tried:
            tracked = self._requests[request_id]
            candidates = self._candidates(tracked)
            if candidates:
                pick = ask_dispatch(self._dispatch_policy, tracked.request, candidates, now)
                commands.append(self._dispatch(tracked, pick))
                return Tried.WENT
            if tracked.request.num_prompt_tokens > (self._instances.max_prompt_anywhere or 0):
                self._end(tracked, "rejected")
                commands.append(self._door.never_fits(tracked.request))
                return Tried.PASSED_OVER
            return Tried.FULL if self._instances.is_full_for(tracked) else Tried.PASSED_OVER

        if self._queue and self._instances.has_place:
            self._queue.walk(now, self._requests, self._instances.limits, try_one)
        return commands

    def _attempt_failed(self, event: RequestFailed, now: Instant) -> Sequence[ClusterCommand]:
        tracked = self._owned(event.request_id, event.instance_id)
        if tracked is None:
            return ()
        commands = self._migrations.abort_of(event.request_id, Cause.REQUEST_FAILED, "its source failed it")
        refusal = self._retries.refusal(tracked, event, self._instances.max_prompt_anywhere or 0)
        if refusal is not None:
            return [*commands, self._fail(tracked, refusal)]
        tracked.num_output_tokens = max(tracked.num_output_tokens, event.num_output_tokens or 0)
        if tracked.state == RequestState.RUNNING:
            tracked.move("resumed")
            tracked.num_resumptions += 1
            self._num_resumed += 1
        else:
            tracked.move("retried")
        self._instances.release(tracked)
        return [*commands, *self._place(tracked, now)]

    def _client_left(self, request_id: RequestId) -> Sequence[ClusterCommand]:
        tracked = self._requests.get(request_id)
        if tracked is None:
            return ()
        commands = self._migrations.abort_of(request_id, Cause.CLIENT_LEFT, "the client left")
        if tracked.instance_id is not None:
            commands.append(Abort(request_id, tracked.instance_id, "the client left"))
        self._end(tracked, "aborted")
        return commands

    def _give_up(self, tracked: TrackedRequest, reason: str) -> Reject | Fail:
        """End a held request. One that was tried did not only meet a closed door: it failed."""
        if tracked.num_attempts:
            return self._fail(tracked, reason)
        self._end(tracked, "rejected")
        return Reject(tracked.request.id, reason, 503, self._retry_after)

    def _fail(self, tracked: TrackedRequest, reason: str) -> Fail:
        attempts = "; ".join(f"{instance_id}: {why}" for instance_id, why in tracked.failures)
        self._end(tracked, "failed")
        return Fail(tracked.request.id, f"{reason} ({attempts})" if attempts else reason)

    def _owned(self, request_id: RequestId, instance_id: InstanceId) -> TrackedRequest | None:
        """The request, if this instance is its owner: else the fact is about an attempt that is over."""
        tracked = self._requests.get(request_id)
        return tracked if tracked is not None and tracked.instance_id == instance_id else None

    def _end(self, tracked: TrackedRequest, event: str, num_output_tokens: int | None = None) -> None:
        """The one way out: take the last step of the lifecycle and forget the request, but for its id."""
        request_id = tracked.request.id
        tracked.move(event)
        if self.fleet is not None:
            self.fleet.demand.ended(tracked.request, is_lost=event in ("rejected", "failed"))
        self._num_ended[tracked.state] += 1
        self._instances.release(tracked)
        self._queue.ended(tracked.request, num_output_tokens)
        self._delays.discard(request_id)
        self._door.ended(tracked.request, num_output_tokens)
        del self._requests[request_id]
        self._decode_places.ended(tracked.request, num_output_tokens)
        self._recent[request_id] = None
        if len(self._recent) > self._num_recent:
            self._recent.popitem(last=False)

    # --- instances ---------------------------------------------------------------------------------------------------

    def _instance_started(self, spec: InstanceSpec, now: Instant) -> Sequence[ClusterCommand]:
        if self.fleet is not None and self.fleet.is_unwanted(spec.id):
            return ()
        # One that came back has nothing of what was on its way from it or to it.
        commands = self._migrations.abort_at(spec.id, f"{spec.id} started anew", as_source=True)
        self._instances.start(spec, now)
        return commands + self._dispatch_held(now)

    def _instance_left(self, instance_id: InstanceId, event: str) -> Sequence[ClusterCommand]:
        ledger = self._instances.ledgers.get(instance_id)
        if ledger is None:
            return ()
        ledger.move(event)
        self._instances.refresh()
        is_lost = ledger.state == InstanceState.LOST
        reason = f"{instance_id} {'was lost' if is_lost else 'drains'}"
        commands = self._migrations.abort_at(instance_id, reason, as_source=is_lost)
        self._instances.forget_if_over(ledger)
        return commands

    def _scale(self, due: ScalingDue, now: Instant) -> Sequence[ClusterCommand]:
        if self.fleet is None:
            return ()
        commands: list[ClusterCommand] = []
        for command in self.fleet.look(due, self._requests.values(), now):
            commands.append(command)
            if isinstance(command, DrainInstance):
                commands += self._instance_left(command.instance_id, "draining")
            elif isinstance(command, KeepInstance):
                self._instances.keep(command.instance_id)
                commands += self._dispatch_held(now)
        return commands

    # --- laws --------------------------------------------------------------------------------------------------------

    def _advance(self, now: Instant) -> None:
        if self._now is not None and now < self._now:
            raise LawBroken(f"law 5: time went back from {self._now} to {now}")
        self._now = now
