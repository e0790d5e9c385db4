"""The waiting queue, as a whole and by class."""

from collections import OrderedDict
from collections.abc import Iterator

from rota.serving.instance.sequence import Sequence
from rota.serving.model.request import RequestId


class WaitingQueue:
    """Sequences in queue order: new ones at the end, preempted ones at the front. All operations are O(1) but walks."""

    def __init__(self) -> None:
        self._all: OrderedDict[RequestId, Sequence] = OrderedDict()
        self._by_priority: dict[int, OrderedDict[RequestId, Sequence]] = {}
        self._front = 0
        self._back = 0

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._all.values())

    def priorities(self) -> list[int]:
        return sorted(self._by_priority)

    def of_priority(self, priority: int) -> Iterator[Sequence]:
        return iter(self._by_priority[priority].values())

    def append(self, sequence: Sequence) -> None:
        """Put a new sequence at the end."""
        self._back += 1
        sequence.queue_position = self._back
        self._all[sequence.id] = sequence
        self._by_priority.setdefault(sequence.priority, OrderedDict())[sequence.id] = sequence

    def prepend(self, sequence: Sequence) -> None:
        """Put a preempted sequence at the front."""
        self._front -= 1
        sequence.queue_position = self._front
        self._all[sequence.id] = sequence
        self._all.move_to_end(sequence.id, last=False)
        queue = self._by_priority.setdefault(sequence.priority, OrderedDict())
        queue[sequence.id] = sequence
        queue.move_to_end(sequence.id, last=False)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands."""
        del self._all[sequence.id]
        queue = self._by_priority[sequence.priority]
        del queue[sequence.id]
        if not queue:
            del self._by_priority[sequence.priority]
