"""Virtual usage: the arithmetic of freeness, and the dispatch policy that goes by it."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rota.base.errors import ConfigError
from rota.base.instant import Instant
from rota.serving.api import InstanceId, Request, RequestId, SequenceReport
from rota.serving.cluster.machine import ClusterMachine
from rota.serving.model.events import InstanceReported, InstanceStarted, RequestArrived
from rota.serving.model.instance import InstanceLimits, InstanceReport, InstanceSpec
from rota.serving.policies.admission.bounded_queue import BoundedQueue
from rota.serving.policies.dispatch import DISPATCH
from rota.serving.policies.dispatch.virtual_usage import VirtualUsage
from rota.serving.policies.freeness import HIGH_LOAD_TARGET, Freeness
from rota.testing.dispatch import ClusterSample, InstanceSample, check_dispatch_policy, instances_that_tell

NOW = Instant(5)
REQUEST = Request(RequestId("r"), Instant(0), 160, 10)


def sequence(name, num_tokens, priority=0, num_blocks=None):
    return SequenceReport(
        RequestId(name), num_tokens, -(-num_tokens // 16) if num_blocks is None else num_blocks, priority
    )


def telling(name, running=(), waiting=(), num_unknown=0, num_unknown_tokens=0, num_blocks=1000, **others):
    """An instance whose numbers fit those who run, all decoding, and those who wait."""
    return InstanceSample(
        InstanceId(name),
        len(running) + len(waiting) + num_unknown,
        len(running) + sum(each.num_tokens for each in waiting) + num_unknown_tokens,
        num_running=len(running),
        num_waiting=len(waiting),
        num_blocks=num_blocks,
        num_free_blocks=num_blocks - sum(each.num_blocks for each in running),
        observed_at=NOW,
        running=tuple(running),
        waiting=tuple(as_waiting(each) for each in waiting),
        **others,
    )


def as_waiting(each):
    return SequenceReport(each.request_id, each.num_tokens, 0, each.priority)


def freeness(**parameters):
    return Freeness(**({"high_priority_max": -1, "high_load_target": HIGH_LOAD_TARGET} | parameters))


A, B, C = (sequence(name, 160) for name in "abc")
HIGH = sequence("h", 160, priority=-1)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (telling("i"), 16_000),
        (telling("i", [A, B]), (16_000 - 320) / 2),
        (telling("i", [A], [B]), (16_000 - 320) / 2),
        (telling("i", [A], [B, C, C]), (16_000 - 320) / 2),
        (telling("i", [A], num_unknown=2, num_unknown_tokens=500), (16_000 - 160 - 500) / 3),
        (telling("i", [A], [B], num_unknown=1, num_unknown_tokens=500), (16_000 - 320 - 500) / 3),
        (telling("i", [A, HIGH]), (16_000 - 320 - 14_119) / 2),
        (telling("i", [HIGH, HIGH]), (16_000 - 320 - 14_119) / 2),
        (telling("i", [A], is_draining=True), -math.inf),
        (telling("i", [sequence("p", 1600, num_blocks=10)]), 14_400),
        (telling("i", [A], [sequence("w", 32_000)]), (16_000 - 32_160) / 2),
        (InstanceSample(InstanceId("i"), 4, 900, num_running=3, num_free_blocks=250), (4_000 - 900) / 4),
        (InstanceSample(InstanceId("i"), 4, 900), (16_000 - 900) / 4),
        (InstanceSample(InstanceId("i"), 0, 0, num_running=3, num_free_blocks=250), 16_000),
    ],
    ids=[
        "idle",
        "those who run: what they hold",
        "the head of the queue: its demand",
        "others who wait: nothing",
        "dispatched since the report: their prompts",
        "dispatched since, behind a queue",
        "headroom beside the high class",
        "headroom once, shared by the high class",
        "draining: infinite usage",
        "in prefill: what it will hold",
        "owed more than there is",
        "does not tell: its blocks and its prompts",
        "no report: its prompts",
        "does not tell, and all ended since",
    ],
)
def test_freeness_by_hand(shown, expected):
    assert freeness().of(shown) == pytest.approx(expected)


def test_the_whole_queue_counts_if_asked_for_and_those_untold_as_the_told():
    shown = replace(telling("i", [A], [B, C]), num_waiting=4, num_outstanding_requests=5, num_outstanding_tokens=641)
    assert freeness(whole_queue=True).of(shown) == (16_000 - 5 * 160) / 5
    assert freeness().of(shown) == (16_000 - 320) / 2, "those untold are not taken for dispatched since"


@settings(deadline=None)
@given(instances_that_tell(), st.integers(1, 3000), st.integers(-2, 2))
def test_one_more_never_makes_it_freer_and_taking_it_off_restores(shown, num_tokens, priority):
    """But for what is owed: more requests share it."""
    rule = freeness()
    load = rule.load(shown)
    more = load.with_request(num_tokens, is_high=priority < 0)
    assert more.num_free_tokens < load.num_free_tokens
    assert more.freeness < load.freeness or load.freeness < 0 or load.num_requests == 0
    assert more.without_request(num_tokens, is_high=priority < 0) == load


@settings(deadline=None)
@given(instances_that_tell())
def test_what_is_remembered_is_what_would_be_read(shown):
    rule = freeness()
    for seen in (shown, shown, replace(shown, is_draining=True), replace(shown, running=(), num_outstanding_tokens=9)):
        assert rule.load(seen) == freeness().load(seen)
        assert rule.of(seen) == freeness().of(seen)


def test_goes_where_the_batch_can_grow_longest_and_says_so():
    one_long, many_short = telling("a", [sequence("l", 4000)]), telling("b", [sequence(str(n), 100) for n in range(30)])
    pick = VirtualUsage().pick(REQUEST, ClusterSample(NOW, (one_long, many_short)))
    assert pick.instance_id == "a", "fewer tokens are used at b, but each step takes thirty"
    assert "freeness" in pick.reason
    assert "12,000 steps" in pick.reason
    scores = dict(pick.scores)
    assert 0.5 < scores["b"] < scores["a"] < 1.0


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        (telling("a", [A], [sequence("w", 12_000)]), telling("b", [A, B, C])),
        (telling("a", [HIGH]), telling("b", [A, B, C])),
        (telling("a", is_draining=True), telling("b", [A, sequence("x", 14_000)])),
        (telling("a", [A], num_unknown=9, num_unknown_tokens=9000), telling("b", [A, B, C])),
    ],
    ids=["a blocked head", "the high class runs", "drains", "much in flight"],
)
def test_stays_away_from(worse, better):
    assert VirtualUsage().pick(REQUEST, ClusterSample(NOW, (worse, better))).instance_id == "b"
    # The control: without what makes it worse, the first by id is taken.
    plain = replace(better, id=worse.id)
    assert VirtualUsage().pick(REQUEST, ClusterSample(NOW, (plain, better))).instance_id == "a"


def machine_with(policy, num_instances):
    machine = ClusterMachine(policy, BoundedQueue())
    for number in range(num_instances):
        limits = InstanceLimits(num_blocks=1000)
        machine.handle(InstanceStarted(InstanceSpec(InstanceId(f"i{number:04}"), limits)), NOW)
    return machine


def arrive(machine, number, num_prompt_tokens=160):
    request = Request(RequestId(f"r{number}"), NOW, num_prompt_tokens, 10)
    return machine.handle(RequestArrived(request), NOW)[0].instance_id


@pytest.mark.parametrize("num_instances", [3, 300])
def test_a_burst_between_two_reports_does_not_herd(num_instances):
    machine = machine_with(VirtualUsage(), num_instances)
    for instance_id in machine.instance_states():
        machine.handle(InstanceReported(InstanceReport(instance_id, NOW, 0, 0, 1000, 1000)), NOW)
    picks = [arrive(machine, number) for number in range(2 * num_instances)]
    assert max(picks.count(instance_id) for instance_id in set(picks)) <= 3, "one more than fair, at most"


def test_one_that_became_free_in_a_large_fleet_is_found_in_a_few_decisions():
    num_instances, num_examined = 500, 100
    fleet = [telling(f"i{number:04}", [A, B]) for number in range(num_instances)]
    policy = VirtualUsage(num_examined=num_examined)
    assert policy.pick(REQUEST, ClusterSample(NOW, fleet)).instance_id == "i0000", "all are looked at first"
    assert len(policy.pick(REQUEST, ClusterSample(NOW, fleet)).scores) <= num_examined
    fleet[444] = telling("i0444", [A])
    num_decisions = num_instances // (num_examined // 2)
    picks = [policy.pick(REQUEST, ClusterSample(NOW, fleet)).instance_id for _ in range(num_decisions + 1)]
    assert "i0444" in picks
    assert set(picks[picks.index("i0444") :]) == {"i0444"}, "and stays in sight"


def test_what_it_remembers_is_bounded_by_the_fleet():
    policy = VirtualUsage()
    for number in range(50):
        policy.pick(REQUEST, ClusterSample(NOW, (telling(f"i{number}"), telling(f"j{number}"))))
    assert len(policy._freeness._known) <= 6


@pytest.mark.parametrize("parameters", [{"high_load_target": 1.1}, {"high_load_target": -0.1}, {"num_examined": 1}])
def test_bad_parameters_are_named(parameters):
    with pytest.raises(ConfigError, match=next(iter(parameters))):
        DISPATCH.create("virtual_usage", parameters)


def test_keeps_the_contract_when_it_looks_at_a_part_of_the_fleet():
    check_dispatch_policy(lambda: VirtualUsage(num_examined=2))
