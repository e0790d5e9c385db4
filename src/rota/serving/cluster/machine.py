"""The router's brain: admit, hold, dispatch, retry, and account for every request until it ends.

One request has one owner and one end. What the host owes in return for a `Dispatch` is exactly one `RequestFinished` or
`RequestFailed` for that attempt, also when the instance is lost; events about an attempt that is over are ignored.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import assert_never

from rota.base.errors import ConfigError, LawBroken, PolicyError, RotaError
from rota.base.instant import Duration, Instant, after, seconds, to_seconds
from rota.serving.api import AdmissionPolicy, DispatchPolicy, InstanceView, Pick
from rota.serving.cluster.ledger import ClusterReading, InstanceLedger
from rota.serving.cluster.lifecycles import REQUEST_LIFECYCLE, InstanceState, RequestState
from rota.serving.cluster.prefix_index import PrefixIndex
from rota.serving.cluster.tracked import ClusterCounts, TrackedRequest
from rota.serving.model.commands import Abort, ClusterCommand, Dispatch, Fail, Hold, Reject
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
    MigrationFailed,
    RequestArrived,
    RequestFailed,
    RequestFinished,
    RoomReserved,
)
from rota.serving.model.instance import InstanceId, InstanceReport, InstanceSpec
from rota.serving.model.request import Request, RequestId


class ClusterMachine:
    """Decides for each request whether it enters, which instance gets it, and how it ends.

    * **Arrival.** A prompt longer than any instance seen so far can take is refused with 400. Then the admission policy
      is asked, then the dispatch policy, with the instances that are ready and large enough. If there is none, the
      request is held, and dispatched by class and arrival as soon as an instance starts.
    * **Hold.** At most `max_queued` arrivals are held, each for `hold_timeout` at most; then 503 with `retry_after`.
      Requests that come back from a failed attempt were accepted already, so they are held beyond that bound.
    * **Failure.** Before the first token a retryable failure is dispatched again, up to `max_attempts` in all, away
      from the instances that failed this request unless no other can take it. After the first token it ends in `Fail`.
    * **Instances.** `InstanceLost` stops new dispatches; the host reports the lost requests one by one with
      `RequestFailed`. Facts about a request that still crossed the loss (it had finished after all) are believed.
      `InstanceStarted` for an instance that is known means that it came back with nothing cached. A lost or draining
      instance is forgotten when its last request ended.
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
        max_queued: int = 1024,
        hold_timeout: Duration = seconds(60),
        retry_after: Duration = seconds(5),
        prefix_index: PrefixIndex | None = None,
        num_recent: int = 10_000,
    ) -> None:
        """`retry_after` is what a client is told when no instance could take its request. `num_recent` is how many
        ended requests are remembered to recognise an id that arrives again. Without `prefix_index` no instance has
        prefixes."""
        if max_attempts < 1:
            raise ConfigError(f"max_attempts must be at least 1, not {max_attempts}")
        if max_queued < 0:
            raise ConfigError(f"max_queued must be at least 0 requests, not {max_queued}")
        self._dispatch_policy = dispatch
        self._admission_policy = admission
        self._max_attempts = max_attempts
        self._max_queued = max_queued
        self._hold_timeout = hold_timeout
        self._retry_after = retry_after
        self._prefix_index = prefix_index
        self._num_recent = num_recent

        self._now: Instant | None = None
        self._requests: dict[RequestId, TrackedRequest] = {}
        # Deadlines in the order of holding, which is the order of the deadlines, since every hold is equally long.
        self._held: OrderedDict[RequestId, Instant] = OrderedDict()
        self._recent: OrderedDict[RequestId, None] = OrderedDict()
        self._num_arrived = 0
        self._num_ended = dict.fromkeys(REQUEST_LIFECYCLE.final, 0)

        self._ledgers: dict[InstanceId, InstanceLedger] = {}
        self._ready: tuple[InstanceLedger, ...] = ()
        self._ready_views: tuple[InstanceView, ...] = ()
        self._max_prompt_everywhere = 0
        """Prompt tokens that every ready instance can take."""
        self._max_prompt_anywhere: int | None = None
        """Prompt tokens that the largest instance ever seen can take; None before the first."""

    # --- the machine protocol ----------------------------------------------------------------------------------------

    def handle(self, event: ClusterEvent, now: Instant) -> Sequence[ClusterCommand]:
        self._advance(now)
        match event:
            case RequestArrived():
                return self._arrive(event.request, now)
            case FirstTokenSeen():
                tracked = self._owned(event.request_id, event.instance_id)
                if tracked is not None and tracked.state == RequestState.ASSIGNED:
                    tracked.move("first_token")
                    self._ledgers[event.instance_id].first_token(event.request_id)
                return ()
            case RequestFinished():
                tracked = self._owned(event.request_id, event.instance_id)
                if tracked is not None:
                    self._end(tracked, "finished")
                return ()
            case RequestFailed():
                return self._attempt_failed(event, now)
            case InstanceReported():
                self._take_report(event.report, now)
                return ()
            case ClientLeft():
                return self._client_left(event.request_id)
            case InstanceStarted():
                return self._instance_started(event.spec, now)
            case InstanceLost():
                self._instance_left(event.instance_id, "lost")
                return ()
            case InstanceDraining():
                self._instance_left(event.instance_id, "draining")
                return ()
            case RoomReserved() | CopyStarted() | CopyCaughtUp() | HandedOver() | MigrationFailed():
                return ()
            case _:
                assert_never(event)

    def next_deadline(self) -> Instant | None:
        return next(iter(self._held.values()), None)

    def expire(self, now: Instant) -> Sequence[ClusterCommand]:
        self._advance(now)
        overdue = []
        for request_id, deadline_at in self._held.items():
            if deadline_at > now:
                break
            overdue.append(self._requests[request_id])
        waited = f"no instance could take the request within {to_seconds(self._hold_timeout):g} s"
        return [self._give_up(tracked, waited) for tracked in overdue]

    def check(self) -> None:
        counts = self.counts()
        num_unfinished = counts.num_queued + counts.num_assigned + counts.num_running
        num_ended = counts.num_finished + counts.num_rejected + counts.num_failed + counts.num_aborted
        if num_unfinished != len(self._requests) or counts.num_arrived != num_unfinished + num_ended:
            raise LawBroken(f"law 1: {counts.num_arrived} requests arrived, but {counts} does not add up to that")
        for ledger in self._ledgers.values():
            recount = 0
            for request_id in ledger.outstanding:
                tracked = self._requests.get(request_id)
                if tracked is None or tracked.instance_id != ledger.id:
                    owner = None if tracked is None else tracked.instance_id
                    raise LawBroken(f"law 1: {request_id} is outstanding at {ledger.id}, but its owner is {owner}")
                recount += 1 if tracked.state == RequestState.RUNNING else tracked.request.num_prompt_tokens
            if recount != ledger.num_outstanding_tokens:
                raise LawBroken(
                    f"law 1: {ledger.id} counts {ledger.num_outstanding_tokens} outstanding tokens, "
                    f"its requests {recount}"
                )
        # Each outstanding request is owned where it is counted, so equal numbers mean that nobody is owned uncounted.
        num_outstanding = sum(ledger.num_outstanding_requests for ledger in self._ledgers.values())
        if num_outstanding != counts.num_assigned + counts.num_running:
            raise LawBroken(f"law 1: {num_outstanding} requests are outstanding at instances, but {counts}")
        self._check_bounds(counts)

    def unfinished(self) -> Sequence[RequestId]:
        return list(self._requests)

    # --- what hosts and eyes read ------------------------------------------------------------------------------------

    def counts(self) -> ClusterCounts:
        """The requests by state; O(unfinished)."""
        num_in = dict.fromkeys(RequestState, 0)
        for tracked in self._requests.values():
            num_in[RequestState(tracked.state)] += 1
        return ClusterCounts(
            num_arrived=self._num_arrived,
            num_queued=num_in[RequestState.QUEUED],
            num_assigned=num_in[RequestState.ASSIGNED],
            num_running=num_in[RequestState.RUNNING],
            num_finished=self._num_ended[RequestState.FINISHED],
            num_rejected=self._num_ended[RequestState.REJECTED],
            num_failed=self._num_ended[RequestState.FAILED],
            num_aborted=self._num_ended[RequestState.ABORTED],
        )

    def owner(self, request_id: RequestId) -> InstanceId | None:
        """The instance that has the request now; None if it is held, ended or unknown."""
        tracked = self._requests.get(request_id)
        return None if tracked is None else tracked.instance_id

    def instance_states(self) -> dict[InstanceId, InstanceState]:
        """Every instance that is not forgotten, by id, and its state."""
        return {ledger.id: InstanceState(ledger.state) for ledger in _by_id(self._ledgers.values())}

    def instance_views(self) -> Sequence[InstanceView]:
        """The ready instances by id, as policies see them."""
        return self._ready_views

    # --- requests ----------------------------------------------------------------------------------------------------

    def _arrive(self, request: Request, now: Instant) -> Sequence[ClusterCommand]:
        if request.id in self._requests or request.id in self._recent:
            raise LawBroken(f"law 1: request {request.id} arrived twice")
        if request.arrived_at > now:
            raise LawBroken(f"law 5: request {request.id} arrived at {request.arrived_at}, after now ({now})")
        tracked = TrackedRequest(request)
        refusal = self._refusal_at_the_door(tracked, now)
        candidates = self._candidates(tracked) if refusal is None else ()
        if refusal is None and not candidates and len(self._held) >= self._max_queued:
            refusal = Reject(
                request.id,
                f"no instance can take the request and {len(self._held)} others wait for one already",
                503,
                self._retry_after,
            )
        pick = self._pick(request, candidates, now) if candidates else None

        self._num_arrived += 1
        self._requests[request.id] = tracked
        if refusal is not None:
            self._end(tracked, "rejected")
            return (refusal,)
        if pick is None:
            return (self._hold(tracked, now),)
        return (self._dispatch(tracked, pick),)

    def _refusal_at_the_door(self, tracked: TrackedRequest, now: Instant) -> Reject | None:
        request = tracked.request
        if self._max_prompt_anywhere is not None and request.num_prompt_tokens > self._max_prompt_anywhere:
            return self._never_fits(request)
        policy = self._admission_policy
        try:
            admission = policy.admit(request, ClusterReading(now, self._ready_views), len(self._requests))
        except RotaError:
            raise
        except Exception as error:
            raise _broken(policy, f"raised {error!r}", request) from error
        if admission.admitted:
            tracked.admission = admission.reason
            return None
        if not admission.reason:
            raise _broken(policy, "refused without a reason (law 11)", request)
        delay = admission.retry_after_seconds
        return Reject(request.id, admission.reason, admission.status, None if delay is None else seconds(delay))

    def _never_fits(self, request: Request) -> Reject:
        reason = (
            f"the prompt has {request.num_prompt_tokens} tokens, and the largest instance takes at most "
            f"{self._max_prompt_anywhere} with room for one token of output"
        )
        return Reject(request.id, reason, 400)

    def _candidates(self, tracked: TrackedRequest) -> Sequence[InstanceView]:
        """Ready instances that the request fits, without those that failed it while there are others; by id."""
        num_prompt_tokens = tracked.request.num_prompt_tokens
        if num_prompt_tokens <= self._max_prompt_everywhere and not tracked.failures:
            return self._ready_views
        fitting = [ledger.view for ledger in self._ready if num_prompt_tokens <= ledger.max_prompt_tokens]
        failed = {instance_id for instance_id, _ in tracked.failures}
        return [view for view in fitting if view.id not in failed] or fitting

    def _pick(self, request: Request, candidates: Sequence[InstanceView], now: Instant) -> Pick:
        policy = self._dispatch_policy
        try:
            pick = policy.pick(request, ClusterReading(now, candidates))
        except RotaError:
            raise
        except Exception as error:
            raise _broken(policy, f"raised {error!r}", request) from error
        if not any(view.id == pick.instance_id for view in candidates):
            offered = ", ".join(view.id for view in candidates)
            raise _broken(policy, f"picked {pick.instance_id!r}, which is not among {offered}", request)
        if not pick.reason:
            raise _broken(policy, f"picked {pick.instance_id!r} without a reason", request)
        return pick

    def _dispatch(self, tracked: TrackedRequest, pick: Pick) -> Dispatch:
        tracked.move("dispatched")
        tracked.instance_id = pick.instance_id
        tracked.num_attempts += 1
        self._ledgers[pick.instance_id].debit(tracked.request)
        if self._prefix_index is not None:
            self._prefix_index.record(tracked.request, pick.instance_id)
        reason = pick.reason
        if tracked.failures:
            failed_on, why = tracked.failures[-1]
            reason = (
                f"attempt {tracked.num_attempts} of {self._max_attempts}, since {failed_on} failed ({why}): {reason}"
            )
        admission, tracked.admission = tracked.admission, ""
        return Dispatch(tracked.request.id, pick.instance_id, reason, tracked.num_attempts, pick.scores, admission)

    def _hold(self, tracked: TrackedRequest, now: Instant) -> Hold:
        request = tracked.request
        self._held[request.id] = after(now, self._hold_timeout)
        num_ready = len(self._ready)
        why = f"none of {num_ready} takes {request.num_prompt_tokens} prompt tokens" if num_ready else "none is ready"
        admission, tracked.admission = tracked.admission, ""
        return Hold(request.id, f"no instance can take it: {why}", admission)

    def _dispatch_held(self, now: Instant) -> list[ClusterCommand]:
        """Dispatch what is held and can go now, by class and arrival; refuse what turns out to fit nowhere."""
        commands: list[ClusterCommand] = []
        for tracked in sorted((self._requests[request_id] for request_id in self._held), key=_hold_order):
            candidates = self._candidates(tracked)
            if candidates:
                pick = self._pick(tracked.request, candidates, now)
                del self._held[tracked.request.id]
                commands.append(self._dispatch(tracked, pick))
            elif tracked.request.num_prompt_tokens > (self._max_prompt_anywhere or 0):
                self._end(tracked, "rejected")
                commands.append(self._never_fits(tracked.request))
        return commands

    def _attempt_failed(self, event: RequestFailed, now: Instant) -> Sequence[ClusterCommand]:
        tracked = self._owned(event.request_id, event.instance_id)
        if tracked is None:
            return ()
        failure = f"{event.instance_id}: {event.reason or 'no reason given'}"
        if tracked.state == RequestState.RUNNING:
            return (self._fail(tracked, f"the instance failed after the first token ({failure})"),)
        if not event.retryable:
            return (self._fail(tracked, f"the instance refused the request ({failure})"),)
        tracked.failures += ((event.instance_id, event.reason or "no reason given"),)
        if tracked.num_attempts >= self._max_attempts:
            return (self._fail(tracked, f"all {tracked.num_attempts} attempts failed"),)
        tracked.move("retried")
        self._release(tracked)
        held = self._hold(tracked, now)
        candidates = self._candidates(tracked)
        if not candidates:
            return (held,)
        pick = self._pick(tracked.request, candidates, now)
        del self._held[tracked.request.id]
        return (self._dispatch(tracked, pick),)

    def _client_left(self, request_id: RequestId) -> Sequence[ClusterCommand]:
        tracked = self._requests.get(request_id)
        if tracked is None:
            return ()
        instance_id = tracked.instance_id
        self._end(tracked, "aborted")
        return () if instance_id is None else (Abort(request_id, instance_id, "the client left"),)

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

    def _end(self, tracked: TrackedRequest, event: str) -> None:
        """The one way out: take the last step of the lifecycle and forget the request, but for its id."""
        request_id = tracked.request.id
        tracked.move(event)
        self._num_ended[tracked.state] += 1
        self._release(tracked)
        self._held.pop(request_id, None)
        del self._requests[request_id]
        self._recent[request_id] = None
        if len(self._recent) > self._num_recent:
            self._recent.popitem(last=False)

    def _release(self, tracked: TrackedRequest) -> None:
        """Take the request off its instance's account."""
        if tracked.instance_id is not None:
            ledger = self._ledgers[tracked.instance_id]
            tracked.instance_id = None
            ledger.credit(tracked.request.id)
            self._forget_if_over(ledger)

    # --- instances ---------------------------------------------------------------------------------------------------

    def _instance_started(self, spec: InstanceSpec, now: Instant) -> Sequence[ClusterCommand]:
        ledger = self._ledgers.get(spec.id)
        if ledger is None:
            ledger = self._ledgers[spec.id] = InstanceLedger(spec.id, spec, self._prefix_index)
        ledger.start(spec, now)
        if self._prefix_index is not None:
            num_blocks = spec.limits.num_blocks if spec.limits.enable_prefix_caching else 0
            self._prefix_index.add_instance(spec.id, num_blocks, spec.limits.block_size)
        self._max_prompt_anywhere = max(self._max_prompt_anywhere or 0, ledger.max_prompt_tokens)
        self._refresh_ready()
        return self._dispatch_held(now)

    def _instance_left(self, instance_id: InstanceId, event: str) -> None:
        ledger = self._ledgers.get(instance_id)
        if ledger is None:
            return
        ledger.move(event)
        self._refresh_ready()
        self._forget_if_over(ledger)

    def _take_report(self, report: InstanceReport, now: Instant) -> None:
        if report.observed_at > now:
            raise LawBroken(
                f"law 5: {report.instance_id} reports what it will be at {report.observed_at}, now is {now}"
            )
        ledger = self._ledgers.get(report.instance_id)
        if ledger is not None:
            ledger.take_report(report)

    def _forget_if_over(self, ledger: InstanceLedger) -> None:
        """Forget an instance that gets no requests any more and has none left."""
        if ledger.num_outstanding_requests or ledger.state == InstanceState.READY:
            return
        if ledger.state == InstanceState.DRAINING:
            ledger.move("drained")
        del self._ledgers[ledger.id]
        if self._prefix_index is not None:
            self._prefix_index.forget_instance(ledger.id)

    def _refresh_ready(self) -> None:
        ready = (ledger for ledger in self._ledgers.values() if ledger.state == InstanceState.READY)
        self._ready = _by_id(ready)
        self._ready_views = tuple(ledger.view for ledger in self._ready)
        self._max_prompt_everywhere = min((ledger.max_prompt_tokens for ledger in self._ready), default=0)

    # --- laws --------------------------------------------------------------------------------------------------------

    def _advance(self, now: Instant) -> None:
        if self._now is not None and now < self._now:
            raise LawBroken(f"law 5: time went back from {self._now} to {now}")
        self._now = now

    def _check_bounds(self, counts: ClusterCounts) -> None:
        queued = {request_id for request_id, tracked in self._requests.items() if tracked.state == RequestState.QUEUED}
        if queued != self._held.keys():
            lost = ", ".join(sorted(queued ^ self._held.keys()))
            raise LawBroken(f"law 6: queued and held with a deadline are not the same requests: {lost}")
        num_new = sum(not self._requests[request_id].num_attempts for request_id in self._held)
        if num_new > self._max_queued:
            raise LawBroken(f"law 12: {num_new} arrivals are held, {self._max_queued} may be")
        if len(self._recent) > self._num_recent:
            raise LawBroken(f"law 12: {len(self._recent)} ended requests are remembered, {self._num_recent} may be")
        if self._prefix_index is not None:
            self._prefix_index.check()


def _by_id(ledgers: Iterable[InstanceLedger]) -> tuple[InstanceLedger, ...]:
    return tuple(sorted(ledgers, key=lambda ledger: ledger.id))


def _hold_order(tracked: TrackedRequest) -> tuple[int, Instant, RequestId]:
    return tracked.request.priority, tracked.request.arrived_at, tracked.request.id


def _broken(policy: object, what: str, request: Request) -> PolicyError:
    return PolicyError(
        f"{type(policy).__name__} {what}, asked about request {request.id}",
        hint="run the conformance suite of its kind on the policy; see rota.testing",
    )
