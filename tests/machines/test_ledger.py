"""The block ledger against a slow model with a real object for every block, in the manner of vLLM's block pool.

The model keeps one free queue. Blocks without a hash go to its front, cached ones to its end, a sequence's last block
first; allocation takes from the front, and a cached block that is taken forgets its hash. Every full block has a hash:
the prompt's where it is given, one of the sequence's own elsewhere.
"""

from copy import copy

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from rota.base.errors import LawBroken
from rota.serving.instance.ledger import BlockLedger, Holding, Piece, Run

BLOCK = 4


class Block:
    def __init__(self):
        self.hash = None
        self.num_references = 0


class Pool:
    """vLLM's block pool, as plainly as it can be written."""

    def __init__(self, num_blocks, caching):
        self.caching = caching
        self.queue = [Block() for _ in range(num_blocks)]
        self.cached = {}

    def allocate(self, count):
        taken, self.queue = self.queue[:count], self.queue[count:]
        assert len(taken) == count
        for block in taken:
            if block.hash is not None:
                self.forget(block)
            block.num_references = 1
        return taken

    def forget(self, block):
        self.cached[block.hash].remove(block)
        if not self.cached[block.hash]:
            del self.cached[block.hash]
        block.hash = None

    def cache(self, block, block_hash):
        block.hash = block_hash
        self.cached.setdefault(block_hash, []).append(block)

    def find(self, block_hashes):
        """The longest cached prefix; of several blocks with one hash the oldest."""
        found = []
        for block_hash in block_hashes:
            if block_hash not in self.cached:
                break
            found.append(self.cached[block_hash][0])
        return found

    def touch(self, blocks):
        for block in blocks:
            if block.num_references == 0:
                self.queue.remove(block)
            block.num_references += 1

    def free(self, blocks):
        for block in blocks:
            block.num_references -= 1
        freed = [block for block in blocks if block.num_references == 0]
        self.queue = [block for block in freed if block.hash is None] + self.queue
        self.queue += [block for block in freed if block.hash is not None]


class Known:
    """A sequence: its side in the ledger, and its blocks in the model."""

    def __init__(self, name, num_tokens, block_hashes, ratio=1, num_hashed=None):
        self.name = name
        self.num_tokens = num_tokens
        self.num_computed = 0
        self.num_granted = 0
        self.holding = Holding(name, block_hashes, ratio, num_hashed)
        self.blocks = []
        self.num_published = 0

    def hash_at(self, index):
        holding = self.holding
        if index >= holding.num_hashed:
            return self.name, index
        number, start = divmod(index, holding.blocks_per_hash)
        return holding.block_hashes[number], start

    def lookup_hashes(self):
        return [self.hash_at(index) for index in range((self.num_tokens - 1) // BLOCK)]


def needed(num_tokens):
    return -(-num_tokens // BLOCK)


def state_of(ledger, holdings):
    """All that matters of a ledger, eviction order included, as a value."""
    return (
        ledger.num_free,
        ledger.num_cached,
        [(copy_of(entry), stamp) for entry, stamp in ledger._released.items()],
        {owner: copy_of(run) for owner, run in ledger._runs.items()},
        {block_hash: [copy_of(piece) for piece in pieces] for block_hash, pieces in ledger._found.items()},
        [
            (holding.num_blocks, holding.num_shared, [copy_of(piece) for piece in holding.shared])
            for holding in holdings
        ],
    )


def copy_of(entry):
    if isinstance(entry, Run):
        return entry.owner, entry.count
    return entry.block_hash, entry.start, entry.count, {holding.owner for holding in entry.holders}


class LedgerRules(RuleBasedStateMachine):
    """Sequences are admitted, grow, are preempted and end; whole passes are taken back."""

    @initialize(
        num_blocks=st.integers(6, 24), caching=st.sampled_from([True, True, True, False]), ratio=st.integers(1, 4)
    )
    def begin(self, num_blocks, caching, ratio):
        """A hash names `ratio` blocks, as in a trace that names longer stretches than an engine's blocks."""
        self.ratio = ratio
        self.ledger = BlockLedger(num_blocks, BLOCK, enable_prefix_caching=caching)
        self.pool = Pool(num_blocks, caching)
        self.num_blocks = num_blocks
        self.running = []
        self.waiting = []
        self.num_sequences = 0
        self.run_begins = {}

    # --- what happens to an engine ----------------------------------------------------------------------------------

    @rule(
        prompts=st.lists(
            st.tuples(st.integers(1, 40), st.sampled_from([0, 1, 1, 1, 2]), st.booleans()), min_size=1, max_size=3
        )
    )
    def arrive(self, prompts):
        for num_tokens, family, is_hashed_in_full in prompts:
            num_hashed = num_tokens // BLOCK if is_hashed_in_full else num_tokens // BLOCK // 2
            hashes = tuple((family, number) for number in range(-(-num_hashed // self.ratio))) if family else ()
            self.num_sequences += 1
            if num_tokens < self.num_blocks * BLOCK:
                self.waiting.append(
                    Known(f"r{self.num_sequences}", num_tokens, hashes, self.ratio, num_hashed if family else 0)
                )

    @rule(
        moves=st.lists(
            st.tuples(
                st.sampled_from(["admit", "admit", "grow", "grow", "preempt"]), st.integers(0, 9), st.integers(1, 30)
            ),
            min_size=1,
            max_size=8,
        ),
        is_kept=st.booleans(),
    )
    def one_pass(self, moves, is_kept):
        """A step is composed, and perhaps called off."""
        self.ledger.begin()
        holdings = [known.holding for known in self.running + self.waiting]
        before, model = state_of(self.ledger, holdings), self.model_state()
        for move, who, num_tokens in moves:
            among = self.waiting if move == "admit" else self.running
            if among:
                getattr(self, move)(among[who % len(among)], num_tokens)
                self.both_tell_the_same()
        if is_kept:
            self.ledger.commit()
        else:
            self.ledger.rollback()
            assert state_of(self.ledger, holdings) == before
            self.restore_model(model)

    def admit(self, known, num_tokens):
        ledger, holding = self.ledger, known.holding
        hit = ledger.lookup(holding, known.num_tokens)
        cached = hit.num_blocks * BLOCK
        total = min(cached + num_tokens, known.num_tokens)
        found = self.pool.find(known.lookup_hashes())
        num_new = needed(total) - len(found)
        num_to_take = num_new + sum(block.num_references == 0 for block in found)
        assert ledger.num_to_take(holding, hit, total) == num_to_take
        if num_to_take > ledger.num_available:
            return
        ledger.admit(holding, hit, total)
        ledger.publish(holding, total)
        self.pool.touch(found)
        known.blocks = found + self.pool.allocate(num_new)
        known.num_published = min(holding.num_hashed, len(found))
        self.publish(known, total)
        known.num_computed, known.num_granted = cached, total - cached
        self.waiting.remove(known)
        self.running.append(known)

    def grow(self, known, num_tokens):
        total = min(known.num_computed + num_tokens, known.num_tokens)
        num_new = needed(total) - len(known.blocks)
        if known.num_granted or total == known.num_computed or num_new > self.ledger.num_available:
            return
        self.ledger.extend(known.holding, total)
        self.ledger.publish(known.holding, total)
        known.blocks += self.pool.allocate(max(num_new, 0))
        self.publish(known, total)
        known.num_granted = total - known.num_computed

    def preempt(self, known, _):
        if known.num_granted and self.is_leant_on(known):
            return
        if known.num_granted:
            self.ledger.retract(known.holding, known.num_computed)
            while known.num_published > known.num_computed // BLOCK:
                known.num_published -= 1
                self.pool.forget(known.blocks[known.num_published])
        self.let_go(known, will_return=True)
        known.num_computed = known.num_granted = 0
        self.waiting.append(known)

    @rule(num_steps=st.sampled_from([1, 1, 2, 9]))
    def finish_step(self, num_steps):
        """Everybody computed what was granted; who has caught up yields one token, or several in a leap."""
        for known in self.running:
            known.num_computed += known.num_granted
            if known.num_granted and known.num_computed == known.num_tokens:
                more = num_steps - 1
                num_new = needed(known.num_computed + more) - len(known.blocks)
                if num_new > self.ledger.num_available:
                    more = num_new = 0
                known.num_tokens += 1 + more
                known.num_computed += more
                self.ledger.extend(known.holding, known.num_computed)
                known.blocks += self.pool.allocate(max(num_new, 0))
            known.num_granted = 0

    @precondition(lambda self: self.running)
    @rule(who=st.integers(0, 9))
    def end(self, who):
        known = self.running[who % len(self.running)]
        known.num_computed += known.num_granted
        self.let_go(known, will_return=False)

    # --- the model's side -------------------------------------------------------------------------------------------

    def publish(self, known, total):
        if not self.pool.caching:
            return
        last = min(total // BLOCK, known.holding.num_hashed)
        for index in range(known.num_published, last):
            self.pool.cache(known.blocks[index], known.hash_at(index))
        known.num_published = max(known.num_published, last)

    def let_go(self, known, *, will_return):
        self.run_begins[known.name] = known.num_published
        self.ledger.release(known.holding, known.num_computed, will_return=will_return)
        if self.pool.caching:
            for index in range(known.num_published, known.num_computed // BLOCK):
                self.cache_own(known, index)
        self.pool.free(known.blocks[::-1])
        known.blocks, known.num_published = [], 0
        self.running.remove(known)

    def cache_own(self, known, index):
        # What it was admitted with out of its own cache has its hash already.
        if known.blocks[index].hash is None:
            self.pool.cache(known.blocks[index], known.hash_at(index))

    def is_leant_on(self, known):
        """Whether somebody shares a block that this sequence was to fill in this very step. The draft forbids that."""
        published = known.blocks[known.num_computed // BLOCK : known.num_published]
        return any(block.num_references > 1 for block in published)

    def model_state(self):
        blocks = {id(block): block for block in self.pool.queue}
        for known in self.running:
            blocks.update((id(block), block) for block in known.blocks)
        everyone = [*self.running, *self.waiting]
        return (
            [(block, copy(vars(block))) for block in blocks.values()],
            list(self.pool.queue),
            {block_hash: list(cached) for block_hash, cached in self.pool.cached.items()},
            [(known, {**vars(known), "blocks": list(known.blocks)}) for known in everyone],
            (list(self.running), list(self.waiting), dict(self.run_begins)),
        )

    def restore_model(self, saved):
        blocks, self.pool.queue, self.pool.cached, sequences, lists = saved
        self.running, self.waiting, self.run_begins = lists
        for thing, fields in (*blocks, *sequences):
            vars(thing).update(fields)

    # --- laws -------------------------------------------------------------------------------------------------------

    @invariant()
    def both_tell_the_same(self):
        if not hasattr(self, "ledger"):
            return
        ledger, queue = self.ledger, self.pool.queue
        everyone = [*self.running, *self.waiting]
        ledger.audit([known.holding for known in everyone])
        assert ledger.num_free == sum(block.hash is None for block in queue)
        assert ledger.num_cached == sum(block.hash is not None for block in queue)
        assert self.next_to_go() == [block.hash for block in queue if block.hash is not None]
        for known in everyone:
            assert known.holding.num_blocks == len(known.blocks)
        for known in self.waiting:
            found = self.pool.find(known.lookup_hashes())
            hit = ledger.lookup(known.holding, known.num_tokens)
            assert ledger.num_cached_blocks(known.holding, known.num_tokens) == hit.num_blocks
            assert hit.num_blocks == len(found)
            assert hit.num_evictable == sum(block.num_references == 0 for block in found)
        for leaving in (self.running, self.running[:1], self.running[1:]):
            self.check_leaving(leaving)

    def check_leaving(self, leaving):
        """What would be free again, and what of it somebody who waits would take right back."""
        held = [block for known in leaving for block in known.blocks]
        given_back = {id(block) for block in held if held.count(block) == block.num_references}
        holdings = [known.holding for known in leaving]
        assert self.ledger.num_freed_by(holdings) == len(given_back)
        for known in self.waiting:
            found = self.pool.find(known.lookup_hashes())
            taken = sum(block.num_references == 0 or id(block) in given_back for block in found)
            hit = self.ledger.lookup(known.holding, known.num_tokens)
            assert self.ledger.num_cached_blocks(known.holding, known.num_tokens) == hit.num_blocks
            expected = needed(known.num_tokens) - len(found) + taken
            assert self.ledger.num_to_take(known.holding, hit, known.num_tokens, holdings) == expected

    def next_to_go(self):
        """Hashes in the order in which the ledger would evict them; a run goes from its end."""
        hashes = []
        for entry in self.ledger._released:
            if isinstance(entry, Run):
                hashes += [(entry.owner, self.run_begins[entry.owner] + i) for i in reversed(range(entry.count))]
            else:
                hashes += [(entry.block_hash, entry.start + i) for i in reversed(range(entry.count))]
        return hashes


TestLedgerRules = LedgerRules.TestCase
TestLedgerRules.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def forget_nothing_published(self, holding, block):
    holding.num_shared -= holding.shared.pop().count


def release_first_block_first(self, holding, num_computed_tokens, *, will_return):
    holding.shared = holding.shared[::-1]
    RELEASE(self, holding, num_computed_tokens, will_return=will_return)


def count_shared_twice(self, leaving):
    return sum(holding.num_blocks for holding in leaving)


LOOKUP, RELEASE = BlockLedger.lookup, BlockLedger.release

PLANTED = {
    "a piece is taken whole where a prefix ends inside it": ("_carve", lambda self, piece, start, count: piece),
    "a block that was taken back stays findable": ("_undo_publish", forget_nothing_published),
    "the first block of a prefix is evicted first": ("release", release_first_block_first),
    "shared blocks are freed by each who shares them": ("num_freed_by", count_shared_twice),
    "rolling back keeps what was admitted": ("_undo_admit", lambda self, holding, shared, num_shared, num_blocks: None),
    "a prompt that is cached in full needs no token": (
        "lookup",
        lambda self, holding, num_tokens: LOOKUP(self, holding, num_tokens + 1),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(monkeypatch, bug):
    method, planted = PLANTED[bug]
    monkeypatch.setattr(BlockLedger, method, planted)
    quick = settings(
        max_examples=300,
        stateful_step_count=30,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    with pytest.raises((LawBroken, AssertionError, KeyError, IndexError, ValueError)):
        run_state_machine_as_test(LedgerRules, settings=quick)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda ledger, holding: setattr(ledger, "num_free", 5), "is not total"),
        (lambda ledger, holding: setattr(holding, "num_blocks", 1), "holds 1 blocks, counts 2 shared and lists 2"),
        (lambda ledger, holding: setattr(ledger, "num_cached", 1), "counted as cached"),
        (lambda ledger, holding: holding.shared[0].holders.add(Holding("x", ())), "2 references, 1 holders"),
        (lambda ledger, holding: ledger._found.update(c=[Piece("c", 0, 1, set())]), "wrong side of the cache"),
    ],
)
def test_the_audit_sees(spoil, message):
    ledger = BlockLedger(10, BLOCK)
    holding = Holding("r", ("a", "b"))
    ledger.admit(holding, ledger.lookup(holding, 9), 9)
    ledger.publish(holding, 9)
    ledger.audit([holding])
    spoil(ledger, holding)
    with pytest.raises(LawBroken, match=f"law 3.*{message}"):
        ledger.audit([holding])


def filled(ledger, name, block_hashes, num_tokens):
    """A sequence with all of its blocks computed, which hits nothing."""
    holding = Holding(name, block_hashes)
    ledger.admit(holding, ledger.lookup(Holding("nobody", ()), 1), num_tokens)
    ledger.publish(holding, num_tokens)
    return holding


def hit_pieces(ledger, block_hash):
    return [piece for piece, _, _ in ledger.lookup(Holding("third", (block_hash,)), 9).shared]


def test_of_equal_blocks_the_oldest_is_hit():
    ledger = BlockLedger(10, BLOCK)
    older, newer = filled(ledger, "older", ("a",), 5), filled(ledger, "newer", ("a",), 5)
    oldest = list(older.shared)
    assert oldest != newer.shared
    assert hit_pieces(ledger, "a") == oldest
    ledger.release(older, 5, will_return=False)
    assert hit_pieces(ledger, "a") == oldest
    filled(ledger, "large", (), 8 * BLOCK)
    assert hit_pieces(ledger, "a") == newer.shared


def test_what_is_left_of_a_piece_keeps_its_turn():
    ledger = BlockLedger(12, BLOCK)
    older = Holding("older", ("a",), 4, 1)
    ledger.admit(older, ledger.lookup(older, 5), 4)
    ledger.publish(older, 4)
    newer, other = Holding("newer", ("a",), 4), filled(ledger, "other", ("c",), 5)
    ledger.admit(newer, ledger.lookup(Holding("nobody", ()), 1), 16)
    ledger.publish(newer, 16)
    ledger.release(newer, 16, will_return=False)
    ledger.release(other, 4, will_return=False)
    third = Holding("third", ("a",), 4)
    hit = ledger.lookup(third, 17)
    assert [(start, count) for _, start, count in hit.shared] == [(0, 1), (1, 3)]
    ledger.admit(third, hit, 16)
    assert (ledger.num_cached, ledger.num_free) == (2, 6)
    large = filled(ledger, "large", (), 7 * BLOCK)
    # What the third did not take of the newer one's piece was released first.
    assert ledger.lookup(Holding("x", ("c",)), 9).num_blocks == 1
    ledger.extend(large, 8 * BLOCK)
    assert ledger.lookup(Holding("x", ("c",)), 9).num_blocks == 0


def test_who_was_released_first_is_evicted_first_and_from_the_end():
    ledger = BlockLedger(5, BLOCK)
    first, second = filled(ledger, "first", ("a", "b"), 9), filled(ledger, "second", ("c",), 5)
    ledger.release(first, 9, will_return=False)
    ledger.release(second, 5, will_return=False)
    assert (ledger.num_free, ledger.num_cached) == (2, 3)
    large = filled(ledger, "large", (), 3 * BLOCK)
    assert [len(ledger.lookup(Holding("x", hashes), 99).shared) for hashes in (("a", "b"), ("c",))] == [1, 1]
    ledger.extend(large, 4 * BLOCK)
    assert [len(ledger.lookup(Holding("x", hashes), 99).shared) for hashes in (("a", "b"), ("c",))] == [0, 1]


def test_a_preempted_sequence_finds_its_own_blocks_and_nobody_else_does():
    ledger = BlockLedger(10, BLOCK)
    holding = filled(ledger, "r", ("a",), 14)
    ledger.release(holding, 14, will_return=True)
    assert ledger.lookup(holding, 15).num_blocks == 3
    assert ledger.lookup(Holding("other", ("a",)), 15).num_blocks == 1
    filled(ledger, "large", (), 8 * BLOCK)
    assert ledger.lookup(holding, 15).num_blocks == 2
