"""The planner against every plan that there is, on clusters small enough to try them all, and against its greedy
bound."""

import itertools
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rota.base.errors import ConfigError
from rota.base.instant import Instant
from rota.serving.api import InstanceId, RequestId, SequenceReport
from rota.serving.policies.migration import MIGRATION
from rota.serving.policies.migration.defragment import Defragment
from rota.serving.policies.migration.defragment_plan import DefragmentPlan
from rota.serving.policies.migration.plan_search import PlanSearch
from rota.serving.policies.migration.queue_heads import blocked_heads
from rota.serving.policies.migration.rounds import Rounds
from rota.testing.dispatch import ClusterSample, InstanceSample
from rota.testing.migration import clusters_of_movable

NOW = Instant(10**10)
NOBODY = frozenset()
ABOVE = 48.0
EVERYTHING = {"max_heads": 9, "max_candidates": 9, "max_destinations": 9, "search_limit": 1.0}
THE_PROGRAM = EVERYTHING | {"max_looks": 1}


def instance(name, lengths, head=None, num_blocks=1000):
    running = tuple(
        SequenceReport(RequestId(f"{name}{n}"), length, -(-length // 16)) for n, length in enumerate(lengths)
    )
    waiting = () if head is None else (SequenceReport(RequestId(f"{name}-head"), head, 0),)
    return InstanceSample(
        InstanceId(name),
        len(running) + len(waiting),
        len(running) + (head or 0),
        num_running=len(running),
        num_waiting=len(waiting),
        num_free_blocks=num_blocks - sum(each.num_blocks for each in running),
        num_blocks=num_blocks,
        observed_at=NOW,
        running=running,
        waiting=waiting,
    )


def worth(moves, shown):
    """Heads helped, then the fewest tokens, in whole blocks of their destinations."""
    views = {view.id: view for view in shown.instances}
    lengths = {each.request_id: each.num_tokens for view in shown.instances for each in view.running}
    num_tokens = 0
    for move in moves:
        block_size = views[move.destination].block_size
        num_tokens += -(-lengths[move.request_id] // block_size) * block_size
    return len({move.source for move in moves}), -num_tokens


def best_of_all(shown, max_migrations):
    """The worth of the best plan, found by trying all; None where there are too many."""
    opened = Rounds(max_migrations=max_migrations).open(shown, NOBODY)
    heads = blocked_heads(opened)
    going = [(head, each) for head in heads for each in opened.movable(head.source)]
    blocked = {head.source.id for head in heads}  # Nobody fits there.
    places = [view for view in shown.instances if opened.may_receive(view) and view.id not in blocked]
    if (len(places) + 1) ** len(going) > 5000:
        return None
    best = (0, 0)
    for choice in itertools.product([None, *places], repeat=len(going)):
        plan = [(head, each, place) for (head, each), place in zip(going, choice, strict=True) if place is not None]
        if is_possible(plan, opened, max_migrations):
            tokens = sum(-(-each.num_tokens // place.block_size) * place.block_size for _, each, place in plan)
            best = max(best, (len({head.source.id for head, _, _ in plan}), -tokens))
    return best


def is_possible(plan, opened, max_migrations):
    for source in {head.source.id for head, _, _ in plan}:
        leaving = [(head, each) for head, each, _ in plan if head.source.id == source]
        if (
            len(leaving) > max_migrations
            or sum(each.num_blocks for _, each in leaving) < leaving[0][0].num_blocks_lacking
        ):
            return False
    for place in {id(place): place for _, _, place in plan}.values():
        load = opened.loads[place.id]
        coming = [(head, each) for head, each, there in plan if there is place]
        for head, each in coming:
            is_high = opened.is_high(each)
            if head.source is place or (is_high and not opened.loads[place.id].num_high):
                return False
            load = load.with_request(-(-each.num_tokens // place.block_size) * place.block_size, is_high=is_high)
        if len(coming) > max_migrations or load.num_requests > place.max_num_seqs or load.freeness <= ABOVE:
            return False
    return True


def ready(shown):
    """The clusters of the suite without draining, and everybody of one class but the high."""
    views = []
    for view in shown[0].instances:
        running = tuple(SequenceReport(each.request_id, each.num_tokens, each.num_blocks) for each in view.running)
        views.append(replace(view, is_draining=False, running=running))
    return ClusterSample(shown[0].now, tuple(views))


small_clusters = clusters_of_movable(num_instances_min=2, num_instances_max=3, all_tell=True, some_move=False).map(
    ready
)


@settings(max_examples=80, deadline=None)
@given(small_clusters)
def test_no_plan_is_better(shown):
    best = best_of_all(shown, 2)
    if best is not None:
        for limits in (EVERYTHING, THE_PROGRAM):
            assert worth(DefragmentPlan(max_migrations=2, **limits).plan(shown, NOBODY), shown) == best


@settings(max_examples=60, deadline=None)
@given(clusters_of_movable(num_instances_min=2, all_tell=True, some_move=False).map(ready))
def test_never_worse_than_one_head_at_a_time(shown):
    greedy = worth(Defragment().plan(shown, NOBODY), shown)
    assert worth(DefragmentPlan().plan(shown, NOBODY), shown) >= greedy
    assert worth(DefragmentPlan(max_looks=1).plan(shown, NOBODY), shown) >= greedy
    assert worth(DefragmentPlan(max_looks=1, search_limit=1e-9).plan(shown, NOBODY), shown) >= greedy


def full(name, blocks, num_lacking):
    """An instance without a free block, whose head lacks so many."""
    return instance(name, [each * 16 for each in blocks], head=num_lacking * 16, num_blocks=sum(blocks))


def nearly_full(name, num_spare):
    return instance(name, [1600], num_blocks=100 + num_spare)


room = st.integers(25, 100)


@st.composite
def contended_clusters(draw):
    """Three heads whose neighbours compete for two places that have room for some of them."""
    blocks, lacking = st.lists(st.integers(5, 60), min_size=2, max_size=2), st.integers(4, 60)
    sources = [full(f"s{number}", draw(blocks), draw(lacking)) for number in range(3)]
    return ClusterSample(NOW, (nearly_full("d0", draw(room)), nearly_full("d1", draw(room)), *sources))


@settings(max_examples=120, deadline=None)
@given(contended_clusters())
def test_no_plan_is_better_where_heads_compete(shown):
    best = best_of_all(shown, 2)
    found = searched(shown, 10**6)
    assert found.is_best and worth_of(found) == best


def test_the_cheapest_head_is_passed_over_where_two_others_can_be_helped_in_its_place():
    places = nearly_full("d0", 49), nearly_full("d1", 49)
    heads = full("s0", [20, 20], 40), full("s1", [42, 200], 42), full("s2", [42, 200], 42)
    shown = ClusterSample(NOW, (*places, *heads))
    assert {move.source for move in Defragment().plan(shown, NOBODY)} == {"s0"}, "the control"
    assert {move.source for move in DefragmentPlan().plan(shown, NOBODY)} == {"s1", "s2"}


def searched(shown, max_looks):
    opened = Rounds(max_migrations=2).open(shown, NOBODY)
    search = PlanSearch(opened, list(opened.freest()), ABOVE, max_looks)
    for head in blocked_heads(opened):
        search.help(head, opened.movable(head.source))
    return search.better_than(0, 0)


@settings(max_examples=80, deadline=None)
@given(small_clusters)
def test_a_plan_that_is_proved_the_best_is(shown):
    best = best_of_all(shown, 2)
    found = searched(shown, 10**6)
    if best is not None and found.is_best:
        assert worth_of(found) == best


@settings(max_examples=40, deadline=None)
@given(clusters_of_movable(num_instances_min=2, all_tell=True, some_move=False).map(ready))
def test_more_looks_never_make_a_plan_worse(shown):
    found = [searched(shown, max_looks) for max_looks in (1, 10, 100, 10_000)]
    worths = [worth_of(each) for each in found]
    assert worths == sorted(worths)
    proved = [worth for worth, each in zip(worths, found, strict=True) if each.is_best]
    assert all(worth == worths[-1] for worth in proved)


@settings(max_examples=30, deadline=None)
@given(clusters_of_movable(num_instances_min=2, all_tell=True, some_move=False).map(ready))
def test_the_search_is_as_good_as_the_whole_program(shown):
    by_search = worth(DefragmentPlan(max_looks=10**5).plan(shown, NOBODY), shown)
    assert by_search >= worth(DefragmentPlan(max_looks=1, search_limit=1.0).plan(shown, NOBODY), shown)


def worth_of(found):
    num_tokens = 0
    for each in found.moves:
        num_tokens += -(-each.sequence.num_tokens // each.destination.block_size) * each.destination.block_size
    return len({each.head.source.id for each in found.moves}), -num_tokens


CROWDED = ClusterSample(
    NOW,
    (
        # Each lacks about 3,000 tokens. Served one by one, the first takes the only place that would do for the second.
        instance("a", [3100, 12_500], head=3300),
        instance("b", [6000, 9800], head=3500),
        instance("c", [9800]),
        instance("d", [12_700]),
    ),
)


def test_helps_more_heads_than_one_at_a_time():
    assert worth(Defragment().plan(CROWDED, NOBODY), CROWDED)[0] == 1, "the control"
    plan = DefragmentPlan().plan(CROWDED, NOBODY)
    assert {(move.request_id, move.destination) for move in plan} == {("a0", "d"), ("b0", "c")}
    assert all("in a plan for 2 heads" in move.reason for move in plan)


def test_the_same_views_give_the_same_moves_also_when_the_search_is_cut_short():
    for limits in ({"max_looks": 3}, {"max_looks": 1, "search_limit": 1e-9}, {"max_looks": 1, "search_limit": 0.1}):
        plans = [DefragmentPlan(**limits).plan(CROWDED, NOBODY) for _ in range(5)]
        assert all(plan == plans[0] for plan in plans)


def test_without_the_solver_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ortools.sat.python.cp_model", None)
    with pytest.raises(ConfigError, match="OR-Tools") as caught:
        MIGRATION.create("defragment_plan", {"search_limit": 0.02})
    assert "rota[planner]" in caught.value.hint


@pytest.mark.parametrize("name", ["max_heads", "max_candidates", "max_destinations", "max_looks"])
def test_limits_are_above_zero(name):
    with pytest.raises(ConfigError, match=name):
        MIGRATION.create("defragment_plan", {name: 0})


def test_the_solver_has_no_negative_limit():
    with pytest.raises(ConfigError, match="search_limit"):
        MIGRATION.create("defragment_plan", {"search_limit": -1.0})


def test_without_a_limit_for_it_the_solver_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ortools.sat.python.cp_model", None)
    assert len(DefragmentPlan().plan(CROWDED, NOBODY)) == 2
