"""The paged block ledger: who holds which KV blocks, and what the prefix cache still has.

Law 3: `held + cached + free = total`. *Held* blocks belong to running sequences; *cached* ones are full, unreferenced
and can be found again by their hash until they are evicted; *free* ones hold nothing. What can be had is cached +
free.

The rules are those of vLLM 0.32 (`v1/core/block_pool.py`), so that the same blocks are evicted at the same moment:
a block is cached as soon as the step that fills it is planned; when a sequence lets go of its blocks, those without a
hash go to the front of vLLM's free queue and the cached ones to its end, last block first; allocation takes from the
front. So free blocks are always taken before cached ones, and cached ones leave in least-recently-released order.

Only blocks that somebody else could ask for need an identity: the prompt blocks that a hash names. A hash may stand for
many blocks in a row (a trace names 512 tokens at a time), and these stay one *piece* for as long as they share their
fate: a piece is cut where a prefix ends inside it, and shortened from its end when it is evicted. All other blocks (the
tail of a prompt, generated tokens) are a *run*, which nobody but their own sequence can find again, after a preemption.
Pieces and runs are entries with a count, and so a ledger over millions of tokens stays small.

Costs: extending a sequence within its blocks is free; taking n free blocks O(1); evicting, admitting and releasing
O(pieces)."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

from rota.base.errors import LawBroken


class Holding:
    """What one sequence holds. The ledger alone writes what changes."""

    __slots__ = ("block_hashes", "blocks_per_hash", "num_blocks", "num_hashed", "num_shared", "owner", "shared")

    def __init__(
        self, owner: str, block_hashes: tuple[Any, ...], blocks_per_hash: int = 1, num_hashed: int | None = None
    ) -> None:
        """`num_hashed` is how many blocks the hashes name, if the last does not name `blocks_per_hash`."""
        self.owner = owner
        self.block_hashes = block_hashes
        self.blocks_per_hash = blocks_per_hash
        self.num_hashed = len(block_hashes) * blocks_per_hash if num_hashed is None else num_hashed
        self.num_blocks = 0
        self.shared: list[Piece] = []
        """Its first blocks, as far as they are in the cache under a hash."""
        self.num_shared = 0
        """Blocks in `shared`."""


class Piece:
    """Blocks in a row that one hash names: `count` of them, from the `start`-th of that hash on."""

    __slots__ = ("block_hash", "count", "holders", "start")

    def __init__(self, block_hash: Any, start: int, count: int, holders: set[Holding]) -> None:
        self.block_hash = block_hash
        self.start = start
        self.count = count
        self.holders = holders
        """Who references them."""


class Run:
    """Cached blocks that only `owner` can find again: `count` of them, following its hashed blocks."""

    __slots__ = ("count", "owner")

    def __init__(self, owner: str, count: int) -> None:
        self.owner = owner
        self.count = count


Part = tuple[Piece, int, int]
"""Blocks of a piece: from the so many-th of its hash on, and how many."""


class Hit:
    """What the prefix cache has of a sequence: hashed blocks from the first on, then blocks of its own run."""

    __slots__ = ("num_blocks", "num_evictable", "num_shared", "run", "shared")

    def __init__(self, shared: list[Part], num_shared: int, run: Run | None, num_evictable: int) -> None:
        self.shared = shared
        self.num_shared = num_shared
        self.run = run
        self.num_blocks = num_shared + (run.count if run else 0)
        self.num_evictable = num_evictable
        """Of these, how many nobody references: taking them lowers what can be had."""


NO_HIT = Hit([], 0, None, 0)


class BlockLedger:
    """Counts and identifies the KV blocks of one instance.

    Every change between `begin` and `commit` can be taken back with `rollback`, exactly.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caching = enable_prefix_caching
        self.num_free = num_blocks
        self.num_cached = 0
        self._released: OrderedDict[Piece | Run, int] = OrderedDict()
        """Evictable entries, the next to go first; the value is a stamp that rises, so that rollback can restore it."""
        self._stamp = 0
        self._runs: dict[str, Run] = {}
        self._found: dict[Any, list[Piece]] = {}
        """Hash to the pieces that carry it, oldest first: vLLM keeps duplicates and hits the oldest."""
        self._undo: list[tuple[Callable[..., object], tuple[Any, ...]]] | None = None

    @property
    def num_available(self) -> int:
        """Blocks that can be had: free plus cached."""
        return self.num_free + self.num_cached

    # --- asking ------------------------------------------------------------------------------------------------------

    def lookup(self, holding: Holding, num_tokens: int) -> Hit:
        """The longest prefix of a sequence of `num_tokens` tokens that is cached, leaving at least one token to compute
        (its logits are needed). Changes nothing."""
        if not self.caching:
            return NO_HIT
        limit = (num_tokens - 1) // self.block_size
        last = min(limit, holding.num_hashed)
        hashes, ratio = holding.block_hashes, holding.blocks_per_hash
        found = self._found
        shared: list[Part] = []
        num_shared = num_evictable = 0
        while num_shared < last:
            index, start = divmod(num_shared, ratio)
            pieces = found.get(hashes[index])
            if pieces is None:
                break
            piece, end = _oldest(pieces, start)
            if piece is None:
                break
            count = min(end - start, last - num_shared)
            shared.append((piece, start, count))
            num_shared += count
            if not piece.holders:
                num_evictable += count
        run = self._runs.get(holding.owner) if num_shared == last else None
        if run is None or limit - holding.num_hashed < run.count:
            return Hit(shared, num_shared, None, num_evictable) if shared else NO_HIT
        return Hit(shared, num_shared, run, num_evictable + run.count)

    def num_cached_blocks(self, holding: Holding, num_tokens: int) -> int:
        """`lookup(holding, num_tokens).num_blocks`, without saying which they are: for those who only ask how many."""
        if holding.blocks_per_hash > 1 or not self.caching:
            return self.lookup(holding, num_tokens).num_blocks
        limit = (num_tokens - 1) // self.block_size
        num_shared = 0
        for block_hash in islice(holding.block_hashes, min(limit, holding.num_hashed)):
            if block_hash not in self._found:
                return num_shared
            num_shared += 1
        run = self._runs.get(holding.owner)
        return num_shared if run is None or limit - holding.num_hashed < run.count else num_shared + run.count

    def num_to_take(self, holding: Holding, hit: Hit, num_tokens: int, leaving: Iterable[Holding] = ()) -> int:
        """By how much admitting a sequence with slots for `num_tokens` tokens lowers what can be had, after those
        `leaving` have let go of their blocks."""
        taken_again = self._held_by_these_alone(leaving)
        num_shared = sum(count for piece, _, count in hit.shared if piece in taken_again) if taken_again else 0
        return max(-(-num_tokens // self.block_size) - hit.num_blocks, 0) + hit.num_evictable + num_shared

    def num_freed_by(self, leaving: Sequence[Holding]) -> int:
        """Blocks that could be had again if these sequences let go of theirs; shared ones count once, and only if
        nobody else holds them."""
        num_own = sum(holding.num_blocks - holding.num_shared for holding in leaving)
        return num_own + sum(piece.count for piece in self._held_by_these_alone(leaving))

    def _held_by_these_alone(self, holdings: Iterable[Holding]) -> set[Piece]:
        counts: dict[Piece, int] = {}
        for holding in holdings:
            for piece in holding.shared:
                counts[piece] = counts.get(piece, 0) + 1
        return {piece for piece, count in counts.items() if len(piece.holders) == count}

    # --- changing ----------------------------------------------------------------------------------------------------

    def admit(self, holding: Holding, hit: Hit, num_tokens: int) -> None:
        """Give a sequence that holds nothing its cached prefix and blocks for `num_tokens` tokens in all. The caller
        has checked that they can be had."""
        shared = []
        for piece, start, count in hit.shared:
            if start > piece.start or count < piece.count:
                piece = self._carve(piece, start, count)
            if not piece.holders:
                stamp = self._released.pop(piece)
                self.num_cached -= piece.count
                self._log(self._undo_touch, piece, stamp)
            piece.holders.add(holding)
            self._log(piece.holders.discard, holding)
            shared.append(piece)
        run = hit.run
        if run is not None:
            stamp = self._released.pop(run)
            del self._runs[run.owner]
            self.num_cached -= run.count
            self._log(self._undo_touch_run, run, stamp)
        self._log(self._undo_admit, holding, holding.shared, holding.num_shared, holding.num_blocks)
        holding.shared = shared
        holding.num_shared = hit.num_shared
        holding.num_blocks = hit.num_blocks
        self.extend(holding, num_tokens)

    def extend(self, holding: Holding, num_tokens: int) -> None:
        """Give a sequence blocks for `num_tokens` tokens in all. The caller has checked that they can be had."""
        num_new = -(-num_tokens // self.block_size) - holding.num_blocks
        if num_new <= 0:
            return
        self.take(num_new)
        holding.num_blocks += num_new
        self._log(self._undo_extend, holding, num_new)

    def take(self, num_new: int) -> None:
        """Hand out that many blocks, to holdings that note them themselves. The caller has checked that they can be
        had."""
        if num_new > self.num_free:
            self._evict(num_new - self.num_free)
        self.num_free -= num_new
        self._log(self._undo_take, num_new)

    def trim(self, holding: Holding, num_tokens: int) -> None:
        """Take back what a sequence holds beyond the blocks for `num_tokens` tokens, none of which is shared."""
        num_left = holding.num_blocks - -(-num_tokens // self.block_size)
        self._log(self._undo_admit, holding, holding.shared, holding.num_shared, holding.num_blocks)
        self._log(self._undo_free, num_left)
        holding.num_blocks -= num_left
        self.num_free += num_left

    def publish(self, holding: Holding, num_tokens: int) -> None:
        """Make the full hashed blocks among the first `num_tokens` tokens findable, as vLLM does when it plans the step
        that fills them."""
        if not self.caching:
            return
        hashes, ratio = holding.block_hashes, holding.blocks_per_hash
        block = holding.num_shared
        last = min(num_tokens // self.block_size, holding.num_hashed)
        while block < last:
            index, start = divmod(block, ratio)
            piece = Piece(hashes[index], start, min(ratio - start, last - block), {holding})
            block += piece.count
            self._found.setdefault(piece.block_hash, []).append(piece)
            holding.shared.append(piece)
            holding.num_shared = block
            self._log(self._undo_publish, holding, piece)

    def retract(self, holding: Holding, num_tokens: int) -> None:
        """Take back what `publish` did beyond the first `num_tokens` tokens, in the pass that published it: the step
        that would have filled those blocks was called off."""
        while holding.num_shared > num_tokens // self.block_size:
            piece = holding.shared[-1]
            place = self._undo_publish(holding, piece)
            self._log(self._redo_publish, holding, piece, place)

    def release(self, holding: Holding, num_computed_tokens: int, *, will_return: bool) -> None:
        """Take all blocks from a sequence. With `will_return` (a preemption) it can find its private full blocks again
        until they are evicted; without (it ended) they only wait for eviction, as they do in vLLM."""
        released = self._released
        num_shared = holding.num_shared
        num_run = max(num_computed_tokens // self.block_size - num_shared, 0) if self.caching else 0
        self._log(self._undo_admit, holding, holding.shared, num_shared, holding.num_blocks)
        num_freed = holding.num_blocks - num_shared - num_run
        self.num_free += num_freed
        self._log(self._undo_free, num_freed)
        if num_run:
            self._release_run(holding.owner, num_run, will_return)
        for piece in reversed(holding.shared):
            piece.holders.remove(holding)
            self._log(piece.holders.add, holding)
            if not piece.holders:
                self._stamp += 1
                released[piece] = self._stamp
                self.num_cached += piece.count
                self._log(self._undo_released, piece)
        holding.shared = []
        holding.num_shared = holding.num_blocks = 0

    def _release_run(self, owner: str, count: int, will_return: bool) -> None:
        run = Run(owner, count)
        self._stamp += 1
        self._released[run] = self._stamp
        self.num_cached += count
        # An older run of the same owner can no longer be reached behind the new one; it stays until it is evicted.
        older = self._runs.get(owner)
        if will_return:
            self._runs[owner] = run
        else:
            self._runs.pop(owner, None)
        self._log(self._undo_release_run, run, older)

    def _evict(self, count: int) -> None:
        released = self._released
        while count > 0:
            entry, stamp = next(iter(released.items()))
            taken = min(entry.count, count)
            entry.count -= taken
            self.num_cached -= taken
            self.num_free += taken
            count -= taken
            if isinstance(entry, Run):
                was_findable = self._runs.get(entry.owner) is entry
                if entry.count == 0:
                    del released[entry]
                    if was_findable:
                        del self._runs[entry.owner]
                self._log(self._undo_evict_run, entry, taken, stamp, was_findable)
            else:
                place = -1
                if entry.count == 0:
                    del released[entry]
                    place = self._unfind(entry)
                self._log(self._undo_evict_piece, entry, taken, stamp, place)

    def _unfind(self, piece: Piece) -> int:
        """Make a piece one that nobody finds; returns its place among those of its hash."""
        pieces = self._found[piece.block_hash]
        place = pieces.index(piece)
        del pieces[place]
        if not pieces:
            del self._found[piece.block_hash]
        return place

    def _carve(self, piece: Piece, start: int, count: int) -> Piece:
        """Cut a piece so that these of its blocks are one by themselves."""
        if start > piece.start:
            self._cut(piece, start)
            self._sort()
        return self._cut(piece, start + count) if count < piece.count else piece

    def _cut(self, piece: Piece, start: int) -> Piece:
        """Cut off what comes before the `start`-th block, as a piece of its own. What is behind goes first, when it
        comes to eviction: the caller sorts, unless it takes the front out."""
        front = Piece(piece.block_hash, piece.start, start - piece.start, set(piece.holders))
        piece.count -= front.count
        piece.start = start
        pieces = self._found[piece.block_hash]
        pieces.insert(pieces.index(piece), front)
        for holding in front.holders:
            holding.shared.insert(holding.shared.index(piece), front)
        if not front.holders:
            self._released[front] = self._released[piece]
        self._log(self._undo_cut, piece, front)
        return front

    def _sort(self) -> None:
        in_turn = sorted(self._released.items(), key=_by_stamp)
        self._released.clear()
        self._released.update(in_turn)

    # --- all or nothing ----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start a change that can be taken back."""
        self._undo = []

    def commit(self) -> None:
        """Keep what was changed since `begin`."""
        self._undo = None

    def rollback(self) -> None:
        """Take back everything changed since `begin`."""
        undo, self._undo = self._undo, None
        for inverse, arguments in reversed(undo or []):
            inverse(*arguments)
        self._sort()

    def _log(self, inverse: Callable[..., object], *arguments: Any) -> None:
        if self._undo is not None:
            self._undo.append((inverse, arguments))

    def _undo_touch(self, piece: Piece, stamp: int) -> None:
        self._released[piece] = stamp
        self.num_cached += piece.count

    def _undo_cut(self, piece: Piece, front: Piece) -> None:
        for holding in front.holders:
            holding.shared.remove(front)
        self._released.pop(front, None)
        self._unfind(front)
        piece.start = front.start
        piece.count += front.count

    def _undo_touch_run(self, run: Run, stamp: int) -> None:
        self._released[run] = stamp
        self._runs[run.owner] = run
        self.num_cached += run.count

    def _undo_admit(self, holding: Holding, shared: list[Piece], num_shared: int, num_blocks: int) -> None:
        holding.shared = shared
        holding.num_shared = num_shared
        holding.num_blocks = num_blocks

    def _undo_extend(self, holding: Holding, num_new: int) -> None:
        holding.num_blocks -= num_new

    def _undo_take(self, num_new: int) -> None:
        self.num_free += num_new

    def _undo_publish(self, holding: Holding, piece: Piece) -> int:
        holding.shared.pop()
        holding.num_shared -= piece.count
        return self._unfind(piece)

    def _redo_publish(self, holding: Holding, piece: Piece, place: int) -> None:
        holding.shared.append(piece)
        holding.num_shared += piece.count
        self._found.setdefault(piece.block_hash, []).insert(place, piece)

    def _undo_free(self, count: int) -> None:
        self.num_free -= count

    def _undo_released(self, piece: Piece) -> None:
        del self._released[piece]
        self.num_cached -= piece.count

    def _undo_release_run(self, run: Run, older: Run | None) -> None:
        del self._released[run]
        self.num_cached -= run.count
        self._runs.pop(run.owner, None)
        if older is not None:
            self._runs[run.owner] = older

    def _undo_evict_run(self, run: Run, taken: int, stamp: int, was_findable: bool) -> None:
        run.count += taken
        self.num_cached += taken
        self.num_free -= taken
        self._released[run] = stamp
        if was_findable:
            self._runs[run.owner] = run

    def _undo_evict_piece(self, piece: Piece, taken: int, stamp: int, place: int) -> None:
        piece.count += taken
        self.num_cached += taken
        self.num_free -= taken
        self._released[piece] = stamp
        if place >= 0:
            self._found.setdefault(piece.block_hash, []).insert(place, piece)

    # --- auditing ----------------------------------------------------------------------------------------------------

    def audit(self, holdings: list[Holding]) -> None:
        """Recount everything from the holdings of all sequences; raises `LawBroken` where a count is off."""
        holders: dict[Piece, set[Holding]] = {}
        held = 0
        for holding in holdings:
            num_shared = sum(piece.count for piece in holding.shared)
            if holding.num_blocks < num_shared or num_shared != holding.num_shared:
                raise LawBroken(
                    f"law 3: {holding.owner} holds {holding.num_blocks} blocks, counts {holding.num_shared} shared and "
                    f"lists {num_shared}"
                )
            held += holding.num_blocks - num_shared
            for piece in holding.shared:
                holders.setdefault(piece, set()).add(holding)
        held += sum(piece.count for piece in holders)
        cached = sum(entry.count for entry in self._released)
        if cached != self.num_cached:
            raise LawBroken(f"law 3: {self.num_cached} blocks counted as cached, {cached} listed")
        if held + self.num_cached + self.num_free != self.num_blocks or self.num_free < 0:
            raise LawBroken(
                f"law 3: held {held} + cached {self.num_cached} + free {self.num_free} is not total {self.num_blocks}"
            )
        for piece in [piece for pieces in self._found.values() for piece in pieces]:
            if holders.get(piece, set()) != piece.holders:
                raise LawBroken(
                    f"law 3: blocks of {piece.block_hash} have {len(piece.holders)} references, "
                    f"{len(holders.get(piece, ()))} holders"
                )
            if bool(piece.holders) == (piece in self._released):
                raise LawBroken(f"law 3: blocks of {piece.block_hash} are on the wrong side of the cache")


def _oldest(pieces: list[Piece], start: int) -> tuple[Piece | None, int]:
    """The oldest piece that has the `start`-th block of its hash, and where the first piece that is older still, or its
    own end, comes behind it."""
    end = -1
    for piece in pieces:
        if piece.start <= start < piece.start + piece.count:
            return piece, piece.start + piece.count if end < 0 else min(end, piece.start + piece.count)
        if piece.start > start and (end < 0 or piece.start < end):
            end = piece.start
    return None, 0


def _by_stamp(item: tuple[Piece | Run, int]) -> tuple[int, int]:
    """Of pieces that were one when they were released, the last goes first."""
    entry, stamp = item
    return stamp, -entry.start if isinstance(entry, Piece) else 0
