"""The prefix index against one that keeps every block by itself, and its bounds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from tests.machines.hunting import hunt
from tests.unit.dispatch.plain_prefix_index import PlainPrefixIndex, match

from rota.base.errors import LawBroken
from rota.base.instant import Instant
from rota.serving.cluster.prefix_index import PrefixIndex
from rota.serving.cluster.prefix_runs import PrefixRuns
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import Request, RequestId

A, B = InstanceId("a"), InstanceId("b")


def request(*blocks):
    return Request(RequestId("r"), Instant(0), 1 + 16 * len(blocks), 10, block_hashes=blocks)


def chain(*choices):
    """Block hashes chained as an engine does it: equal only where all that came before is equal."""
    return request(*(choices[: length + 1] for length in range(len(choices))))


requests = st.lists(st.integers(0, 1), max_size=8).map(lambda choices: chain(*choices))


def test_matches_the_leading_blocks_of_each_instance():
    index = PrefixIndex()
    index.add_instance(A, 100)
    index.add_instance(B, 100)
    index.record(chain(1, 2, 3, 4), A)
    index.record(chain(1, 2), B)
    assert match(index, chain(1, 2, 3, 9)) == {A: 3, B: 2}
    assert match(index, chain(1, 2, 3, 4)) == {A: 4, B: 2}
    assert match(index, chain(9)) == {}
    assert match(index, request()) == {}
    index.forget_instance(A)
    assert match(index, chain(1, 2, 3, 4)) == {B: 2}
    assert len(index) == 2


def test_where_one_instance_parts_from_a_prompt_is_not_where_another_does():
    sent = {A: chain(1, 1, 1, 1, 1, 2, 2, 2, 2), B: chain(1, 1, 2, 2, 2, 2, 2, 2, 2)}
    asked = chain(1, 1, 1, 1, 1, 1, 1, 1)
    for order in ((A, B), (B, A)):
        index = PrefixIndex()
        for each in order:
            index.add_instance(each, 100)
            index.record(sent[each], each)
        assert match(index, asked) == {A: 5, B: 2}


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    index = PrefixIndex()
    index.add_instance(A, 4)
    index.record(chain(1, 1, 1), A)
    index.record(chain(1, 2, 2), A)
    assert match(index, chain(1, 1, 1)) == {A: 2}, "five blocks in four places: the oldest end went"
    index.record(chain(3, 3, 3, 3, 3, 3), A)
    assert match(index, chain(3, 3, 3, 3, 3, 3)) == {A: 4}, "a prompt longer than the cache keeps its beginning"
    assert match(index, chain(1, 2, 2)) == {}


def test_the_instance_that_holds_most_gives_up_for_the_bound_in_all():
    index = PrefixIndex(max_entries=6)
    index.add_instance(A, 100)
    index.add_instance(B, 100)
    index.record(chain(1, 1, 1, 1), A)
    index.record(chain(2, 2, 2, 2), B)
    index.check()
    assert len(index) == 6
    assert match(index, chain(1, 1, 1, 1)) == {A: 2}
    assert match(index, chain(2, 2, 2, 2)) == {B: 4}


def test_what_was_recorded_since_is_known():
    index = PrefixIndex()
    index.add_instance(A, 100)
    asked = chain(1, 2)
    assert match(index, asked) == {}
    index.record(asked, A)
    assert match(index, asked) == {A: 2}


def test_a_restart_forgets():
    index = PrefixIndex()
    index.add_instance(A, 100)
    index.record(chain(1), A)
    asked = chain(1)
    assert match(index, asked) == {A: 1}
    index.add_instance(A, 100)
    assert match(index, asked) == {}


@st.composite
def prompts(draw):
    """One whose hashes stand for as many tokens as it says, or for a block of the instance. Few choices a block and
    one that is usual, so that many prompts share beginnings of all lengths or are the beginning of another."""
    per_hash = draw(st.sampled_from([None, None, 3, 8]))
    choices = draw(st.lists(st.sampled_from([0, 0, 0, 1]), max_size=12))
    hashes = tuple((per_hash, *choices[: length + 1]) for length in range(len(choices)))
    num_prompt_tokens = max(1, len(choices) * (per_hash or 4) - draw(st.integers(0, 2)))
    return Request(RequestId("r"), Instant(0), num_prompt_tokens, 10, block_hashes=hashes, hash_block_tokens=per_hash)


INSTANCES = st.sampled_from([A, B, InstanceId("c")])


class AgainstAllBlocks(RuleBasedStateMachine):
    """What is held, in which order it is evicted, and what is answered, are those of the plain index."""

    @initialize(max_entries=st.sampled_from([7, 20, 1000]))
    def begin(self, max_entries):
        self.index, self.plain = PrefixIndex(max_entries=max_entries), PlainPrefixIndex(max_entries=max_entries)
        for number, each in enumerate((A, B)):
            self.add(each, 6 + 20 * number, 4)

    @rule(instance_id=INSTANCES, num_blocks=st.integers(0, 30), block_size=st.sampled_from([2, 4, 16]))
    def add(self, instance_id, num_blocks, block_size):
        self.index.add_instance(instance_id, num_blocks, block_size)
        self.plain.add_instance(instance_id, num_blocks, block_size)

    @rule(instance_id=INSTANCES)
    def forget(self, instance_id):
        self.index.forget_instance(instance_id)
        self.plain.forget_instance(instance_id)

    @rule(prompt=prompts(), instance_id=INSTANCES)
    def send(self, prompt, instance_id):
        if instance_id in self.plain.blocks_of:
            self.index.record(prompt, instance_id)
            self.plain.record(prompt, instance_id)
        self.ask(prompt)

    # So it lies there in many slices.
    @rule(prompt=prompts(), instance_id=INSTANCES, data=st.data())
    def send_shorter_and_shorter(self, prompt, instance_id, data):
        hashes = prompt.block_hashes
        for length in sorted(data.draw(st.sets(st.integers(0, len(hashes)), max_size=4)), reverse=True):
            self.send(
                Request(
                    prompt.id,
                    prompt.arrived_at,
                    prompt.num_prompt_tokens,
                    10,
                    block_hashes=hashes[:length],
                    hash_block_tokens=prompt.hash_block_tokens,
                ),
                instance_id,
            )
        self.ask(prompt)

    @rule(prompt=prompts())
    def ask(self, prompt):
        assert match(self.index, prompt) == self.plain.match(prompt)
        assert self.index.num_tokens_anywhere(prompt) == self.plain.num_tokens_anywhere(prompt)
        for each in (A, B, InstanceId("c")):
            assert self.index.num_tokens(prompt, each) == self.plain.num_tokens(prompt, each)

    @invariant()
    def holds_the_same(self):
        if not hasattr(self, "index"):
            return
        self.index.check()
        assert len(self.index) == len(self.plain)
        held = {instance_id: list(runs) for instance_id, runs in self.index._runs_of.items()}
        assert held == {instance_id: list(blocks) for instance_id, blocks in self.plain.blocks_of.items()}


def test_agrees_with_an_index_of_all_blocks():
    run_state_machine_as_test(AgainstAllBlocks, settings=settings(max_examples=60, stateful_step_count=25))


@pytest.mark.slow
def test_agrees_with_an_index_of_all_blocks_for_long():
    run_state_machine_as_test(AgainstAllBlocks, settings=settings(max_examples=250, stateful_step_count=50))


class OldestFirst(PrefixRuns):
    """A bug: who is used again does not become younger."""

    def record(self, hashes, per_hash):
        super().record(hashes, per_hash)
        if self._by_age:
            self._by_age.move_to_end(next(reversed(self._by_age)), last=False)


def test_a_wrong_order_of_eviction_is_found(monkeypatch):
    monkeypatch.setattr("rota.serving.cluster.prefix_index.PrefixRuns", OldestFirst)
    with pytest.raises(AssertionError):
        hunt(AgainstAllBlocks, max_examples=50)


@given(st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=8), st.integers(1, 4)), max_size=40))
def test_hashes_that_are_not_chained_break_nothing(sent):
    index = PrefixIndex(max_entries=25)
    index.add_instance(A, 10, 2)
    for hashes, per_hash in sent:
        one = Request(RequestId("r"), Instant(0), 1000, 10, block_hashes=tuple(hashes), hash_block_tokens=per_hash)
        index.record(one, A)
        index.check()
        assert match(index, one).get(A, 0) <= len(hashes)


def test_a_sliver_does_not_keep_a_long_prompt_alive():
    index = PrefixIndex()
    index.add_instance(A, 10_000)
    for number in range(50):
        shared = tuple((number, place) for place in range(1990))
        index.record(request(*shared, *((number, "end", place) for place in range(10))), A)
        index.record(request(*shared, *((number, "other end", place) for place in range(10))), A)
        index.check()
    kept = sum(len(run.hashes) for run in index._runs_of[A]._by_age)
    assert 10_000 <= kept <= 2 * 10_000


def test_a_sum_that_is_off_is_found():
    index = PrefixIndex()
    index.add_instance(A, 100)
    index.record(chain(1, 2, 3), A)
    index._runs_of[A].num_tokens -= 16
    with pytest.raises(LawBroken, match="law 12"):
        index.check()
