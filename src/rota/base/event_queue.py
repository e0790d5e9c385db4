"""What happens next: a queue of future items that never goes back in time.

Order is by `(at, rank, order of pushing)`. With a shuffle stream, items that tie on `(at, rank)` come out in a random
order instead: whatever then changes had leaned on an order that the real world does not keep.
"""

from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

from rota.base.errors import LawBroken
from rota.base.instant import Instant
from rota.base.random_streams import Stream

Item = TypeVar("Item")

_MIN_DEAD_TO_COMPACT = 64


class EventQueue(Generic[Item]):
    """A heap of items by instant, then rank (lower first), then order of pushing. `push` and `pop` are O(log n)."""

    __slots__ = ("_heap", "_items", "_now", "_num_pushed", "_shuffle")

    def __init__(self, start: Instant = Instant(0), shuffle: Stream | None = None) -> None:
        self._heap: list[tuple[int, int, int]] = []
        # Items lie beside the heap, by sequence number: cancelling is then one deletion, and items are never compared.
        self._items: dict[int, Item] = {}
        self._now: int = start
        self._num_pushed = 0
        self._shuffle = shuffle

    def __len__(self) -> int:
        return len(self._items)

    def push(self, at: Instant, item: Item, rank: int = 0) -> int:
        """Add an item; the handle that comes back is for `cancel`. Raises `LawBroken` if `at` has passed."""
        if at < self._now:
            raise LawBroken(f"an item was scheduled at {at}, {self._now - at} ns before the present {self._now}")
        handle = self._num_pushed
        self._num_pushed = handle + 1
        if self._shuffle is not None:
            handle += self._shuffle.integers(0, 1 << 30) << 64
        self._items[handle] = item
        heappush(self._heap, (at, rank, handle))
        return handle

    def cancel(self, handle: int) -> Item | None:
        """Take an item back and return it; None if it came out already or was cancelled before."""
        item = self._items.pop(handle, None)
        if len(self._heap) > 2 * len(self._items) + _MIN_DEAD_TO_COMPACT:
            self._heap = [key for key in self._heap if key[2] in self._items]
            heapify(self._heap)
        return item

    def pop(self) -> tuple[Instant, Item]:
        """Take the next item out, with its instant, which becomes the present. Raises `IndexError` when empty."""
        heap, items = self._heap, self._items
        while True:
            at, _, handle = heappop(heap)
            if handle in items:
                self._now = at
                return Instant(at), items.pop(handle)

    def peek_time(self) -> Instant | None:
        """The instant of the next item, or None when empty."""
        heap, items = self._heap, self._items
        while heap:
            at, _, handle = heap[0]
            if handle in items:
                return Instant(at)
            heappop(heap)
        return None
