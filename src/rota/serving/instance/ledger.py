"""The paged block ledger: who holds which KV blocks, and what the prefix cache still has.

Law 3: `held + cached + free = total`. *Held* blocks belong to running sequences; *cached* ones are full, unreferenced
and can be found again by their hash until they are evicted; *free* ones hold nothing. What can be had is cached +
free.

The rules are those of vLLM 0.32 (`v1/core/block_pool.py`), so that the same blocks are evicted at the same moment:
a block is cached as soon as the step that fills it is planned; when a sequence lets go of its blocks, those without a
hash go to the front of vLLM's free queue and the cached ones to its end, last block first; allocation takes from the
front. So free blocks are always taken before cached ones, and cached ones leave in least-recently-released order.

Only blocks that somebody else could ask for need an identity: the prompt blocks that carry a hash. All others (the tail
of a prompt, generated tokens) are a *run*, which nobody but their own sequence can find again, after a preemption. A
run is one entry with a count, and so a ledger over millions of tokens stays small.

Costs: extending a sequence within its blocks is free; taking n free blocks O(1); evicting, admitting and releasing
O(blocks that carry a hash)."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rota.base.errors import LawBroken


class Holding:
    """What one sequence holds. The ledger alone writes these fields."""

    __slots__ = ("block_hashes", "num_blocks", "owner", "shared")

    def __init__(self, owner: str, block_hashes: tuple[Any, ...]) -> None:
        self.owner = owner
        self.block_hashes = block_hashes
        self.num_blocks = 0
        self.shared: list[int] = []
        """Ids of its first blocks, as far as they are in the cache under a hash."""


class Run:
    """Cached blocks that only `owner` can find again: `count` of them, following its hashed blocks."""

    __slots__ = ("count", "owner")

    def __init__(self, owner: str, count: int) -> None:
        self.owner = owner
        self.count = count


class Hit:
    """What the prefix cache has of a sequence: hashed blocks from the first on, then blocks of its own run."""

    __slots__ = ("num_blocks", "num_evictable", "run", "shared")

    def __init__(self, shared: list[int], run: Run | None, num_evictable: int) -> None:
        self.shared = shared
        self.run = run
        self.num_blocks = len(shared) + (run.count if run else 0)
        self.num_evictable = num_evictable
        """Of these, how many nobody references: taking them lowers what can be had."""


NO_HIT = Hit([], None, 0)


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
        self._released: OrderedDict[int | Run, int] = OrderedDict()
        """Evictable entries, the next to go first; the value is a stamp that rises, so that rollback can restore it."""
        self._stamp = 0
        self._runs: dict[str, Run] = {}
        self._found: dict[Any, list[int]] = {}
        """Hash to the ids that carry it, oldest first: vLLM keeps duplicates and hits the oldest."""
        self._hash_of: dict[int, Any] = {}
        self._references: dict[int, int] = {}
        self._next_id = 0
        self._undo: list[tuple[Callable[..., None], tuple[Any, ...]]] | None = None

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
        hashes = holding.block_hashes
        found = self._found
        shared: list[int] = []
        num_evictable = 0
        for block_hash in hashes[:limit]:
            ids = found.get(block_hash)
            if ids is None:
                return Hit(shared, None, num_evictable) if shared else NO_HIT
            shared.append(ids[0])
            if self._references[ids[0]] == 0:
                num_evictable += 1
        run = self._runs.get(holding.owner)
        if run is None or limit - len(hashes) < run.count:
            return Hit(shared, None, num_evictable) if shared else NO_HIT
        return Hit(shared, run, num_evictable + run.count)

    def num_to_take(self, holding: Holding, hit: Hit, num_tokens: int, leaving: Iterable[Holding] = ()) -> int:
        """By how much admitting a sequence with slots for `num_tokens` tokens lowers what can be had, after those
        `leaving` have let go of their blocks."""
        taken_again = self._held_by_these_alone(leaving)
        num_shared = sum(1 for block in hit.shared if block in taken_again) if taken_again else 0
        return max(-(-num_tokens // self.block_size) - hit.num_blocks, 0) + hit.num_evictable + num_shared

    def num_freed_by(self, leaving: Sequence[Holding]) -> int:
        """Blocks that could be had again if these sequences let go of theirs; shared ones count once, and only if
        nobody else holds them."""
        num_own = sum(holding.num_blocks - len(holding.shared) for holding in leaving)
        return num_own + len(self._held_by_these_alone(leaving))

    def _held_by_these_alone(self, holdings: Iterable[Holding]) -> set[int]:
        counts: dict[int, int] = {}
        for holding in holdings:
            for block in holding.shared:
                counts[block] = counts.get(block, 0) + 1
        references = self._references
        return {block for block, count in counts.items() if references[block] == count}

    # --- changing ----------------------------------------------------------------------------------------------------

    def admit(self, holding: Holding, hit: Hit, num_tokens: int) -> None:
        """Give a sequence that holds nothing its cached prefix and blocks for `num_tokens` tokens in all. The caller
        has checked that they can be had."""
        references = self._references
        released = self._released
        for block in hit.shared:
            if references[block] == 0:
                stamp = released.pop(block)
                self.num_cached -= 1
                self._log(self._undo_touch, block, stamp)
            references[block] += 1
            self._log(self._undo_reference, block)
        run = hit.run
        if run is not None:
            stamp = released.pop(run)
            del self._runs[run.owner]
            self.num_cached -= run.count
            self._log(self._undo_touch_run, run, stamp)
        self._log(self._undo_admit, holding, holding.shared, holding.num_blocks)
        holding.shared = list(hit.shared)
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

    def publish(self, holding: Holding, num_tokens: int) -> None:
        """Make the full hashed blocks among the first `num_tokens` tokens findable, as vLLM does when it plans the step
        that fills them."""
        if not self.caching:
            return
        hashes = holding.block_hashes
        first = len(holding.shared)
        last = min(num_tokens // self.block_size, len(hashes))
        for index in range(first, last):
            block = self._next_id
            self._next_id += 1
            block_hash = hashes[index]
            self._hash_of[block] = block_hash
            self._references[block] = 1
            self._found.setdefault(block_hash, []).append(block)
            holding.shared.append(block)
            self._log(self._undo_publish, holding, block)

    def retract(self, holding: Holding, num_tokens: int) -> None:
        """Take back what `publish` did beyond the first `num_tokens` tokens, in the pass that published it: the step
        that would have filled those blocks was called off."""
        while len(holding.shared) > num_tokens // self.block_size:
            block = holding.shared[-1]
            block_hash = self._hash_of[block]
            self._undo_publish(holding, block)
            self._log(self._redo_publish, holding, block, block_hash)

    def release(self, holding: Holding, num_computed_tokens: int, *, will_return: bool) -> None:
        """Take all blocks from a sequence. With `will_return` (a preemption) it can find its private full blocks again
        until they are evicted; without (it ended) they only wait for eviction, as they do in vLLM."""
        references = self._references
        released = self._released
        num_shared = len(holding.shared)
        num_run = max(num_computed_tokens // self.block_size - num_shared, 0) if self.caching else 0
        self._log(self._undo_release, holding, holding.shared, holding.num_blocks)
        num_freed = holding.num_blocks - num_shared - num_run
        self.num_free += num_freed
        self._log(self._undo_free, num_freed)
        if num_run:
            self._release_run(holding.owner, num_run, will_return)
        for block in reversed(holding.shared):
            references[block] -= 1
            self._log(self._undo_dereference, block)
            if references[block] == 0:
                self._stamp += 1
                released[block] = self._stamp
                self.num_cached += 1
                self._log(self._undo_released, block)
        holding.shared = []
        holding.num_blocks = 0

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
            entry = next(iter(released))
            if isinstance(entry, Run):
                taken = min(entry.count, count)
                entry.count -= taken
                self.num_cached -= taken
                self.num_free += taken
                count -= taken
                stamp = released[entry]
                was_findable = self._runs.get(entry.owner) is entry
                if entry.count == 0:
                    del released[entry]
                    if was_findable:
                        del self._runs[entry.owner]
                self._log(self._undo_evict_run, entry, taken, stamp, was_findable)
            else:
                stamp = released.pop(entry)
                block_hash = self._hash_of.pop(entry)
                del self._references[entry]
                ids = self._found[block_hash]
                index = ids.index(entry)
                del ids[index]
                if not ids:
                    del self._found[block_hash]
                self.num_cached -= 1
                self.num_free += 1
                count -= 1
                self._log(self._undo_evict_block, entry, block_hash, index, stamp)

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
        self._released = OrderedDict(sorted(self._released.items(), key=lambda item: item[1]))

    def _log(self, inverse: Callable[..., None], *arguments: Any) -> None:
        if self._undo is not None:
            self._undo.append((inverse, arguments))

    def _undo_touch(self, block: int, stamp: int) -> None:
        self._released[block] = stamp
        self.num_cached += 1

    def _undo_reference(self, block: int) -> None:
        self._references[block] -= 1

    def _undo_touch_run(self, run: Run, stamp: int) -> None:
        self._released[run] = stamp
        self._runs[run.owner] = run
        self.num_cached += run.count

    def _undo_admit(self, holding: Holding, shared: list[int], num_blocks: int) -> None:
        holding.shared = shared
        holding.num_blocks = num_blocks

    def _undo_extend(self, holding: Holding, num_new: int) -> None:
        holding.num_blocks -= num_new

    def _undo_take(self, num_new: int) -> None:
        self.num_free += num_new

    def _undo_publish(self, holding: Holding, block: int) -> None:
        holding.shared.pop()
        block_hash = self._hash_of.pop(block)
        del self._references[block]
        ids = self._found[block_hash]
        ids.remove(block)
        if not ids:
            del self._found[block_hash]

    def _redo_publish(self, holding: Holding, block: int, block_hash: Any) -> None:
        holding.shared.append(block)
        self._hash_of[block] = block_hash
        self._references[block] = 1
        self._found.setdefault(block_hash, []).append(block)

    def _undo_release(self, holding: Holding, shared: list[int], num_blocks: int) -> None:
        holding.shared = shared
        holding.num_blocks = num_blocks

    def _undo_free(self, count: int) -> None:
        self.num_free -= count

    def _undo_dereference(self, block: int) -> None:
        self._references[block] += 1

    def _undo_released(self, block: int) -> None:
        del self._released[block]
        self.num_cached -= 1

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

    def _undo_evict_block(self, block: int, block_hash: Any, index: int, stamp: int) -> None:
        self._released[block] = stamp
        self._hash_of[block] = block_hash
        self._references[block] = 0
        self._found.setdefault(block_hash, []).insert(index, block)
        self.num_cached += 1
        self.num_free -= 1

    # --- auditing ----------------------------------------------------------------------------------------------------

    def audit(self, holdings: list[Holding]) -> None:
        """Recount everything from the holdings of all sequences; raises `LawBroken` where a count is off."""
        references: dict[int, int] = {}
        held = 0
        for holding in holdings:
            if holding.num_blocks < len(holding.shared):
                raise LawBroken(
                    f"law 3: {holding.owner} holds {holding.num_blocks} blocks but lists {len(holding.shared)}"
                )
            held += holding.num_blocks - len(holding.shared)
            for block in holding.shared:
                references[block] = references.get(block, 0) + 1
        held += len(references)
        cached = sum(entry.count if isinstance(entry, Run) else 1 for entry in self._released)
        if cached != self.num_cached:
            raise LawBroken(f"law 3: {self.num_cached} blocks counted as cached, {cached} listed")
        if held + self.num_cached + self.num_free != self.num_blocks or self.num_free < 0:
            raise LawBroken(
                f"law 3: held {held} + cached {self.num_cached} + free {self.num_free} is not total {self.num_blocks}"
            )
        for block, count in self._references.items():
            if references.get(block, 0) != count:
                raise LawBroken(f"law 3: block {block} has {count} references, {references.get(block, 0)} holders")
            if (count == 0) != (block in self._released):
                raise LawBroken(f"law 3: block {block} with {count} references is on the wrong side of the cache")
