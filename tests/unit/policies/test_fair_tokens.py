"""Tenants get the same service while both wait: the published bound, what breaks it, and each part of the rule."""

from collections import Counter

import pytest

from rota.base.errors import ConfigError, LawBroken
from rota.base.instant import Instant
from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import Request, RequestId, TenantId
from rota.serving.policies.batch.vllm_default import VllmDefault
from rota.serving.policies.memory.recompute_last import RecomputeLast
from rota.serving.policies.order.fair_tokens import FairTokens
from rota.serving.policies.order.fcfs import Fcfs
from rota.serving.policies.order.strict_priority import StrictPriority
from rota.serving.stack import EnginePolicies
from rota.testing.fairness import check_fair_service, overload, widest_gap
from rota.testing.worlds import Job, Workload, play

MS = 1_000_000


def job(name, tenant, *, at=0, prompt=4, output=4, priority=0):
    request = Request(
        RequestId(name), Instant(at), prompt, max_tokens=output, priority=priority, tenant=TenantId(tenant)
    )
    return Job(request, output)


def admitted(jobs, order, **limits):
    """The requests in the order in which they were first served."""
    settings = {"num_blocks": 100, "block_size": 4, "max_num_seqs": 1, "max_num_batched_tokens": 64, **limits}
    steps = play(Workload(InstanceLimits(**settings), tuple(jobs)), policies(order), steady=False).steps()
    return list(dict.fromkeys(grant.request_id for step in steps for grant in step.grants))


def policies(order):
    return EnginePolicies(order, VllmDefault(), RecomputeLast())


def test_the_bound_holds_and_is_not_empty():
    assert 0.1 < check_fair_service(FairTokens) < 1.0


@pytest.mark.slow
def test_the_bound_holds_on_a_thousand_overloads():
    check_fair_service(FairTokens, num_workloads=1000)


@pytest.mark.parametrize("order", [Fcfs, StrictPriority])
def test_orders_that_know_no_tenants_break_it(order):
    with pytest.raises(LawBroken, match="drifted"):
        check_fair_service(order)


def test_tenants_stay_closer_than_the_bound_by_far():
    """The bound is loose; the gap itself is a twentieth of what it is without fairness."""
    workloads = [overload(seed) for seed in range(20)]
    fair = sum(widest_gap(each, FairTokens()).service for each in workloads)
    unfair = sum(widest_gap(each, Fcfs()).service for each in workloads)
    assert unfair > 5 * fair


def test_a_heavy_tenant_delays_itself():
    flood = [job(f"heavy-{number:02}", "heavy") for number in range(20)]
    light = [job("light-0", "light", at=MS), job("light-1", "light", at=MS)]
    order = admitted([*flood, *light], FairTokens())
    assert order.index("light-0") <= 2
    assert order.index("light-1") <= 4
    assert admitted([*flood, *light], Fcfs())[-2:] == ["light-0", "light-1"]


def test_the_next_choice_of_a_pass_knows_the_last():
    jobs = [job(f"{tenant}-{number}", tenant) for tenant in ("a", "b") for number in range(3)]
    # The first arrival is alone, and b begins where a's queue ended. All others are admitted in one pass.
    assert admitted(jobs, FairTokens(), max_num_seqs=6) == ["a-0", "a-1", "b-0", "a-2", "b-1", "b-2"]


def test_whoever_comes_back_has_saved_nothing_up():
    """`away` was served once, long ago; `here` has been served ever since."""
    jobs = [job("away-first", "away"), *(job(f"here-{number:02}", "here", at=1) for number in range(60))]
    jobs += [job(f"away-{number}", "away", at=120 * MS) for number in range(6)]
    order = admitted(jobs, FairTokens())
    since = order[order.index("away-0") :][:8]
    assert Counter(each.partition("-")[0] for each in since) == {"away": 4, "here": 4}


def test_whoever_comes_to_an_empty_queue_begins_where_the_last_one_left():
    """Otherwise a newcomer would be served alone for as long as the other was before."""
    jobs = [job(f"old-{number:02}", "old", prompt=40) for number in range(6)]
    jobs += [
        job(f"{tenant}-late-{number}", tenant, at=900 * MS + number) for number in range(4) for tenant in ("old", "new")
    ]
    order = admitted(jobs, FairTokens())[6:]
    assert Counter(each.partition("-")[0] for each in order[:4]) == {"old": 2, "new": 2}


def test_weights_divide_the_service():
    jobs = [job(f"{tenant}-{number:02}", tenant) for number in range(30) for tenant in ("gold", "plain")]
    order = admitted(jobs, FairTokens(weights={"gold": 3.0}))[:20]
    assert Counter(each.partition("-")[0] for each in order) == {"gold": 15, "plain": 5}


def test_outputs_count_as_they_are_made():
    """Prompts are alike, and one tenant's answers ten times as long: it is served a tenth as often, or so."""
    jobs = [job(f"long-{number:02}", "long", output=50) for number in range(20)]
    jobs += [job(f"short-{number:02}", "short", output=5) for number in range(60)]
    order = admitted(jobs, FairTokens(prompt_weight=0.001))[:33]
    assert 26 <= Counter(each.partition("-")[0] for each in order)["short"] <= 31


def test_classes_go_first_and_tenants_are_equals_within():
    jobs = [job(f"low-{number}", "a", priority=1) for number in range(2)]
    jobs += [job(f"high-{tenant}-{number}", tenant, priority=0) for tenant in ("a", "b") for number in range(2)]
    # low-0 is alone when it comes.
    assert admitted(jobs, FairTokens()) == ["low-0", "high-a-0", "high-b-0", "high-a-1", "high-b-1", "low-1"]


def test_what_is_computed_again_is_not_charged_again():
    """Preemption is the engine's doing. A tenant alone is never lifted, so its counter is what it was served."""
    num_preemptions = 0
    for seed in range(20):
        workload = overload(seed, num_tenants=1)
        jobs = tuple(each for each in workload.jobs if each.leaves_after is None)
        order = FairTokens()
        played = play(Workload(workload.limits, jobs), policies(order), steady=False)
        num_preemptions += played.statistics.num_preemptions
        served = sum(each.request.num_prompt_tokens + 2 * each.num_output_tokens for each in jobs)
        assert order.class_of(0).counters == {"tenant-0": served}
    assert num_preemptions > 50


@pytest.mark.parametrize("wrong", [{"prompt_weight": 0.0}, {"output_weight": -1.0}, {"weights": {"a": float("inf")}}])
def test_a_weight_that_is_none_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=r"must be above 0"):
        FairTokens(**wrong)


def test_what_is_kept_of_tenants_and_requests_is_bounded():
    jobs = [job(f"r{number}", f"tenant-{number}", at=number * 8 * MS, output=1) for number in range(6000)]
    order = FairTokens()
    play(Workload(InstanceLimits(num_blocks=100, block_size=4), tuple(jobs)), policies(order), steady=False)
    assert len(order.class_of(0).counters) <= 4097
    assert len(order._num_charged) < 100
