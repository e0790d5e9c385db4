"""Tenants over several engines: what is promised inside of them and between them, what breaks it, and what is not
promised."""

from dataclasses import replace

import pytest

from rota.base.errors import LawBroken
from rota.base.instant import Instant
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.model.request import Request, RequestId, TenantId
from rota.serving.policies.dispatch.prefix_by_credit import PrefixByCredit
from rota.serving.policies.dispatch.prefix_then_load import PrefixThenLoad
from rota.serving.policies.order.fair_prefix import FairPrefix
from rota.serving.policies.order.fcfs import Fcfs
from rota.testing.fairness import overload_with_prefixes
from rota.testing.fleet_fairness import FleetRule, check_fleet_fairness, play_fleet, specs_like
from rota.testing.worlds import Job, Workload

QUANTUM, BETWEEN, EXPECTED = 16, 64, 10
ENDLESS = 1e15


def rule(order=lambda: FairPrefix(quantum_tokens=QUANTUM), dispatch=None):
    credit = dispatch or (lambda: PrefixByCredit(quantum_tokens=BETWEEN, expected_output_tokens=EXPECTED))
    return FleetRule(order, credit, QUANTUM, BETWEEN, EXPECTED)


def test_both_bounds_hold_on_a_hundred_overloads_and_are_not_empty():
    service, spread = check_fleet_fairness(rule(), num_workloads=100)
    assert 0.2 < service < 1.0
    assert 0.3 < spread < 1.0


@pytest.mark.slow
def test_both_bounds_hold_on_a_thousand_overloads():
    check_fleet_fairness(rule(), num_workloads=1000)


def test_first_come_and_the_longest_prefix_break_both_where_ours_keep_them():
    """On the same long overloads."""
    broken = [0, 0]
    for seed in (0, 1, 2, 3):
        workload = overload_with_prefixes(seed, num_jobs=400)
        specs = specs_like(workload.limits, 3)
        ours, plain = play_fleet(workload, specs, rule()), play_fleet(workload, specs, rule(Fcfs, PrefixThenLoad))
        assert ours.gap.service < 0.5 * ours.bound
        assert ours.spread < ours.spread_bound
        broken[0] += plain.gap.service > plain.bound
        broken[1] += plain.spread > plain.spread_bound
    assert min(broken) >= 2


def test_the_bound_holds_with_weights_too():
    """Services by weight, and the larger of what either may owe by its weight."""
    weights = {"tenant-0": 3.0, "tenant-1": 0.5}
    weighted = replace(rule(lambda: FairPrefix(quantum_tokens=QUANTUM, weights=weights)), weights=weights)
    assert check_fleet_fairness(weighted, num_workloads=4, num_jobs=100)[0] > 0.1
    evenly = replace(weighted, order=lambda: FairPrefix(quantum_tokens=QUANTUM))
    with pytest.raises(LawBroken, match="drifted"):
        check_fleet_fairness(evenly, num_workloads=4, num_jobs=100)


@pytest.mark.parametrize("order", [Fcfs, lambda: FairPrefix(quantum_tokens=ENDLESS)])
def test_credits_between_engines_do_not_make_up_for_an_order_that_knows_none(order):
    with pytest.raises(LawBroken, match="drifted"):
        check_fleet_fairness(rule(order), num_jobs=150)


@pytest.mark.parametrize("dispatch", [PrefixThenLoad, lambda: PrefixByCredit(quantum_tokens=ENDLESS)])
def test_fair_engines_do_not_make_up_for_a_dispatch_that_knows_no_credits(dispatch):
    with pytest.raises(LawBroken, match=r"to one of . instances than to another"):
        check_fleet_fairness(rule(dispatch=dispatch))


def drift_at_a_slow_engine(num_rounds):
    """`even` sends a little more than its half of the slow engine, and as much to the fast one; `flood` fills both."""
    jobs = []
    for number in range(num_rounds):
        for place in range(7):
            tenant, at = TenantId("flood" if place else "even"), Instant(number * 6_000_000)
            jobs.append(Job(Request(RequestId(f"r{number:04}-{place}"), at, 8, 8, 0, tenant), 8))
    specs = [
        InstanceSpec(InstanceId(name), InstanceLimits(20, 4, max_num_seqs=num_seqs, max_num_batched_tokens=64))
        for name, num_seqs in (("slow", 1), ("fast", 4))
    ]
    return play_fleet(Workload(specs[0].limits, tuple(jobs)), specs, rule())


def test_nothing_is_promised_to_one_who_waits_at_one_engine_only():
    short, long = drift_at_a_slow_engine(30), drift_at_a_slow_engine(120)
    assert long.gap_anywhere.service > 3 * short.gap_anywhere.service
    assert long.gap_anywhere.service > long.bound
    assert long.gap.service < 0.5 * long.bound
