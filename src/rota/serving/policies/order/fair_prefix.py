"""Tenants share an engine by the tokens it computed for them, and within their shares the longest cached prefix goes
first."""

import heapq
from collections.abc import Hashable, Iterable, Mapping
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
from rota.serving.policies.parameters import above_zero, at_least_one

_NUM_TENANTS_MAX = 4096
"""Accounts that are kept for each class. Beyond it, those of tenants who ask for nothing are forgotten, those who own
or owe least first."""
_NUM_STALE = 64
"""Notes that are out of date and may stand in a heap, beyond as many as those that are not."""


class FairPrefix:
    """Serve next, of the tenants who have credit left, the request with the longest cached prefix; then the first.

    Rule: deficit longest prefix match (DLPM, Cao et al., 2025). A tenant's credit falls by `prompt_weight` for each
    prompt token that is computed, cached ones being free, the moment that a request is admitted, and by `output_weight`
    for each output token, at the beginning of the first step that could compute it; both divided by the tenant's
    weight. Who has none left is passed over. When nobody who waits has any, each of them gets `quantum_tokens`, as
    often as it takes until somebody has. Who leaves the queue keeps what it owns or owes. Classes go first: the lowest
    `priority` number is served first, and a tenant has an account in each.

    Bound, for two tenants of weight 1 who have requests of one class waiting all through an interval: the services they
    get in it differ by at most 2 × (quantum_tokens + prompt_weight × L + output_weight × M), where L is the longest
    prompt and M the tokens that the engine's blocks hold. With weights, services are counted by weight, and L and M are
    divided by the smaller weight of the two. Service is what is charged: what is computed for a tenant, and what a
    preempted request computes once more is not charged again. A quantum beyond all that is ever sent leaves plain
    longest prefix first, which has no bound.

    Good where tenants have prompts with common beginnings: the larger the quantum, the more of the cache is used before
    the turn goes on, and the later others have theirs. Starves no tenant. Within a tenant it starves those whose
    beginnings are not cached, for as long as others of it keep coming whose are. The one chosen ends the walk if it
    does not fit (as published), and a class may starve those below it.

    What is cached is known exactly of whoever is chosen. It is looked up when a request comes, again when blocks that
    it lacks are filled, and once more when it would be chosen, so that a step costs a look at who changed.
    """

    requires: EngineCapabilities = frozenset({Capability.ORDER_WAITING, Capability.PREFIX_CACHE})
    running_order: Literal["admission", "own"] = "admission"
    displacing = False

    def __init__(
        self,
        *,
        quantum_tokens: float = 4096.0,
        prompt_weight: float = 1.0,
        output_weight: float = 1.0,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """`weights` are shares by tenant; one that is not named has 1, and one of 2 gets twice as much."""
        above_zero(
            "fair_prefix", quantum_tokens=quantum_tokens, prompt_weight=prompt_weight, output_weight=output_weight
        )
        above_zero("fair_prefix", **{f"weights.{tenant}": weight for tenant, weight in (weights or {}).items()})
        at_least_one("fair_prefix", quantum_tokens=quantum_tokens)
        self._quantum = quantum_tokens
        self._per_prompt_token = prompt_weight
        self._per_output_token = output_weight
        self._weights = {TenantId(tenant): float(weight) for tenant, weight in (weights or {}).items()}
        self._classes: dict[int, _Class] = {}
        self._view: EngineView | None = None
        self._entries: dict[RequestId, _Entry] = {}
        """Those who wait."""
        self._bills: dict[RequestId, _Bill] = {}
        """Those who were admitted once and have not ended."""
        self._wanted: dict[Hashable, dict[RequestId, _Entry]] = {}
        """Those who wait, by the first of their hashes that is not all cached."""
        self._risen: dict[RequestId, _Entry] = {}
        """Those of whom more may be cached than when last looked."""
        self._filling: dict[RequestId, tuple[SequenceView, int]] = {}
        """Those whose prompts are being computed, and how much of each is known to be cached."""
        self._aside: list[_Entry] = []
        """Those who were given in the last walk."""

    def open(self, view: EngineView, pool: Pool) -> "InOrder | _Waiting":
        if pool is Pool.WAITING:
            self._look(view)
            return _Waiting(self, view)
        # Not as they are granted: a grant may be taken back in the same pass, which hosts tell in different ways.
        cost, bills = self._per_output_token, self._bills
        for sequence in view.running:
            num_outputs = sequence.num_output_tokens
            bill = bills.get(sequence.id)
            if bill is None:  # It began at another engine.
                bill = bills[sequence.id] = _Bill(self._line_of(sequence), num_outputs)
            if num_outputs >= bill.num_outputs:
                bill.line.spent += (num_outputs + 1 - bill.num_outputs) * cost / bill.line.weight
                bill.num_outputs = num_outputs + 1
        return InOrder(view.running)

    def displaces(self, view: EngineView, waiting: SequenceView, running: SequenceView) -> bool:
        return False

    def request_ended(self, request: Request, num_output_tokens: int | None) -> None:
        """It waits no more, and nothing will be charged for it."""
        self._bills.pop(request.id, None)
        self._filling.pop(request.id, None)
        self._drop(request.id)

    def credit(self, priority: int, tenant: TenantId) -> float:
        """What a tenant has left in a class, by its weight: below 0 if it owes."""
        group = self.class_of(priority)
        line = group.lines.get(tenant)
        return 0.0 if line is None else (group.level if line.num_waiting else line.left_at) - line.spent

    def class_of(self, priority: int) -> "_Class":
        found = self._classes.get(priority)
        if found is None:
            found = self._classes[priority] = _Class(self._quantum)
        return found

    def choose(self, group: "_Class", view: EngineView) -> "_Entry | None":
        """The next of a class, which is set aside; None if nobody is left. May raise the level."""
        self._look_at_risen(view)
        while (line := group.first()) is not None or group.refill():
            if line is None:
                continue
            entry = line.heap[0][2]
            num_cached = view.num_cached_tokens(entry.sequence)
            if num_cached == entry.num_cached:
                entry.is_in_line = False
                self._aside.append(entry)
                return entry
            self._rank(entry, num_cached, view)
        return None

    def admitted(self, entry: "_Entry", num_tokens: int, view: EngineView) -> None:
        """Charge the prompt, once, as far as it is computed, and the token that follows all that is known."""
        sequence, num_cached = entry.sequence, entry.num_cached
        self._drop(sequence.id)
        bill = self._bills.get(sequence.id)
        num_outputs = sequence.num_output_tokens
        if bill is None:
            bill = self._bills[sequence.id] = _Bill(entry.line, num_outputs)
            if num_outputs == 0:
                # One that has output tokens already began at another engine, where its prompt was charged.
                num_computed = max(0, sequence.num_prompt_tokens - num_cached)
                entry.line.spent += self._per_prompt_token * num_computed / entry.line.weight
        if num_outputs >= bill.num_outputs:
            entry.line.spent += self._per_output_token * (num_outputs + 1 - bill.num_outputs) / entry.line.weight
            bill.num_outputs = num_outputs + 1
        num_published = num_cached + num_tokens
        self._published(sequence, num_cached, num_published, view)
        if num_published < sequence.num_prompt_tokens:
            self._filling[sequence.id] = (sequence, num_published)

    def came_to_wait(self, sequence: SequenceView) -> TenantId:
        """Take note of one who has come to wait, which the queue asks for once each time."""
        assert self._view is not None
        self._filling.pop(sequence.id, None)
        group, line = self.class_of(sequence.priority), self._line_of(sequence)
        entry = self._entries[sequence.id] = _Entry(sequence, group, line)
        group.joins(line)
        self._rank(entry, self._view.num_cached_tokens(sequence), self._view)
        return sequence.tenant

    def _line_of(self, sequence: SequenceView) -> "_Line":
        return self.class_of(sequence.priority).line_of(sequence.tenant, self._weights.get(sequence.tenant, 1.0))

    def _look(self, view: EngineView) -> None:
        """Take note of who has come, of those whom the last walk gave and nobody admitted, and of blocks filled."""
        for entry in self._aside:
            if self._entries.get(entry.sequence.id) is entry:
                entry.is_in_line = True
                entry.group.put(entry)
        self._aside.clear()
        self._view = view
        view.waiting.groups(0, self.came_to_wait)
        self._view = None
        for request_id, (sequence, num_known) in list(self._filling.items()):
            if sequence.num_computed_tokens >= sequence.num_prompt_tokens:
                num_published = sequence.num_prompt_tokens
                del self._filling[request_id]
            else:
                num_published = view.num_cached_tokens(sequence)
                self._filling[request_id] = (sequence, num_published)
            self._published(sequence, num_known, num_published, view)

    def _published(self, sequence: SequenceView, num_before: int, num_tokens: int, view: EngineView) -> None:
        """These tokens of a prompt are cached now: whoever waits for one of their blocks is looked at again."""
        request = sequence.request
        per_hash = request.hash_block_tokens or view.limits.block_size
        hashes = request.block_hashes
        start, end = num_before // per_hash, min(-(-num_tokens // per_hash), len(hashes))
        if len(self._wanted) < end - start:
            # A hash stands at one place in all prompts that have it, so those wanted are looked for there.
            places = {next(iter(wanting.values())).wants_at for wanting in self._wanted.values()}
            blocks = [hashes[place] for place in sorted(places) if start <= place < end]
        else:
            blocks = list(hashes[start:end])
        for block_hash in blocks:
            wanting = self._wanted.get(block_hash)
            if wanting:
                self._risen.update(wanting)

    def _look_at_risen(self, view: EngineView) -> None:
        if self._risen:
            for entry in self._risen.values():
                num_cached = view.num_cached_tokens(entry.sequence)
                if num_cached != entry.num_cached:
                    self._rank(entry, num_cached, view)
            self._risen.clear()

    def _rank(self, entry: "_Entry", num_cached: int, view: EngineView) -> None:
        """So much is cached of one who waits: its place in its tenant's line, and the block that it waits for."""
        request = entry.sequence.request
        self._want_no_more(entry)
        place = num_cached // (request.hash_block_tokens or view.limits.block_size)
        if place < len(request.block_hashes):
            entry.wants, entry.wants_at = request.block_hashes[place], place
            self._wanted.setdefault(entry.wants, {})[request.id] = entry
        entry.num_cached = num_cached
        if entry.is_in_line:
            entry.group.put(entry)

    def _want_no_more(self, entry: "_Entry") -> None:
        if entry.wants is not None:
            wanting = self._wanted[entry.wants]
            del wanting[entry.sequence.id]
            if not wanting:
                del self._wanted[entry.wants]
            entry.wants = None

    def _drop(self, request_id: RequestId) -> None:
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            self._want_no_more(entry)
            self._risen.pop(request_id, None)
            entry.is_in_line = False
            entry.group.leaves(entry.line)


class _Bill:
    """What was charged of one who was admitted: to whom, and for how many output tokens."""

    __slots__ = ("line", "num_outputs")

    def __init__(self, line: "_Line", num_outputs: int) -> None:
        self.line = line
        self.num_outputs = num_outputs


class _Entry:
    """One who waits."""

    __slots__ = ("group", "is_in_line", "line", "num_cached", "sequence", "wants", "wants_at")

    def __init__(self, sequence: SequenceView, group: "_Class", line: "_Line") -> None:
        self.sequence = sequence
        self.group = group
        self.line = line
        self.num_cached = 0
        """Tokens that were cached when last looked."""
        self.wants: Hashable = None
        self.wants_at = 0
        self.is_in_line = True
        """Whether it can be chosen: not if it was given in this walk, or is gone."""


_Key = tuple[int, int, _Entry]


class _Line:
    """A tenant's account in one class, and those of it who wait, the longest cached prefix first."""

    __slots__ = ("heap", "is_parked", "left_at", "num_waiting", "spent", "tenant", "weight")

    def __init__(self, tenant: TenantId, weight: float, level: float) -> None:
        self.tenant = tenant
        self.weight = weight
        self.spent = self.left_at = level
        """Credit is the level of the class less what was spent; `left_at` is the level that counts while it is away."""
        self.num_waiting = 0
        self.is_parked = False
        self.heap: list[_Key] = []
        """By cached tokens, then by place in the queue. An entry that was moved or has gone is dropped when it comes
        up."""

    def top(self) -> _Key | None:
        heap = self.heap
        while heap:
            key = heap[0]
            if _is_true(key):
                return key
            heapq.heappop(heap)
        return None


class _Class:
    """The accounts of one class."""

    __slots__ = ("heads", "level", "lines", "parked", "quantum")

    def __init__(self, quantum: float) -> None:
        self.quantum = quantum
        self.level = 0.0
        """What everybody was given since the beginning, by weight."""
        self.lines: dict[TenantId, _Line] = {}
        self.heads: list[tuple[int, int, _Line]] = []
        """The first of each line that is thought to have credit, as good as it was or better."""
        self.parked: list[tuple[float, TenantId, _Line]] = []
        """Lines without credit, by what they had spent or less."""

    def line_of(self, tenant: TenantId, weight: float) -> _Line:
        line = self.lines.get(tenant)
        if line is None:
            if len(self.lines) >= _NUM_TENANTS_MAX:
                self._forget()
            line = self.lines[tenant] = _Line(tenant, weight, self.level)
        return line

    def joins(self, line: _Line) -> None:
        if not line.num_waiting:
            line.spent += self.level - line.left_at
        line.num_waiting += 1

    def leaves(self, line: _Line) -> None:
        line.num_waiting -= 1
        if not line.num_waiting:
            line.left_at = self.level
            line.heap.clear()

    def put(self, entry: _Entry) -> None:
        """Put one into its line, where it stands by what is cached of it."""
        line = entry.line
        key = (-entry.num_cached, entry.sequence.queue_position, entry)
        heapq.heappush(line.heap, key)
        if len(line.heap) > 2 * line.num_waiting + _NUM_STALE:
            line.heap = list({each[1]: each for each in line.heap if _is_true(each)}.values())
            heapq.heapify(line.heap)
        if line.heap[0][:2] == key[:2]:
            self._announce(line, key)

    def first(self) -> _Line | None:
        """The line with credit whose first has the most cached; it is at the top of its heap."""
        heads = self.heads
        while heads:
            num_cached, position, line = heads[0]
            top = line.top()
            if top is None or line.spent >= self.level:
                heapq.heappop(heads)
                if top is not None:
                    self._announce(line, top)
            elif top[:2] != (num_cached, position):
                heapq.heapreplace(heads, (top[0], top[1], line))
            else:
                return line
        return None

    def refill(self) -> bool:
        """Give everybody so many quanta that somebody who waits has credit; False if nobody waits."""
        parked = self.parked
        while parked:
            spent, _, line = parked[0]
            if line.top() is None:
                heapq.heappop(parked)
                line.is_parked = False
            elif spent < self.level:
                heapq.heappop(parked)
                line.is_parked = False
                self._announce(line, line.heap[0])  # Who has spent more since is parked again.
            elif self.heads:
                return True
            else:
                self.level += self.quantum * ((spent - self.level) // self.quantum + 1)
        return bool(self.heads)

    def _announce(self, line: _Line, top: _Key) -> None:
        if line.spent < self.level:
            heapq.heappush(self.heads, (top[0], top[1], line))
            if len(self.heads) > 2 * len(self.lines) + _NUM_STALE:
                self.heads = [(key[0], key[1], each) for each, key in self._tops() if not each.is_parked]
                heapq.heapify(self.heads)
        elif not line.is_parked:
            line.is_parked = True
            heapq.heappush(self.parked, (line.spent, line.tenant, line))

    def _tops(self) -> Iterable[tuple[_Line, _Key]]:
        for line in self.lines.values():
            top = line.top()
            if top is not None:
                yield line, top

    def _forget(self) -> None:
        away = [line for line in self.lines.values() if not line.num_waiting]
        away.sort(key=lambda line: (abs(line.left_at - line.spent), line.tenant))
        for line in away[: len(self.lines) - _NUM_TENANTS_MAX // 2]:
            del self.lines[line.tenant]


def _is_true(key: _Key) -> bool:
    return key[2].is_in_line and key[2].num_cached == -key[0]


class _Waiting:
    """The waiting sequences, class by class."""

    __slots__ = ("_class", "_given", "_level_before", "_policy", "_priorities", "_view")

    def __init__(self, policy: FairPrefix, view: EngineView) -> None:
        self._policy = policy
        self._view = view
        self._priorities = iter(view.waiting.priorities())
        self._class: _Class | None = None
        self._given: _Entry | None = None
        self._level_before = 0.0

    def next(self) -> SequenceView | None:
        self._take_back()
        while True:
            if self._class is not None:
                self._level_before = self._class.level
                self._given = self._policy.choose(self._class, self._view)
                if self._given is not None:
                    return self._given.sequence
                self._class.level = self._level_before
            priority = next(self._priorities, None)
            if priority is None:
                self._class = None
                return None
            self._class = self._policy.class_of(priority)

    def granted(self, sequence: SequenceView, num_tokens: int) -> None:
        entry, self._given = self._given, None
        assert entry is not None
        self._policy.admitted(entry, num_tokens, self._view)

    def refused(self, sequence: SequenceView, why: Refusal) -> OnRefusal:
        if why is Refusal.NO_BUDGET:
            self._take_back()
        self._given = None
        return OnRefusal.STOP

    def _take_back(self) -> None:
        """Quanta that were given out for the sake of one who was not tried were not: hosts may ask for one too many."""
        if self._given is not None and self._class is not None:
            self._class.level = self._level_before
            self._given = None
