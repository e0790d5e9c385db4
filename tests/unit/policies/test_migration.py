"""Each migration policy does what its rule says, held against a control that does not."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rota.base.errors import ConfigError
from rota.base.instant import Instant, after, seconds
from rota.serving.api import InstanceId, Move, RequestId, SequenceReport
from rota.serving.cluster.machine import ClusterMachine
from rota.serving.model.commands import Migrate
from rota.serving.model.events import (
    FirstTokenSeen,
    InstanceDraining,
    InstanceReported,
    InstanceStarted,
    RequestArrived,
)
from rota.serving.model.instance import InstanceLimits, InstanceReport, InstanceSpec
from rota.serving.model.request import Request
from rota.serving.policies.admission.bounded_queue import BoundedQueue
from rota.serving.policies.dispatch.virtual_usage import VirtualUsage
from rota.serving.policies.freeness import HIGH_LOAD_TARGET, Freeness
from rota.serving.policies.migration import MIGRATION
from rota.serving.policies.migration.balance_load import BalanceLoad
from rota.serving.policies.migration.defragment import Defragment
from rota.serving.policies.migration.drain import Drain
from rota.serving.policies.migration.isolate_class import IsolateClass
from rota.serving.policies.migration.none import NoneMoved
from rota.testing.dispatch import ClusterSample, InstanceSample
from rota.testing.migration import carried_out, clusters_of_movable, settled

NOW = Instant(10**10)
NOBODY = frozenset()
RULE = {"high_priority_max": -1, "high_load_target": HIGH_LOAD_TARGET}


def sequence(name, num_tokens, priority=0):
    return SequenceReport(RequestId(name), num_tokens, -(-num_tokens // 16), priority)


def instance(name, running=(), head=None, num_blocks=1000, **others):
    """An instance in which all who run decode, and at most one waits."""
    waiting = () if head is None else (SequenceReport(RequestId(f"{name}-head"), head, 0, 0),)
    return InstanceSample(
        InstanceId(name),
        len(running) + len(waiting),
        len(running) + (head or 0),
        num_running=len(running),
        num_waiting=len(waiting),
        num_free_blocks=num_blocks - sum(each.num_blocks for each in running),
        num_blocks=num_blocks,
        observed_at=NOW,
        running=tuple(running),
        waiting=waiting,
        **others,
    )


def crowd(prefix, *lengths, priority=0):
    return [sequence(f"{prefix}{number}", length, priority) for number, length in enumerate(lengths)]


def cluster(*instances):
    return ClusterSample(NOW, instances)


def moved(policy, shown, moving=NOBODY):
    return [(move.request_id, move.source, move.destination) for move in policy.plan(shown, moving)]


def freeness(shown):
    return {view.id: Freeness(**RULE).of(view) for view in shown.instances}


some_clusters = clusters_of_movable(num_instances_min=2, all_tell=True, some_move=False).map(lambda shown: shown[0])


# --- balance_load ----------------------------------------------------------------------------------------------------


def pairs_are_nearer(policy, shown):
    """Whether every pair of a round is nearer after it."""
    moves = policy.plan(shown, NOBODY)
    before, later = freeness(shown), freeness(carried_out(shown, moves))
    return all(
        abs(later[move.destination] - later[move.source]) < before[move.destination] - before[move.source]
        for move in moves
    )


class GivesTheShortest(BalanceLoad):
    """The control: the shortest, whatever comes of it."""

    def _relieve(self, planned, source, destination):
        planned.add(planned.movable(source)[0], source, destination, "the shortest")


def without_draining(shown):
    return ClusterSample(shown.now, tuple(replace(view, is_draining=False) for view in shown.instances))


@settings(deadline=None)
@given(some_clusters.map(without_draining), st.integers(1, 4))
def test_balance_load_never_raises_the_difference_of_a_pair(shown, max_migrations):
    assert pairs_are_nearer(BalanceLoad(max_migrations=max_migrations), shown)


def test_and_its_control_does():
    owing = instance("a", crowd("a", 16, 1500), head=1600, num_blocks=100)
    shown = cluster(owing, instance("b", crowd("b", *[100] * 10)))
    assert not pairs_are_nearer(GivesTheShortest(), shown), "what is owed is shared by fewer"
    assert moved(BalanceLoad(), shown) == [("a1", "a", "b")]


@settings(deadline=None)
@given(some_clusters)
def test_balance_load_makes_no_new_source(shown):
    later = freeness(carried_out(shown, moves := BalanceLoad().plan(shown, NOBODY)))
    assert all(later[move.destination] > 48.0 for move in moves if "drains" not in move.reason)


def test_balance_load_pairs_the_lowest_with_the_highest():
    shown = cluster(
        instance("a", crowd("a", 7980, 7980)),
        instance("b", crowd("b", 8000, 7950)),
        instance("c", crowd("c", 1000)),
        instance("d", crowd("d", 2000)),
        instance("e", crowd("e", 8000, 7000)),
    )
    assert [(source, destination) for _, source, destination in moved(BalanceLoad(), shown)] == [("a", "c"), ("b", "d")]


def test_balance_load_gives_the_lowest_class_first_then_the_shortest():
    low, high = crowd("low", 3000, 900, priority=1), crowd("mid", 500, 4000, priority=0)
    full = instance("a", [*high, *low, sequence("top", 7500, 0)])
    assert moved(BalanceLoad(), cluster(full, instance("b"))) == [("low1", "a", "b")]
    full = instance("a", [*high, sequence("top", 11_400, 0)])
    assert moved(BalanceLoad(), cluster(full, instance("b"))) == [("mid0", "a", "b")]


def test_balance_load_goes_on_until_the_source_is_none_any_more():
    full = instance("a", crowd("a", *[400] * 40))
    moves = moved(BalanceLoad(max_migrations=50), cluster(full, instance("b")))
    later = carried_out(
        cluster(full, instance("b")), BalanceLoad(max_migrations=50).plan(cluster(full, instance("b")), NOBODY)
    )
    assert freeness(later)["a"] >= 48.0
    assert freeness(carried_out(cluster(full, instance("b")), [Move(*each, "") for each in moves[:-1]]))["a"] < 48.0


def test_balance_load_relieves_a_queue_whose_head_does_not_fit():
    shown = [instance("a", crowd("a", 4000, 4000, 4000), head=5000), instance("b")]
    assert moved(BalanceLoad(), cluster(*shown)) == [("a0", "a", "b")]
    assert not moved(BalanceLoad(), cluster(instance("a", crowd("a", 4000, 4000, 4000)), shown[1]))


# --- defragment ------------------------------------------------------------------------------------------------------


def blocked(view):
    """Whether somebody heads the queue of a ready instance and cannot start."""
    if view.is_draining or not view.waiting or not view.running:
        return False
    return -(-view.waiting[0].num_tokens // view.block_size) > view.num_free_blocks or (
        len(view.running) >= view.max_num_seqs
    )


def heads_that_fit_after(policy, shown):
    """For each instance that gave for its head, whether that can start now."""
    moves = [move for move in policy.plan(shown, NOBODY) if "drains" not in move.reason]
    before = {view.id: blocked(view) for view in shown.instances}
    later = {view.id: blocked(view) for view in carried_out(shown, moves).instances}
    assert all(before[move.source] for move in moves), "moved without need"
    return [not later[source] for source in dict.fromkeys(move.source for move in moves)]


class ShortestAlways(Defragment):
    """The control: one who runs leaves, whatever is lacking."""

    def plan(self, shown, moving):
        for view, other in itertools.permutations(shown.instances, 2):
            if blocked(view):
                return [Move(view.running[0].request_id, view.id, other.id, "makes some room")]
        return []


@settings(deadline=None)
@given(some_clusters, st.integers(1, 4))
def test_defragment_makes_each_head_fit_that_it_moves_for(shown, max_migrations):
    assert all(heads_that_fit_after(Defragment(max_migrations=max_migrations), shown))


FULL = instance("a", crowd("a", 1600, 3200, 6400, 4000), head=3000)


def test_defragment_moves_the_fewest_tokens_that_will_do():
    assert moved(Defragment(), cluster(FULL, instance("b"))) == [("a1", "a", "b")]
    assert heads_that_fit_after(Defragment(), cluster(FULL, instance("b"))) == [True]
    assert heads_that_fit_after(ShortestAlways(), cluster(FULL, instance("b"))) == [False], "the control does not"


def test_defragment_moves_several_if_one_will_not_do_each_to_a_place_of_its_own():
    full = instance("a", crowd("a", 1600, 3200, 6400, 4000), head=8500)
    others = [instance(name, crowd(name, 9000)) for name in "bc"]
    assert sorted(moved(Defragment(), cluster(full, *others))) == [("a0", "a", "c"), ("a2", "a", "b")]
    assert not moved(Defragment(), cluster(full, *others[:1])), "all or nobody"
    assert not moved(Defragment(max_migrations=1), cluster(full, *others))


def test_defragment_frees_a_slot_where_only_that_lacks():
    full = instance("a", crowd("a", 300, 200), head=100, max_num_seqs=2)
    assert moved(Defragment(), cluster(full, instance("b"))) == [("a1", "a", "b")]
    assert not moved(Defragment(), cluster(full, instance("b", crowd("b", 9, 9), max_num_seqs=2)))


def test_defragment_waits_for_moves_under_way():
    assert not moved(Defragment(), cluster(replace(FULL, num_migrations=1), instance("b")), frozenset({"a0"}))


# --- isolate_class ---------------------------------------------------------------------------------------------------


def high_class_that_moved(policy, shown):
    priorities = {each.request_id: each.priority for view in shown.instances for each in view.running}
    return [
        move.request_id
        for move in policy.plan(shown, NOBODY)
        if "drains" not in move.reason and priorities[move.request_id] < 0
    ]


@settings(deadline=None)
@given(some_clusters)
def test_isolate_class_never_moves_the_high_class_and_never_to_it(shown):
    policy = IsolateClass(max_migrations=3)
    assert not high_class_that_moved(policy, shown)
    high = {view.id for view in shown.instances if any(each.priority < 0 for each in view.running)}
    moves = IsolateClass(max_migrations=3).plan(shown, NOBODY)
    highest = {each.request_id for view in shown.instances for each in view.running if each.priority < 0}
    high |= {move.destination for move in moves if move.request_id in highest}  # Off an instance that drains.
    moves = [move for move in moves if "drains" not in move.reason]
    assert all(move.source in high and move.destination not in high for move in moves)


def test_isolate_class_brings_the_load_beside_the_high_class_to_the_target():
    beside = instance("a", [sequence("high", 500, -1), *crowd("low", 900, 700, 2000, 2500)])
    policy, others = IsolateClass(), [instance("b"), instance("c", [sequence("other", 1000, -1)])]
    assert moved(policy, cluster(beside, *others)) == [("low1", "a", "b")], "the shortest, to where no high one runs"
    later = settled(IsolateClass(), cluster(beside, *others))
    assert [each.request_id for each in later.instances[0].running] == ["high"]
    assert freeness(later)["a"] > 0.0
    assert freeness(settled(NoneMoved(), cluster(beside, *others)))["a"] < 0.0, "the control leaves it crowded"
    assert high_class_that_moved(
        BalanceLoad(), cluster(instance("a", crowd("h", 900, 15_000, priority=-1)), instance("b"))
    )


def test_isolate_class_leaves_alone_what_is_loaded_up_to_the_target():
    assert not moved(
        IsolateClass(), cluster(instance("a", [sequence("high", 500, -1), *crowd("low", 900)]), instance("b"))
    )
    assert not moved(IsolateClass(), cluster(instance("a", crowd("low", 9000)), instance("b")))


# --- drain -----------------------------------------------------------------------------------------------------------

DRAINING = instance("a", crowd("a", 500, 300, 4000), is_draining=True)


@pytest.mark.parametrize("name", sorted(set(MIGRATION.table) - {"none"}))
def test_every_policy_empties_what_drains(name):
    shown = cluster(DRAINING, instance("b", crowd("b", 9000)), instance("c", crowd("c", 12_000)))
    later = settled(MIGRATION.create(name), shown)
    assert not later.instances[0].running
    assert settled(NoneMoved(), shown).instances[0].running, "the control does not"


@settings(deadline=None)
@given(some_clusters)
def test_drain_leaves_only_those_for_whom_nobody_has_room(shown):
    later = settled(Drain(max_migrations=4), shown)
    ready = [view for view in later.instances if not view.is_draining]
    rule = Freeness(**RULE)
    for view in later.instances:
        for each in view.running if view.is_draining else ():
            if each.num_blocks * view.block_size >= each.num_tokens - 1:
                assert all(
                    rule.load(other).num_free_tokens < each.num_tokens + other.block_size
                    or rule.load(other).num_requests >= other.max_num_seqs
                    for other in ready
                )


def test_drain_moves_nobody_else():
    assert not moved(Drain(), cluster(instance("a", crowd("a", 8000, 7999)), instance("b")))


# --- late reports ----------------------------------------------------------------------------------------------------


def destinations_of_rounds(policies, num_rounds=6):
    """Where those on a draining instance go in rounds of 50 ms, when nobody reports and each move comes off at once."""
    shown = [instance("a", crowd("a", *[1000] * num_rounds), is_draining=True)]
    shown += [
        instance("b", crowd("b", 900, 100)),
        instance("c", crowd("c", 1000, 100)),
        instance("d", crowd("d", 1200)),
    ]
    found = []
    for number, policy in zip(range(num_rounds), policies, strict=False):
        (move,) = policy.plan(ClusterSample(after(NOW, number * seconds(0.05)), tuple(shown)), NOBODY)
        shown[0] = replace(
            shown[0], running=tuple(each for each in shown[0].running if each.request_id != move.request_id)
        )
        found.append(move.destination)
    return found


def test_moves_do_not_herd_on_one_instance_between_two_reports():
    assert len(set(destinations_of_rounds(itertools.repeat(Drain())))) == 3
    assert len(set(destinations_of_rounds(iter(Drain, None)))) == 1, "the control remembers nothing"


def test_a_request_whose_move_came_to_nothing_is_left_alone_for_a_while():
    policy = Drain()
    views = (DRAINING, instance("b"))
    asked = []
    for milliseconds in (0, 50, 100, 150, 6000):
        moves = policy.plan(ClusterSample(after(NOW, seconds(milliseconds / 1000)), views), NOBODY)
        asked.append([move.request_id for move in moves])
    assert asked == [["a1"], ["a0"], ["a2"], [], ["a1"]]


def test_what_is_remembered_goes_when_reports_come():
    policy = Drain()
    views = [DRAINING, instance("b")]
    (move,) = policy.plan(ClusterSample(NOW, tuple(views)), NOBODY)
    moving = frozenset({move.request_id})
    at = after(NOW, seconds(1))
    policy.plan(ClusterSample(at, (replace(views[0], num_migrations=1), replace(views[1], num_migrations=1))), moving)
    assert policy._rounds._sent
    gone = replace(DRAINING, running=tuple(each for each in DRAINING.running if each.request_id not in moving))
    reported = replace(views[1], observed_at=after(at, 1), num_blocks=1)
    policy.plan(ClusterSample(after(at, seconds(1)), (gone, reported)), NOBODY)
    assert not policy._rounds._sent


# --- in the router's machine -----------------------------------------------------------------------------------------


def test_the_router_carries_out_what_a_policy_wants():
    machine = ClusterMachine(VirtualUsage(), BoundedQueue(), migration=Drain())
    a, b = InstanceId("a"), InstanceId("b")
    machine.handle(InstanceStarted(InstanceSpec(a, InstanceLimits(num_blocks=1000))), NOW)
    machine.handle(RequestArrived(Request(RequestId("r"), NOW, 100, 10)), NOW)
    machine.handle(FirstTokenSeen(RequestId("r"), a), NOW)
    machine.handle(InstanceStarted(InstanceSpec(b, InstanceLimits(num_blocks=1000))), NOW)
    report = InstanceReport(a, NOW, 1, 0, 993, 1000, running=(sequence("r", 101),))
    machine.handle(InstanceReported(report), NOW)
    commands = list(machine.handle(InstanceDraining(a), NOW))
    for _ in range(3):
        deadline = machine.next_deadline()
        assert deadline is not None
        commands += machine.expire(deadline)
    (migrate,) = [command for command in commands if isinstance(command, Migrate)]
    assert (migrate.request_id, migrate.source, migrate.destination) == ("r", a, b)
    assert "drains" in migrate.reason
    machine.check()


@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("balance_load", {"source_below": 100.0}, "source_below"),
        ("balance_load", {"interval_seconds": 0.0}, "interval_seconds"),
        ("balance_load", {"max_pairs": 0}, "max_pairs"),
        ("defragment", {"max_heads": 0}, "max_heads"),
        ("drain", {"max_migrations": 0}, "max_migrations"),
        ("isolate_class", {"high_load_target": 2.0}, "high_load_target"),
        ("defragment", {"max_moves": 2}, "max_moves"),
    ],
)
def test_bad_parameters_are_named(name, parameters, says):
    with pytest.raises(ConfigError, match=says):
        MIGRATION.create(name, parameters)
