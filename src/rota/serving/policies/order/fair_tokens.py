"""Tenants share an engine by the tokens they were served."""

import heapq
from collections.abc import Iterator, Mapping
from typing import Literal

from rota.base.errors import ConfigError
from rota.serving.api import (
    Capability,
    EngineCapabilities,
    EngineView,
    InOrder,
    OnRefusal,
    Pool,
    Refusal,
    RequestId,
    SequenceView,
    TenantId,
)

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
    request of another tenant would fit (as published). Costs a look at every tenant that waits in each step that has
    room, and a note for each running request. Where steps overlap (asynchronous scheduling) the count runs a token
    behind.
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
        costs = {"prompt_weight": prompt_weight, "output_weight": output_weight}
        for name, number in {
            **costs,
            **{f"weights.{tenant}": each for tenant, each in (weights or {}).items()},
        }.items():
            if not 0 < number < float("inf"):
                raise ConfigError(f"fair_tokens: {name} must be above 0, not {number}")
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

    __slots__ = ("counters", "left_last", "queued")

    def __init__(self) -> None:
        self.counters: dict[TenantId, float] = {}
        self.queued: set[TenantId] = set()
        """Who had requests waiting when last looked."""
        self.left_last: TenantId | None = None

    def look(self, waiting: list[TenantId]) -> None:
        """Take note of who waits now, and lift those who come back."""
        counters = self.counters
        now = set(waiting)
        gone = self.queued - now
        if gone:
            self.left_last = max(gone, key=lambda tenant: (counters[tenant], tenant))
        stayed = [counters[tenant] for tenant in waiting if tenant in self.queued]
        floor = min(stayed) if stayed else counters.get(self.left_last, 0.0) if self.left_last is not None else 0.0
        for tenant in waiting:
            if tenant not in self.queued:
                counters[tenant] = max(counters.get(tenant, 0.0), floor)
        self.queued = now
        if len(counters) > _NUM_TENANTS_MAX:
            self._forget()

    def leaves(self, tenant: TenantId) -> None:
        """The last of a tenant's waiting requests was admitted."""
        self.queued.discard(tenant)
        self.left_last = tenant

    def _forget(self) -> None:
        """Whoever comes back is lifted at least to the lowest of those who wait, so the lowest are missed least."""
        idle = sorted((counter, tenant) for tenant, counter in self.counters.items() if tenant not in self.queued)
        for _, tenant in idle[: len(self.counters) - _NUM_TENANTS_MAX // 2]:
            if tenant != self.left_last:
                del self.counters[tenant]


class _Waiting:
    """The waiting sequences: class by class, and in each the tenant next that has the lowest counter by then."""

    __slots__ = ("_class", "_heap", "_policy", "_priorities", "_view", "_walks")

    def __init__(self, policy: FairTokens, view: EngineView) -> None:
        self._policy = policy
        self._view = view
        self._priorities = iter(view.waiting.priorities())
        self._class: _Class | None = None
        self._heap: list[tuple[float, TenantId]] = []
        self._walks: dict[TenantId, Iterator[SequenceView]] = {}

    def next(self) -> SequenceView | None:
        while self._heap or self._next_class():
            _, tenant = self._heap[0]
            sequence = next(self._walks[tenant], None)
            if sequence is not None:
                return sequence
            heapq.heappop(self._heap)
            assert self._class is not None
            self._class.leaves(tenant)
        return None

    def granted(self, sequence: SequenceView, num_tokens: int) -> None:
        self._policy.admitted(sequence)
        assert self._class is not None
        heapq.heapreplace(self._heap, (self._class.counters[sequence.tenant], sequence.tenant))

    def refused(self, sequence: SequenceView, why: Refusal) -> OnRefusal:
        return OnRefusal.STOP

    def _next_class(self) -> bool:
        priority = next(self._priorities, None)
        if priority is None:
            return False
        waiting = self._view.waiting
        tenants = list(waiting.tenants(priority))
        self._class = self._policy.class_of(priority)
        self._class.look(tenants)
        self._walks = {tenant: waiting.of_tenant(priority, tenant) for tenant in tenants}
        self._heap = [(self._class.counters[tenant], tenant) for tenant in tenants]
        heapq.heapify(self._heap)
        return True
