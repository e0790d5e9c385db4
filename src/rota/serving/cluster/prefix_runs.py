"""One instance's blocks in order of last use, as slices of the prompts that used them last."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator

from rota.serving.model.instance import InstanceId

RunsByFirst = dict[Hashable, "list[_Run]"]
"""The slices of all instances by their first hash."""


def leading(by_first: RunsByFirst, hashes: tuple[Hashable, ...]) -> "dict[PrefixRuns, int]":
    """How many of a prompt's hashes, from the first on, each instance holds that holds any.

    O(slices along the prompt at any instance), times log blocks where instances do not part from it at the same place.
    """
    found: dict[PrefixRuns, int] = {}
    num_hashes, start, guess = len(hashes), 0, 0
    ends: set[int] = set()
    while start < num_hashes:
        for run in by_first.get(hashes[start], ()):
            if run.start != start or found.get(run.owner, 0) != start:
                continue
            # Prompts often part at one place, where what they share ends: what held for the last is tried first.
            own, place = run.hashes, guess - run.offset
            if start < guess < run.end and own[place] != hashes[guess] and own[place - 1] == hashes[guess - 1]:
                end = guess
            else:
                end = run.agrees_until(hashes, num_hashes)
                guess = end if end < num_hashes else 0
                ends.add(end)
            found[run.owner] = end
        if not ends:
            break
        start = min(ends)
        ends.remove(start)
    return found


class PrefixRuns:
    """The blocks of a prefix cache that evicts whoever was not used for longest, the end of a prefix before its
    beginning.

    What one prompt was the last to use is always a slice of it: a later prompt takes over the beginning that the two
    share, and eviction takes from the end. So a list of slices, oldest first, is the list of blocks, exactly. Chained
    hashes are equal only where all before them are, so the first hash of a slice is its name, a dictionary leads from
    slice to slice along a prompt as the edges of a radix tree would, and where two prompts part is found by bisection:
    O(slices along the prompt × log blocks) to look up and to record. Many slices lie along a prompt only where each
    was sent shorter than the one before; the next to be recorded takes them all.

    At most two hashes are kept for each block that is held, whatever the prompts were. A slice takes some 400 bytes,
    each of its blocks 8 and what its hash takes.

    Hashes that are not chained (two prompts found with equal digests) make it count a block twice, or match what was
    not sent; they break nothing.
    """

    __slots__ = ("_by_age", "_by_first", "block_size", "instance_id", "max_tokens", "num_blocks", "num_tokens")

    def __init__(self, instance_id: InstanceId, max_tokens: int, block_size: int, by_first: RunsByFirst) -> None:
        """`by_first` is shared by the instances of one index."""
        self.instance_id = instance_id
        self.max_tokens = max_tokens
        self.block_size = block_size
        self.num_blocks = 0
        self.num_tokens = 0
        """What the blocks stand for, at most `max_tokens`."""
        self._by_age: OrderedDict[_Run, None] = OrderedDict()
        self._by_first = by_first

    def record(self, hashes: tuple[Hashable, ...], per_hash: int) -> None:
        """A prompt was sent whose hashes stand for `per_hash` tokens each: as many of its leading blocks as fit are the
        youngest now, and the oldest of the others make room."""
        num_hashes = min(len(hashes), self.max_tokens // per_hash)
        if not num_hashes:
            return
        start = 0
        while start < num_hashes:
            run = self._named(hashes[start])
            if run is None or run.start != start:
                break
            self._unname(run)
            start = run.agrees_until(hashes, num_hashes)
            self._count(run, run.start - start)
            run.start = start
            if start == run.end:
                del self._by_age[run]
            else:
                run.compact()
                self._name(run)
        newest = _Run(self, hashes, num_hashes, per_hash)
        newest.compact()
        self._name(newest)
        self._by_age[newest] = None
        self._count(newest, num_hashes)
        while self.num_tokens > self.max_tokens:
            oldest = next(iter(self._by_age))
            self._shorten(oldest, -(-(self.num_tokens - self.max_tokens) // oldest.per_hash))

    def evict(self, num_blocks: int) -> None:
        """Drop so many of the oldest blocks, of those that are held."""
        num_left = max(0, self.num_blocks - num_blocks)
        while self.num_blocks > num_left:
            self._shorten(next(iter(self._by_age)), self.num_blocks - num_left)

    def recount(self) -> tuple[int, int, int]:
        """Blocks and tokens held, and hashes kept for them; O(slices)."""
        runs = self._by_age
        num_tokens = sum((run.end - run.start) * run.per_hash for run in runs)
        return sum(run.end - run.start for run in runs), num_tokens, sum(len(run.hashes) for run in runs)

    def __iter__(self) -> Iterator[Hashable]:
        """The hashes that are held, the one that is evicted next first."""
        for run in self._by_age:
            yield from reversed(run.hashes[run.start - run.offset : run.end - run.offset])

    def _count(self, run: "_Run", num_blocks: int) -> None:
        self.num_blocks += num_blocks
        self.num_tokens += num_blocks * run.per_hash

    def _named(self, first: Hashable) -> "_Run | None":
        """The slice of this instance that begins with a hash."""
        for run in self._by_first.get(first, ()):
            if run.owner is self:
                return run
        return None

    def _name(self, run: "_Run") -> None:
        """Have a slice be found by its first hash."""
        self._by_first.setdefault(run.hashes[run.start - run.offset], []).append(run)

    def _unname(self, run: "_Run") -> None:
        first = run.hashes[run.start - run.offset]
        alike = self._by_first[first]
        alike.remove(run)
        if not alike:
            del self._by_first[first]

    def _shorten(self, run: "_Run", num_blocks: int) -> None:
        num_dropped = min(num_blocks, run.end - run.start)
        self._count(run, -num_dropped)
        run.end -= num_dropped
        if run.end == run.start:
            del self._by_age[run]
            self._unname(run)
        else:
            run.compact()


class _Run:
    """The blocks from `start` to `end` of a prompt, which was the last to use them."""

    __slots__ = ("end", "hashes", "offset", "owner", "per_hash", "start")

    def __init__(self, owner: PrefixRuns, hashes: tuple[Hashable, ...], end: int, per_hash: int) -> None:
        self.owner = owner
        self.hashes = hashes
        """Those of the prompt from `offset` on, to `end` or beyond."""
        self.offset = 0
        self.start = 0
        self.end = end
        self.per_hash = per_hash

    def agrees_until(self, hashes: tuple[Hashable, ...], num_hashes: int) -> int:
        """Where the first `num_hashes` of a prompt part from these, or either ends; they agree in the first one."""
        own, offset = self.hashes, self.offset
        least, most = self.start + 1, min(self.end, num_hashes)
        if own[most - 1 - offset] == hashes[most - 1]:
            return most
        most -= 1
        while least < most:
            middle = (least + most) // 2
            if own[middle - offset] == hashes[middle]:
                least = middle + 1
            else:
                most = middle
        return least

    def compact(self) -> None:
        """Let go of the prompt where most of it is not held. Copies no more than was given up since the last time."""
        if 2 * (self.end - self.start) < len(self.hashes):
            self.hashes = self.hashes[self.start - self.offset : self.end - self.offset]
            self.offset = self.start
