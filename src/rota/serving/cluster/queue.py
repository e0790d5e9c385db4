"""The router's queue: who is held, for how long, in which order they go, and how many an instance is given at once."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Set
from collections.abc import Sequence as SequenceOf
from enum import Enum, auto
from operator import attrgetter

from rota.base.errors import LawBroken
from rota.base.instant import Instant, after, seconds
from rota.serving.api import Cursor, EndObserver, OnRefusal, OrderPolicy, Pool, QueueRules, Refusal, SequenceView
from rota.serving.cluster.answers import Asked, tell_end
from rota.serving.cluster.lifecycles import RequestState
from rota.serving.cluster.prefix_index import PrefixIndex
from rota.serving.cluster.tracked import TrackedRequest
from rota.serving.model.instance import InstanceLimits, InstanceReport
from rota.serving.model.request import Request, RequestId, TenantId
from rota.serving.waiting import WaitingQueue


class Tried(Enum):
    """What came of trying to dispatch a request."""

    WENT = auto()
    FULL = auto()
    """An instance would take it, and has as many as it may have."""
    PASSED_OVER = auto()
    """It can go nowhere for reasons of its own: nobody has to wait behind it."""


class QueuedRequest:
    """A request as an order policy sees it at the router: all of it is still to be computed."""

    __slots__ = ("admitted_seq", "num_output_tokens", "queue_position", "request")

    num_computed_tokens = 0
    num_preemptions = 0

    def __init__(self, request: Request) -> None:
        self.request = request
        self.queue_position = 0
        self.admitted_seq = 0
        self.num_output_tokens = 0
        """As far as it is known: by the instance's reports, or at its end."""

    @property
    def id(self) -> RequestId:
        return self.request.id

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def tenant(self) -> TenantId:
        return self.request.tenant

    @property
    def arrived_at(self) -> Instant:
        return self.request.arrived_at

    @property
    def num_prompt_tokens(self) -> int:
        return self.request.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        return self.request.num_prompt_tokens + self.num_output_tokens

    @property
    def num_pending_tokens(self) -> int:
        return self.num_tokens


class _AtTheRouter:
    """What an order policy is shown: the fleet as one engine."""

    __slots__ = ("_prefix_index", "limits", "now", "num_free_blocks", "running", "waiting")

    def __init__(
        self,
        now: Instant,
        limits: InstanceLimits,
        running: SequenceOf[QueuedRequest],
        waiting: WaitingQueue[QueuedRequest],
        prefix_index: PrefixIndex | None,
    ) -> None:
        self._prefix_index = prefix_index
        self.now = now
        self.limits = limits
        self.num_free_blocks = limits.num_blocks
        self.running = running
        self.waiting = waiting

    def num_cached_tokens(self, sequence: SequenceView) -> int:
        return 0 if self._prefix_index is None else self._prefix_index.num_tokens_anywhere(sequence.request)


class RouterQueue:
    """Who is held at the router, each until a deadline.

    Without an order policy whoever is held goes by class and arrival, in a class those first whose clients have got
    something already. With one, an instance is given `max_outstanding_per_instance` requests at most, the rest is held,
    and the policy's cursor says who is next: it hears `granted` when a request is dispatched, which is what it charges,
    and is shown those who were dispatched as running, with the output tokens that reports and ends tell of. Nobody is
    displaced at the router.
    """

    def __init__(
        self, rules: QueueRules, order: OrderPolicy | None = None, prefix_index: PrefixIndex | None = None
    ) -> None:
        self.rules = rules
        self._prefix_index = prefix_index
        self.max_outstanding = rules.max_outstanding_per_instance or None
        self._order = order if self.max_outstanding is not None else None
        # Deadlines in the order of holding, which is the order of the deadlines, since every hold is equally long.
        self._held: OrderedDict[RequestId, Instant] = OrderedDict()
        self._waiting: WaitingQueue[QueuedRequest] = WaitingQueue()
        self._known: dict[RequestId, QueuedRequest] = {}
        """Everybody who is held or dispatched, where there is an order policy."""
        self._running: dict[RequestId, QueuedRequest] = {}
        self._num_dispatched = 0
        self._leaving: list[QueuedRequest] | None = None
        """Those who went in the walk that is under way."""
        self._now = Instant(0)
        self._limits = InstanceLimits(num_blocks=1)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._held

    def __iter__(self) -> Iterator[RequestId]:
        return iter(self._held)

    @property
    def is_ordered(self) -> bool:
        """Whether an order policy says who is next."""
        return self._order is not None

    def next_deadline(self) -> Instant | None:
        return next(iter(self._held.values()), None)

    def overdue(self, now: Instant) -> list[RequestId]:
        """Those whose time is up, longest first."""
        found = []
        for request_id, deadline_at in self._held.items():
            if deadline_at > now:
                break
            found.append(request_id)
        return found

    def check(self, tracked_by_id: dict[RequestId, TrackedRequest], delayed: Set[RequestId]) -> None:
        """Law 6: whoever is queued is held with a deadline, or delayed to an instant of its own, and stands in the
        order policy's queue. Law 12."""
        requests = {each: tracked for each, tracked in tracked_by_id.items() if each not in delayed}
        if any(tracked_by_id[each].state != RequestState.QUEUED for each in delayed) or delayed & self._held.keys():
            raise LawBroken(f"law 6: of {sorted(delayed)}, who are delayed, some are elsewhere too")
        queued = {request_id for request_id, tracked in requests.items() if tracked.state == RequestState.QUEUED}
        if queued != self._held.keys():
            lost = ", ".join(sorted(queued ^ self._held.keys()))
            raise LawBroken(f"law 6: queued and held with a deadline are not the same requests: {lost}")
        num_new = sum(not requests[request_id].num_attempts for request_id in self._held)
        if num_new + len(delayed) > self.rules.max_held:
            raise LawBroken(f"law 12: {num_new} arrivals are held, {self.rules.max_held} may be")
        if self._order is not None:
            waiting = {each.id for each in self._waiting}
            if waiting != self._held.keys() or self._known.keys() != requests.keys():
                raise LawBroken(f"law 6: {sorted(waiting)} wait for the order policy, {sorted(self._held)} are held")
            if self._running.keys() != requests.keys() - self._held.keys():
                raise LawBroken(f"law 1: {sorted(self._running)} count as dispatched, of {sorted(requests)}")

    # --- who is where ------------------------------------------------------------------------------------------------

    def hold(self, tracked: TrackedRequest, now: Instant) -> None:
        """Keep a request; one that was dispatched before comes to the front."""
        request = tracked.request
        self._held[request.id] = after(now, seconds(self.rules.timeout_seconds))
        if self._order is None:
            return
        known = self._known.get(request.id)
        if known is None:
            known = self._known[request.id] = QueuedRequest(request)
            self._waiting.append(known)
        else:
            known.num_output_tokens = max(known.num_output_tokens, tracked.num_output_tokens)
            self._running.pop(request.id, None)
            self._waiting.prepend(known)

    def dispatched(self, tracked: TrackedRequest) -> None:
        """A request was sent to an instance, be it from here or at once."""
        if self._held.pop(tracked.request.id, None) is not None and self._order is not None:
            known = self._known[tracked.request.id]
            self._num_dispatched += 1
            known.admitted_seq = self._num_dispatched
            self._leaves(known)
            self._running[known.id] = known

    def ended(self, request: Request, num_output_tokens: int | None) -> None:
        """A request is over; `num_output_tokens` where that is known."""
        is_held = self._held.pop(request.id, None) is not None
        known = self._known.pop(request.id, None)
        if known is None or self._order is None:
            return
        if is_held:
            self._leaves(known)
        else:
            self._stop(known, num_output_tokens)
        if isinstance(self._order, EndObserver):
            tell_end(self._order, request, num_output_tokens)

    def _stop(self, known: QueuedRequest, num_output_tokens: int | None) -> None:
        if num_output_tokens is not None and num_output_tokens > known.num_output_tokens + 1:
            # What reports did not tell; the policy also counts the token that would come next.
            known.num_output_tokens = num_output_tokens - 1
            self._show_running()
        del self._running[known.id]

    def _leaves(self, known: QueuedRequest) -> None:
        if self._leaving is None:
            self._waiting.remove(known)
        else:  # A cursor walks over the queue itself, so they are taken out when it has ended.
            self._leaving.append(known)

    def reported(self, report: InstanceReport) -> None:
        """An instance told of those who run there."""
        for each in report.running if self._order is not None else ():
            known = self._running.get(each.request_id)
            if known is not None and each.num_tokens > known.num_tokens:
                known.num_output_tokens = each.num_tokens - known.num_prompt_tokens

    # --- who is next -------------------------------------------------------------------------------------------------

    def walk(
        self,
        now: Instant,
        requests: dict[RequestId, TrackedRequest],
        limits: InstanceLimits,
        try_one: Callable[[RequestId], "Tried"],
    ) -> None:
        """Try those who are held, one by one, until the order policy wants nobody to overtake."""
        if self._order is None:
            for tracked in sorted((requests[each] for each in self._held), key=attrgetter("hold_order")):
                try_one(tracked.request.id)
            return
        self._now, self._limits = now, limits
        self._show_running()
        self._leaving = []
        try:
            self._walk_ordered(self._order, try_one)
        finally:
            leaving, self._leaving = self._leaving, None
            for known in leaving:
                self._waiting.remove(known)

    def _walk_ordered(self, order: OrderPolicy, try_one: Callable[[RequestId], "Tried"]) -> None:
        asked = Asked(order, "the queue of the router")
        with asked:
            cursor: Cursor = order.open(self._view(), Pool.WAITING)
        while True:
            with asked:
                queued = cursor.next()
            if queued is None:
                return
            if not isinstance(queued, QueuedRequest) or queued.id not in self._held:
                raise asked.broken(f"gave {queued!r}, which does not wait")
            tried = try_one(queued.id)  # What goes wrong in there is not the order's.
            with asked:
                if tried is Tried.WENT:
                    cursor.granted(queued, queued.num_pending_tokens)
                elif tried is Tried.FULL and cursor.refused(queued, Refusal.NO_SLOT) is OnRefusal.STOP:
                    return

    def _show_running(self) -> None:
        assert self._order is not None
        with Asked(self._order, "those who were dispatched"):
            self._order.open(self._view(), Pool.RUNNING)

    def _view(self) -> _AtTheRouter:
        return _AtTheRouter(self._now, self._limits, list(self._running.values()), self._waiting, self._prefix_index)
