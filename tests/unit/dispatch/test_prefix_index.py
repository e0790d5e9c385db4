"""The prefix index against a list of what each instance would hold, and its bounds."""

from hypothesis import given
from hypothesis import strategies as st

from rota.base.instant import Instant
from rota.serving.cluster.prefix_index import PrefixIndex
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
    assert index.match(chain(1, 2, 3, 9)) == {A: 3, B: 2}
    assert index.match(chain(1, 2, 3, 4)) == {A: 4, B: 2}
    assert index.match(chain(9)) == {}
    assert index.match(request()) == {}
    index.forget_instance(A)
    assert index.match(chain(1, 2, 3, 4)) == {B: 2}
    assert len(index) == 2


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    index = PrefixIndex()
    index.add_instance(A, 4)
    index.record(chain(1, 1, 1), A)
    index.record(chain(1, 2, 2), A)
    assert index.match(chain(1, 1, 1)) == {A: 2}, "five blocks in four places: the oldest end went"
    index.record(chain(3, 3, 3, 3, 3, 3), A)
    assert index.match(chain(3, 3, 3, 3, 3, 3)) == {A: 4}, "a prompt longer than the cache keeps its beginning"
    assert index.match(chain(1, 2, 2)) == {}


def test_the_instance_that_holds_most_gives_up_for_the_bound_in_all():
    index = PrefixIndex(max_entries=6)
    index.add_instance(A, 100)
    index.add_instance(B, 100)
    index.record(chain(1, 1, 1, 1), A)
    index.record(chain(2, 2, 2, 2), B)
    index.check()
    assert len(index) == 6
    assert index.match(chain(1, 1, 1, 1)) == {A: 2}
    assert index.match(chain(2, 2, 2, 2)) == {B: 4}


def test_what_was_recorded_since_is_known():
    index = PrefixIndex()
    index.add_instance(A, 100)
    asked = chain(1, 2)
    assert index.match(asked) == {}
    index.record(asked, A)
    assert index.match(asked) == {A: 2}


def test_a_restart_forgets():
    index = PrefixIndex()
    index.add_instance(A, 100)
    index.record(chain(1), A)
    asked = chain(1)
    assert index.match(asked) == {A: 1}
    index.add_instance(A, 100)
    assert index.match(asked) == {}


class PlainCache:
    """One instance's blocks in a list, oldest first."""

    def __init__(self, num_blocks):
        self.num_blocks = num_blocks
        self.blocks = []

    def record(self, hashes):
        for block in reversed(hashes[: self.num_blocks]):
            if block in self.blocks:
                self.blocks.remove(block)
            self.blocks.append(block)
        self.blocks = self.blocks[-self.num_blocks :]

    def match(self, hashes):
        count = 0
        while count < len(hashes) and hashes[count] in self.blocks:
            count += 1
        return count


@given(st.lists(st.tuples(requests, st.sampled_from([A, B])), max_size=40), requests, st.integers(1, 12))
def test_agrees_with_a_plain_list(sent, asked, num_blocks):
    index = PrefixIndex()
    plain = {A: PlainCache(num_blocks), B: PlainCache(num_blocks + 3)}
    for instance_id, cache in plain.items():
        index.add_instance(instance_id, cache.num_blocks)
    for one, instance_id in sent:
        index.record(one, instance_id)
        plain[instance_id].record(one.block_hashes)
        for question in (asked, one):
            expected = {each: cache.match(question.block_hashes) for each, cache in plain.items()}
            assert index.match(question) == {each: count for each, count in expected.items() if count}
    index.check()
    assert len(index) == sum(len(cache.blocks) for cache in plain.values())


@given(st.lists(st.tuples(requests, st.sampled_from([A, B])), max_size=40), st.integers(1, 12))
def test_never_holds_more_than_it_may_and_keeps_leading_runs(sent, max_entries):
    index = PrefixIndex(max_entries=max_entries)
    index.add_instance(A, 100)
    index.add_instance(B, 5)
    for one, instance_id in sent:
        index.record(one, instance_id)
        index.check()
        hashes = one.block_hashes
        held = [hashes[: length + 1][-1] in index._blocks_of[instance_id] for length in range(len(hashes))]
        assert held == sorted(held, reverse=True)
