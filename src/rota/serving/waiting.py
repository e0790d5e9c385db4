"""The waiting queue of an instance or of the router: as a whole, by class, and by tenant within a class."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, Protocol, TypeAlias, TypeVar

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
    """Sequences in queue order: new ones at the end, preempted ones at the front. All operations are O(1) but walks."""

    def __init__(self) -> None:
        self._all: _Queue[Q] = OrderedDict()
        self._by_priority: dict[int, _Queue[Q]] = {}
        self._by_tenant: dict[int, dict[TenantId, _Queue[Q]]] | None = None
        """Kept from the moment at which somebody asks for tenants: most policies never do."""
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
        return iter(self._tenants().get(priority, ()))

    def of_tenant(self, priority: int, tenant: TenantId) -> Iterator[Q]:
        return iter(self._tenants()[priority][tenant].values())

    def append(self, sequence: Q) -> None:
        """Put a new sequence at the end."""
        self._back += 1
        sequence.queue_position = self._back
        self._all[sequence.id] = sequence
        self._by_priority.setdefault(sequence.priority, OrderedDict())[sequence.id] = sequence
        if self._by_tenant is not None:
            self._queue_of(self._by_tenant, sequence)[sequence.id] = sequence

    def prepend(self, sequence: Q) -> None:
        """Put a preempted sequence at the front."""
        self._front -= 1
        sequence.queue_position = self._front
        self._all[sequence.id] = sequence
        self._all.move_to_end(sequence.id, last=False)
        queue = self._by_priority.setdefault(sequence.priority, OrderedDict())
        queue[sequence.id] = sequence
        queue.move_to_end(sequence.id, last=False)
        if self._by_tenant is not None:
            queue = self._queue_of(self._by_tenant, sequence)
            queue[sequence.id] = sequence
            queue.move_to_end(sequence.id, last=False)

    def remove(self, sequence: Q) -> None:
        """Take a sequence out, wherever it stands."""
        del self._all[sequence.id]
        queue = self._by_priority[sequence.priority]
        del queue[sequence.id]
        if not queue:
            del self._by_priority[sequence.priority]
        if self._by_tenant is not None:
            tenants = self._by_tenant[sequence.priority]
            queue = tenants[sequence.tenant]
            del queue[sequence.id]
            if not queue:
                del tenants[sequence.tenant]
            if not tenants:
                del self._by_tenant[sequence.priority]

    def _tenants(self) -> dict[int, dict[TenantId, _Queue[Q]]]:
        if self._by_tenant is None:
            self._by_tenant = {}
            for sequence in self._all.values():
                self._queue_of(self._by_tenant, sequence)[sequence.id] = sequence
        return self._by_tenant

    @staticmethod
    def _queue_of(tenants: dict[int, dict[TenantId, _Queue[Q]]], sequence: Q) -> _Queue[Q]:
        return tenants.setdefault(sequence.priority, {}).setdefault(sequence.tenant, OrderedDict())
