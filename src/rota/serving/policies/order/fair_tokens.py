"""Tenants share an engine by the tokens they were served."""

import heapq
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from rota.serving.api import (
    Capability,
    EngineCapabilities,
    EngineView,
    InOrder,
    OnRefusal,
    Pool,
    Refusal,
    Request,
    RequestId,
    SequenceView,
    TenantId,
)
from rota.serving.policies.parameters import above_zero

_NUM_TENANTS_MAX = 4096
"""Counters that are kept for each class. Beyond it, those of tenants who ask for nothing are forgotten, lowest
first."""


class FairTokens:
    """Serve next the tenant that has been served the fewest tokens by its weight; first come, first served within it.

    Rule: virtual token counters (VTC, Sheng et al., OSDI 2024). A tenant's counter rises by `prompt_weight` for each
    prompt token and `output_weight` for each output token, divided by the tenant's weight: for the prompt and the first
    token the moment that a request is admitted, so that the next choice of the same pass knows; for every further token
    at the beginning of the first step that could compute it. A tenant that comes back to an empty queue is lifted to
    the lowest counter of those who wait, or, if nobody waits, to that of the tenant that left the queue last, so that
    nobody saves up service by being away. Constants: 1 and 2, as published. Classes go first: the lowest `priority`
    number is served first, and tenants are equals within a class, where each has a counter of its own.

    Bound, for two tenants of weight 1 who have requests of one class waiting all through an interval: the services they
    get in it differ by at most 2 × max(prompt_weight × L + output_weight, output_weight × M), where L is the longest
    prompt and M the tokens that the engine's blocks hold (`check_fair_service` measures it). It counts tokens served to
    a client: what a preempted request computes once more is not charged again.

    Good where tenants send what they like: a heavy one delays itself. Starves no tenant; within a tenant it is first
    come, first served, and a class may starve those below it. The one that waits first ends the walk, though a smaller
    request of another tenant would fit (as published). Costs a look at the tenants who came or left in each step
    that has room, and a note for each running request. Where steps overlap (asynchronous scheduling) the count runs a
    token behind.
    """

    requires: EngineCapabilities = frozenset({Capability.ORDER_WAITING})
    running_order: Literal["admission", "own"] = "admission"
    displacing = False

    def __init__(
        self,
        *,
        prompt_weight: float = 1.0,
        output_weight: float = 2.0,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """`weights` are shares by tenant; one that is not named has 1, and one of 2 gets twice as much."""
        above_zero("fair_tokens", prompt_weight=prompt_weight, output_weight=output_weight)
        above_zero("fair_tokens", **{f"weights.{tenant}": weight for tenant, weight in (weights or {}).items()})
        self._per_prompt_token = prompt_weight
        self._per_output_token = output_weight
        self._weights = {TenantId(tenant): float(weight) for tenant, weight in (weights or {}).items()}
        self._classes: dict[int, _Class] = {}
        self._num_charged: dict[RequestId, int] = {}
        """Output tokens charged for each request that was admitted and, as far as is known, has not ended."""

    def open(self, view: EngineView, pool: Pool) -> "InOrder | _Waiting":
        if pool is Pool.WAITING:
            return _Waiting(self, view)
        self._forget_the_ended(view)
        # Not as they are granted: a grant may be taken back in the same pass, which hosts tell in different ways.
        for sequence in view.running:
            self.computes(sequence)
        return InOrder(view.running)

    def request_ended(self, request: Request, num_output_tokens: int | None) -> None:
        """Its tenant may have nobody waiting any more."""
        self.class_of(request.priority).unsure.add(request.tenant)

    def came_to_wait(self, sequence: SequenceView) -> TenantId:
        """The group of a sequence in the queue, which asks once each time that one has come to wait."""
        self.class_of(sequence.priority).unsure.add(sequence.tenant)
        return sequence.tenant

    def displaces(self, view: EngineView, waiting: SequenceView, running: SequenceView) -> bool:
        return False

    def class_of(self, priority: int) -> "_Class":
        found = self._classes.get(priority)
        if found is None:
            found = self._classes[priority] = _Class()
        return found

    def admitted(self, sequence: SequenceView) -> None:
        """Charge the prompt, once, and the token that follows all that is known of the sequence."""
        if sequence.id not in self._num_charged and sequence.num_output_tokens == 0:
            # One that has output tokens already began at another engine, where its prompt was charged.
            self._charge(sequence, self._per_prompt_token * sequence.num_prompt_tokens)
        self.computes(sequence)

    def computes(self, sequence: SequenceView) -> None:
        """Charge the token that comes next, unless it was charged before."""
        num_before = sequence.num_output_tokens
        num_charged = self._num_charged.get(sequence.id, num_before)
        if num_before >= num_charged:
            self._num_charged[sequence.id] = num_before + 1
            self._charge(sequence, self._per_output_token * (num_before + 1 - num_charged))

    def _charge(self, sequence: SequenceView, cost: float) -> None:
        counters = self.class_of(sequence.priority).counters
        tenant = sequence.tenant
        counters[tenant] = counters.get(tenant, 0.0) + cost / self._weights.get(tenant, 1.0)

    def _forget_the_ended(self, view: EngineView) -> None:
        if len(self._num_charged) > 2 * (len(view.running) + len(view.waiting)) + 64:
            here = {sequence.id for sequence in (*view.running, *view.waiting)}
            self._num_charged = {each: count for each, count in self._num_charged.items() if each in here}


class _Class:
    """The counters of one class."""

    __slots__ = ("counters", "heap", "left_last", "queued", "unsure")

    def __init__(self) -> None:
        self.counters: dict[TenantId, float] = {}
        self.queued: set[TenantId] = set()
        """Who had requests waiting when last looked."""
        self.heap: list[tuple[float, TenantId]] = []
        """Those of `queued` by counter. Counters never fall, so that an entry is at most too low, which is put right
        when it comes up; entries of those who left are dropped then."""
        self.unsure: set[TenantId] = set()
        """Who may have come or left since."""
        self.left_last: TenantId | None = None

    def look(self, is_waiting: Callable[[TenantId], bool]) -> None:
        """Take note of who waits now, and lift those who come back."""
        counters = self.counters
        came, gone = [], []
        for tenant in self.unsure:
            if tenant in self.queued:
                if not is_waiting(tenant):
                    gone.append(tenant)
            elif is_waiting(tenant):
                came.append(tenant)
        self.unsure.clear()
        if gone:
            self.queued.difference_update(gone)
            self.left_last = max(gone, key=lambda tenant: (counters[tenant], tenant))
        if came:
            first = self.first()
            floor = 0.0 if self.left_last is None else counters.get(self.left_last, 0.0)
            if first is not None:
                floor = counters[first]
            for tenant in came:
                counter = counters[tenant] = max(counters.get(tenant, 0.0), floor)
                heapq.heappush(self.heap, (counter, tenant))
            self.queued.update(came)
        if len(self.heap) > 2 * len(self.queued) + 64:
            self.heap = [(counters[tenant], tenant) for tenant in self.queued]
            heapq.heapify(self.heap)
        if len(counters) > _NUM_TENANTS_MAX:
            self._forget()

    def first(self) -> TenantId | None:
        """The tenant with the lowest counter of those who wait."""
        heap, counters = self.heap, self.counters
        while heap:
            counter, tenant = heap[0]
            if tenant not in self.queued:
                heapq.heappop(heap)
            elif counters[tenant] > counter:
                heapq.heapreplace(heap, (counters[tenant], tenant))
            else:
                return tenant
        return None

    def leaves(self, tenant: TenantId) -> None:
        """The last of a tenant's waiting requests was admitted, or passed over."""
        self.queued.discard(tenant)
        self.unsure.add(tenant)
        self.left_last = tenant

    def _forget(self) -> None:
        """Whoever comes back is lifted at least to the lowest of those who wait, so the lowest are missed least."""
        idle = sorted((counter, tenant) for tenant, counter in self.counters.items() if tenant not in self.queued)
        for _, tenant in idle[: len(self.counters) - _NUM_TENANTS_MAX // 2]:
            if tenant != self.left_last:
                del self.counters[tenant]


class _Waiting:
    """The waiting sequences: class by class, and in each the tenant next that has the lowest counter by then."""

    __slots__ = ("_class", "_policy", "_priorities", "_priority", "_view", "_walks")

    def __init__(self, policy: FairTokens, view: EngineView) -> None:
        self._policy = policy
        self._view = view
        self._priorities = iter(view.waiting.priorities())
        self._priority = 0
        self._class: _Class | None = None
        self._walks: dict[TenantId, Iterator[SequenceView]] = {}

    def next(self) -> SequenceView | None:
        while True:
            tenant = None if self._class is None else self._class.first()
            if tenant is None:
                if not self._next_class():
                    return None
                continue
            walk = self._walks.get(tenant)
            if walk is None:
                walk = self._walks[tenant] = self._of_tenant(tenant)
            sequence = next(walk, None)
            if sequence is not None:
                return sequence
            assert self._class is not None
            self._class.leaves(tenant)

    def granted(self, sequence: SequenceView, num_tokens: int) -> None:
        self._policy.admitted(sequence)
        assert self._class is not None
        self._class.unsure.add(sequence.tenant)

    def refused(self, sequence: SequenceView, why: Refusal) -> OnRefusal:
        return OnRefusal.STOP

    def _of_tenant(self, tenant: TenantId) -> Iterator[SequenceView]:
        return self._view.waiting.of_group(self._priority, self._policy.came_to_wait, tenant)

    def _next_class(self) -> bool:
        priority = next(self._priorities, None)
        if priority is None:
            return False
        self._priority = priority
        self._walks = {}
        self._view.waiting.groups(priority, self._policy.came_to_wait)
        self._class = self._policy.class_of(priority)
        self._class.look(lambda tenant: next(self._of_tenant(tenant), None) is not None)
        return True
