"""`recompute_cheapest`: whom it takes, and how often at most."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rota.base.errors import ConfigError
from rota.base.instant import Instant
from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import Request, RequestId
from rota.serving.policies.batch.stall_free_chunks import StallFreeChunks
from rota.serving.policies.batch.vllm_default import VllmDefault
from rota.serving.policies.memory.recompute_cheapest import RecomputeCheapest
from rota.serving.policies.memory.recompute_last import RecomputeLast
from rota.serving.policies.order.fcfs import Fcfs
from rota.serving.policies.order.strict_priority import StrictPriority
from rota.serving.stack import EnginePolicies
from rota.testing.worlds import Job, Workload, play, seeded_workload, workloads

NUM_TIMES = 2


class Watched(RecomputeCheapest):
    """Says of each victim how often it was preempted before, and how often the others of its class were."""

    def __init__(self, **parameters):
        super().__init__(**parameters)
        self.seen = []

    def victim(self, view, candidates, needy):
        victim = super().victim(view, candidates, needy)
        rivals = [one for one in candidates if one.priority == victim.priority]
        self.seen.append(
            (victim.num_preemptions, min(one.num_preemptions for one in rivals), victim.arrived_at, rivals)
        )
        assert victim.priority == max(one.priority for one in candidates)
        return victim


class WithoutBound(Watched):
    """The same, and nobody is ever spared."""

    def __init__(self):
        super().__init__(preempted_at_most=1 << 30)


def displaced_too_often(workload, policy, order=Fcfs, batch=VllmDefault):
    """How many were taken beyond the bound though somebody of their class was below it, or had arrived later."""
    played = play(workload, EnginePolicies(order(), batch(), policy))
    assert len(played.ends) == len(workload.jobs)
    return played, [
        (times, fewest)
        for times, fewest, arrived_at, rivals in policy.seen
        if times >= NUM_TIMES and (fewest < NUM_TIMES or arrived_at < max(one.arrived_at for one in rivals))
    ]


@settings(max_examples=25, deadline=None)
@given(
    workload=workloads(),
    order=st.sampled_from([Fcfs, StrictPriority]),
    batch=st.sampled_from([VllmDefault, lambda: StallFreeChunks(chunk_size=8)]),
)
def test_nobody_is_preempted_beyond_the_bound_while_another_can_be(workload, order, batch):
    """And everybody ends: `play` refuses a world that goes round in circles or starves anybody."""
    assert displaced_too_often(workload, Watched(preempted_at_most=NUM_TIMES), order, batch)[1] == []


def one_class(seed):
    workload = seeded_workload(seed, num_jobs=30, load=4.0)
    requests = [
        Request(RequestId(j.request.id), j.request.arrived_at, j.request.num_prompt_tokens, 60) for j in workload.jobs
    ]
    return Workload(workload.limits, tuple(Job(one, 60) for one in requests))


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_holds_in_sustained_overload_and_in_numbers(seed):
    workload = one_class(seed)
    policy = Watched(preempted_at_most=NUM_TIMES)
    played, beyond = displaced_too_often(workload, policy)
    assert beyond == []
    times = Counter(request_id for step in played.steps() for request_id in step.preempted)
    num_blocks = 0
    for job in workload.jobs:
        num_blocks += -(-job.num_output_tokens // workload.limits.block_size) + 1
        assert times[job.request.id] <= NUM_TIMES + num_blocks
    # Nobody who could have been spared was taken, and the pressure was there.
    assert max(times.values()) >= NUM_TIMES
    assert times.total() > 20


def test_without_it_somebody_pays_again_and_again():
    _, beyond = displaced_too_often(one_class(0), WithoutBound())
    assert len(beyond) > 5
    assert max(times for times, _ in beyond) >= 2 * NUM_TIMES


def first_victims(jobs, limits, memory, order=Fcfs):
    played = play(Workload(limits, jobs), EnginePolicies(order(), VllmDefault(), memory))
    return next(step.preempted for step in played.steps() if step.preempted)


def job(name, at, num_prompt, num_output, **more):
    return Job(Request(RequestId(name), Instant(at), num_prompt, num_output, **more), num_output)


def test_it_takes_who_loses_least_not_who_came_last():
    limits = InstanceLimits(num_blocks=14, block_size=4, enable_prefix_caching=False)
    jobs = (job("small", 0, 5, 20), job("large", 1, 38, 12))
    assert first_victims(jobs, limits, RecomputeLast()) == ("large",)
    assert first_victims(jobs, limits, RecomputeCheapest()) == ("small",)


def test_what_others_hold_too_costs_nothing():
    """Two share a long prefix: each would lose only what is its own, less than one with a middling prompt."""
    limits = InstanceLimits(num_blocks=22, block_size=4)
    prefix = tuple(f"p{block}" for block in range(9))
    jobs = (
        job("first", 0, 37, 16, block_hashes=prefix),
        job("shares", 1, 37, 16, block_hashes=prefix),
        job("middling", 2, 22, 16),
    )
    assert first_victims(jobs, limits, RecomputeCheapest()) == ("shares",)


def test_a_lower_class_goes_first_whatever_it_costs():
    limits = InstanceLimits(num_blocks=14, block_size=4, enable_prefix_caching=False)
    jobs = (job("small", 0, 5, 20, priority=0), job("large", 1, 38, 12, priority=1))
    assert first_victims(jobs, limits, RecomputeCheapest(), StrictPriority) == ("large",)


def test_the_bound_is_at_least_one():
    with pytest.raises(ConfigError, match="preempted_at_most"):
        RecomputeCheapest(preempted_at_most=0)
