"""The waiting queue of an instance or of the router: as a whole, by class, in ranks, and by group within a class."""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from rota.serving.model.request import RequestId, TenantId


class Queued(Protocol):
    """Who can wait."""

    queue_position: int
    """Set by the queue: lower stands nearer the front."""

    @property
    def id(self) -> RequestId: ...
    @property
    def priority(self) -> int: ...
    @property
    def tenant(self) -> TenantId: ...


Q = TypeVar("Q", bound=Queued)
_Queue: TypeAlias = OrderedDict[RequestId, Q]


class WaitingQueue(Generic[Q]):
    """Sequences in queue order: new ones at the end, preempted ones at the front. All operations are O(1) but walks,
    and but those on ranks once somebody has asked for them: a binary search, and memory moved."""

    def __init__(self) -> None:
        self._all: _Queue[Q] = OrderedDict()
        self._by_priority: dict[int, _Queue[Q]] = {}
        self._grouping: _Grouping[Q] | None = None
        """Kept from the moment at which somebody asks for groups, as the ranking is: most policies never do."""
        self._ranking: _Ranking[Q] | None = None
        self._front = 0
        self._back = 0

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Q]:
        return iter(self._all.values())

    def priorities(self) -> list[int]:
        return sorted(self._by_priority)

    def of_priority(self, priority: int) -> Iterator[Q]:
        return iter(self._by_priority[priority].values())

    def tenants(self, priority: int) -> Iterator[TenantId]:
        return iter(self._grouped(_tenant_of).groups.get(priority, ()))  # type: ignore[arg-type]

    def of_tenant(self, priority: int, tenant: TenantId) -> Iterator[Q]:
        return iter(self._grouped(_tenant_of).groups[priority][tenant].values())

    def groups(self, priority: int, key: Callable[[Q], Hashable]) -> Iterator[Hashable]:
        return iter(self._grouped(key).groups.get(priority, ()))

    def of_group(self, priority: int, key: Callable[[Q], Hashable], group: Hashable) -> Iterator[Q]:
        queue = self._grouped(key).groups.get(priority, {}).get(group)
        return iter(queue.values()) if queue is not None else iter(())

    def ranked(self, key: Callable[[Q], Any], changed: Iterable[RequestId] = ()) -> Iterator[Q]:
        ranking = self._ranking
        if ranking is None or ranking.key != key:
            ranking = self._ranking = _Ranking(key, self._all)
        for request_id in changed:
            sequence = self._all.get(request_id)
            if sequence is not None:
                ranking.remove(sequence)
                ranking.unsettled[request_id] = sequence
        ranking.settle()
        return ranking.walk()

    def append(self, sequence: Q) -> None:
        """Put a new sequence at the end."""
        self._back += 1
        sequence.queue_position = self._back
        self._all[sequence.id] = sequence
        self._by_priority.setdefault(sequence.priority, OrderedDict())[sequence.id] = sequence
        self._note(sequence, at_front=False)

    def prepend(self, sequence: Q) -> None:
        """Put a preempted sequence at the front."""
        self._front -= 1
        sequence.queue_position = self._front
        self._all[sequence.id] = sequence
        self._all.move_to_end(sequence.id, last=False)
        queue = self._by_priority.setdefault(sequence.priority, OrderedDict())
        queue[sequence.id] = sequence
        queue.move_to_end(sequence.id, last=False)
        self._note(sequence, at_front=True)

    def remove(self, sequence: Q) -> None:
        """Take a sequence out, wherever it stands."""
        del self._all[sequence.id]
        queue = self._by_priority[sequence.priority]
        del queue[sequence.id]
        if not queue:
            del self._by_priority[sequence.priority]
        if self._grouping is not None:
            self._grouping.remove(sequence)
        if self._ranking is not None:
            self._ranking.remove(sequence)

    def _note(self, sequence: Q, *, at_front: bool) -> None:
        if self._grouping is not None:
            self._grouping.unsettled[sequence.id] = (sequence, at_front)
        if self._ranking is not None:
            self._ranking.unsettled[sequence.id] = sequence

    def _grouped(self, key: Callable[[Q], Hashable]) -> "_Grouping[Q]":
        grouping = self._grouping
        if grouping is None or grouping.key != key:
            grouping = self._grouping = _Grouping(key, self._all)
        grouping.settle()
        return grouping


class _Grouping(Generic[Q]):
    """The queue of each group within each class. Who has come since somebody asked is sorted in when asked again, so
    that a policy's key is called in its own time and not on arrival."""

    def __init__(self, key: Callable[[Q], Hashable], sequences: _Queue[Q]) -> None:
        self.key = key
        self.groups: dict[int, dict[Hashable, _Queue[Q]]] = {}
        self.unsettled: dict[RequestId, tuple[Q, bool]] = {each.id: (each, False) for each in sequences.values()}
        self._group_of: dict[RequestId, Hashable] = {}

    def settle(self) -> None:
        if not self.unsettled:
            return
        for sequence, at_front in self.unsettled.values():
            group = self._group_of[sequence.id] = self.key(sequence)
            queue = self.groups.setdefault(sequence.priority, {}).setdefault(group, OrderedDict())
            queue[sequence.id] = sequence
            if at_front:
                queue.move_to_end(sequence.id, last=False)
        self.unsettled.clear()

    def remove(self, sequence: Q) -> None:
        if self.unsettled.pop(sequence.id, None) is not None:
            return
        group = self._group_of.pop(sequence.id)
        groups = self.groups[sequence.priority]
        queue = groups[group]
        del queue[sequence.id]
        if not queue:
            del groups[group]
        if not groups:
            del self.groups[sequence.priority]


class _Ranking(Generic[Q]):
    """The sequences by class, then by a policy's key, then by place in the queue: sorted once, and kept so."""

    def __init__(self, key: Callable[[Q], Any], sequences: _Queue[Q]) -> None:
        self.key = key
        self.unsettled: dict[RequestId, Q] = dict(sequences)
        self._entries: list[tuple[int, Any, int, Q]] = []
        self._entry_of: dict[RequestId, tuple[int, Any, int, Q]] = {}

    def settle(self) -> None:
        if not self.unsettled:
            return
        for sequence in self.unsettled.values():
            entry = (sequence.priority, self.key(sequence), sequence.queue_position, sequence)
            self._entry_of[sequence.id] = entry
            insort(self._entries, entry)
        self.unsettled.clear()

    def walk(self) -> Iterator[Q]:
        for entry in self._entries:
            yield entry[3]

    def remove(self, sequence: Q) -> None:
        if self.unsettled.pop(sequence.id, None) is not None:
            return
        # No two sequences stand at the same place of the queue, so a comparison ends ahead of the sequence itself.
        del self._entries[bisect_left(self._entries, self._entry_of.pop(sequence.id))]


def _tenant_of(sequence: Queued) -> TenantId:
    return sequence.tenant
