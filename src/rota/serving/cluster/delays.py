"""Requests that entered and may not be dispatched before their instant."""

import heapq
from collections.abc import Set

from rota.base.instant import Instant
from rota.serving.model.request import RequestId


class Delays:
    """Who waits for an instant of his own; those of one instant come in the order in which they entered."""

    def __init__(self) -> None:
        self._at: dict[RequestId, Instant] = {}
        self._heap: list[tuple[Instant, int, RequestId]] = []
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._at)

    @property
    def ids(self) -> Set[RequestId]:
        return self._at.keys()

    def add(self, request_id: RequestId, at: Instant) -> None:
        self._num_added += 1
        self._at[request_id] = at
        heapq.heappush(self._heap, (at, self._num_added, request_id))

    def discard(self, request_id: RequestId) -> None:
        """It waits no more. Its place in the heap is given up when it comes to the front, or when most are such."""
        if self._at.pop(request_id, None) is not None and len(self._heap) > 2 * len(self._at) + 16:
            self._heap = [entry for entry in self._heap if entry[2] in self._at]
            heapq.heapify(self._heap)

    def next_at(self) -> Instant | None:
        """When the first of them may go; None if nobody waits."""
        while self._heap and self._heap[0][2] not in self._at:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now: Instant) -> list[RequestId]:
        """Take out those who may go now, the earliest first."""
        going = []
        while (at := self.next_at()) is not None and at <= now:
            request_id = heapq.heappop(self._heap)[2]
            del self._at[request_id]
            going.append(request_id)
        return going
