"""What each policy promises beyond its kind's contract, on workloads that are too much for the engine."""

from itertools import pairwise

import pytest

from rota.base.errors import ConfigError
from rota.base.instant import Instant
from rota.serving.model.commands import RunStep
from rota.serving.model.events import SequenceArrived, StepFinished
from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import Request, RequestId
from rota.serving.policies.batch.prefill_first import PrefillFirst
from rota.serving.policies.batch.stall_free_chunks import StallFreeChunks
from rota.serving.policies.batch.vllm_default import VllmDefault
from rota.serving.policies.memory.recompute_last import RecomputeLast
from rota.serving.policies.memory.recompute_lowest import RecomputeLowest
from rota.serving.policies.order.fcfs import Fcfs
from rota.serving.policies.order.strict_priority import StrictPriority
from rota.serving.stack import EnginePolicies
from rota.testing.worlds import Job, Pace, Workload, play, seeded_workload

SEEDS = range(8)
MS = 1_000_000
BLOCK = 4


class Looking:
    """A batch policy that shows every pass it makes: what ran and waited before, and what the step became."""

    def __init__(self, inner, look):
        self.requires, self.shape, self.inner, self.look = inner.requires, inner.shape, inner, look

    def plan(self, draft, order):
        pending = {sequence.id: sequence.num_pending_tokens for sequence in draft.view.running}
        self.inner.plan(draft, order)
        self.look(draft, pending)


def stalls(batch, order, memory, chunk_size):
    """Plays every seed; counts the decodes that were passed over in a step, the preemptions, and checks the budget."""
    num_missed = num_preempted = num_decodes_served = 0

    def look(draft, pending):
        nonlocal num_missed, num_preempted, num_decodes_served
        granted = {sequence.id: sequence.granted for sequence in draft.grants}
        preempted = {sequence.id for sequence in draft.preempted}
        decodes = [each for each, num_tokens in pending.items() if num_tokens == 1 and each not in preempted]
        num_preempted += len(preempted)
        if len(decodes) > chunk_size:
            return
        num_missed += sum(each not in granted for each in decodes)
        num_decodes_served += sum(granted.get(each) == 1 for each in decodes)
        assert sum(granted.values()) <= chunk_size or not isinstance(batch(), StallFreeChunks)

    for seed in SEEDS:
        play(seeded_workload(seed), EnginePolicies(order(), Looking(batch(), look), memory()), steady=False)
    return num_missed, num_preempted, num_decodes_served


@pytest.mark.parametrize("memory", [RecomputeLast, RecomputeLowest])
@pytest.mark.parametrize("order", [Fcfs, StrictPriority, lambda: StrictPriority(ageing_seconds=0.02)])
def test_stall_free_chunks_never_makes_a_decode_wait(order, memory):
    num_missed, num_preempted, num_served = stalls(lambda: StallFreeChunks(chunk_size=10), order, memory, 10)
    assert num_missed == 0
    assert num_preempted > 50
    assert num_served > 2_000


def test_prefill_first_makes_decodes_wait():
    """The negative control: the same count on the same workloads sees what it should."""
    num_missed, num_preempted, _ = stalls(PrefillFirst, Fcfs, RecomputeLast, 10)
    assert num_missed > 500
    assert num_preempted > 50


def test_stall_free_chunks_bounds_the_gap_between_tokens():
    """The time between two tokens of a running sequence is at most that of a step of `chunk_size` tokens; under
    `vllm_default` one long prompt stretches it."""
    limits = InstanceLimits(num_blocks=500, block_size=4, max_num_batched_tokens=1000)
    jobs = [Job(Request(RequestId(f"d{number}"), Instant(0), 4, 60), 60) for number in range(4)]
    jobs.append(Job(Request(RequestId("long"), Instant(20 * MS), 900, 2), 2))
    longest = {}
    for batch in (StallFreeChunks(chunk_size=32), VllmDefault()):
        played = play(Workload(limits, tuple(jobs)), EnginePolicies(Fcfs(), batch, RecomputeLast()), steady=False)
        ends = [row.at for row in played.rows if isinstance(row.event, StepFinished)]
        longest[type(batch)] = max(later - earlier for earlier, later in pairwise(ends[1:]))
    bound = Pace().step_time(prefills=[(32, 1000)], num_decodes=0, decode_kv_tokens=4 * 64)
    assert longest[StallFreeChunks] <= bound < longest[VllmDefault]


# --- fcfs -------------------------------------------------------------------------------------------------------------


def first_admissions(played):
    """Who was admitted, in order of the first time."""
    seen = {}
    for step in played.steps():
        for request_id, _ in step.grants:
            seen.setdefault(request_id, None)
    return list(seen)


def arrivals(played):
    return [row.event.request.id for row in played.rows if isinstance(row.event, SequenceArrived)]


@pytest.mark.parametrize("batch", [VllmDefault, PrefillFirst, lambda: StallFreeChunks(chunk_size=8)])
@pytest.mark.parametrize("seed", SEEDS)
def test_fcfs_admits_in_order_of_arrival(seed, batch):
    played = play(seeded_workload(seed), EnginePolicies(Fcfs(), batch(), RecomputeLast()))
    admitted = first_admissions(played)
    assert admitted == [request_id for request_id in arrivals(played) if request_id in set(admitted)]


def test_strict_priority_does_not():
    played = play(seeded_workload(0), EnginePolicies(StrictPriority(), VllmDefault(), RecomputeLast()))
    admitted = first_admissions(played)
    assert admitted != [request_id for request_id in arrivals(played) if request_id in set(admitted)]


# --- strict_priority --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [VllmDefault, PrefillFirst, lambda: StallFreeChunks(chunk_size=8)])
def test_nobody_is_displaced_in_vain_or_by_an_equal(batch):
    """Whoever is displaced makes way for one of a higher class that starts in that very step."""
    num_displaced = 0

    def look(draft, pending):
        nonlocal num_displaced
        for victim in draft.preempted[: len(draft.preempted) - draft.num_preempted]:
            num_displaced += 1
            assert any(starter.priority < victim.priority for starter in draft.admitted), (victim, draft.admitted)

    for seed in SEEDS:
        play(seeded_workload(seed), EnginePolicies(StrictPriority(), Looking(batch(), look), RecomputeLowest()))
    assert num_displaced > 20


@pytest.mark.parametrize("batch", [VllmDefault, lambda: StallFreeChunks(chunk_size=8)])
def test_the_first_of_a_higher_class_never_waits_behind_lower_ones(batch):
    """If the head of the queue was left waiting, all that runs of lower classes could not have made room for it."""
    num_refused = 0

    def look(draft, pending):
        nonlocal num_refused
        view = draft.view
        admitted = {sequence.id for sequence in draft.admitted}
        head = next((each for each in StrictPriority()._waiting(view) if each.id not in admitted), None)
        if head is None or draft.num_preempted:
            return
        gone = {sequence.id for sequence in draft.preempted} - admitted
        staying = [each for each in view.running if each.id not in gone]
        equals = [each for each in [*staying, *draft.admitted] if each.priority <= head.priority]
        lower = [each for each in staying if each.priority > head.priority]
        if not lower:
            return
        num_refused += 1
        slots = view.limits.max_num_seqs - len(equals)
        budget = min(view.limits.max_num_batched_tokens, batch().shape.token_budget or 1_000_000)
        appetite = [each.num_tokens if each in draft.admitted else each.num_pending_tokens for each in equals]
        tokens = budget - sum(appetite)
        # Those admitted are owed blocks for all their tokens, and those that run may grow by one.
        owed = [each.num_tokens if each in draft.admitted else each.num_blocks * BLOCK + BLOCK for each in equals]
        blocks = view.limits.num_blocks - sum(-(-num_tokens // BLOCK) for num_tokens in owed)
        assert slots < 1 or tokens < 1 or blocks < -(-head.num_tokens // BLOCK), (head, equals, lower)

    for seed in range(40):
        workload = seeded_workload(seed)
        limits = InstanceLimits(num_blocks=24, block_size=4, max_num_seqs=6, max_num_batched_tokens=64)
        play(
            Workload(limits, workload.jobs), EnginePolicies(StrictPriority(), Looking(batch(), look), RecomputeLowest())
        )
    assert num_refused > 3


def flood(num_seconds):
    """One request of class 3 at 0.5 s, and requests of class 0 that fill the engine's one slot before and after."""
    jobs = []
    at = 0
    while at < num_seconds * 1_000 * MS:
        jobs.append(Job(Request(RequestId(f"high{len(jobs):03}"), Instant(at), 20, 10), 10))
        at += 7 * MS
    jobs.append(Job(Request(RequestId("low"), Instant(500 * MS), 20, 10, priority=3), 10))
    return Workload(
        InstanceLimits(num_blocks=40, block_size=4, max_num_seqs=1),
        tuple(sorted(jobs, key=lambda j: j.request.arrived_at)),
    )


def test_ageing_bounds_the_wait_of_a_low_class():
    """In the top class after 3 × 0.2 s, behind those of it that came before, and ahead of all that come later."""
    workload = flood(3)
    served = {}
    for ageing in (0.2, None):
        policies = EnginePolicies(StrictPriority(ageing_seconds=ageing), VllmDefault(), RecomputeLowest())
        played = play(workload, policies)
        served[ageing] = played.first_token_at
        high = {key: at for key, at in played.first_token_at.items() if key != "low"}
        assert max(high[key] - arrived(workload, key) for key in high) > 500 * MS, "no queue, no proof"
    in_top_class_at = 500 * MS + 3 * 200 * MS
    later = [job.request.id for job in workload.jobs if job.request.arrived_at > in_top_class_at]
    assert len(later) > 100
    assert served[0.2]["low"] < min(served[0.2][request_id] for request_id in later)
    assert served[None]["low"] > max(at for key, at in served[None].items() if key != "low")


def arrived(workload, request_id):
    return next(job.request.arrived_at for job in workload.jobs if job.request.id == request_id)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_low_class_in_the_top_is_not_overtaken_by_later_ones(seed):
    """The stated bound on workloads with preemptions: whoever arrives after another has reached the top class does not
    get its first token before it."""
    ageing = 30 * MS
    workload = seeded_workload(seed, num_jobs=60, load=3)
    policies = EnginePolicies(StrictPriority(ageing_seconds=ageing / 1e9), VllmDefault(), RecomputeLowest())
    played = play(workload, policies)
    assert played.statistics.num_preemptions > 10
    num_compared = 0
    for job in workload.jobs:
        in_top_class_at = job.request.arrived_at + job.request.priority * ageing
        mine = played.first_token_at.get(job.request.id)
        for other in workload.jobs:
            theirs = played.first_token_at.get(other.request.id)
            if other.request.arrived_at > in_top_class_at and None not in (mine, theirs):
                num_compared += 1
                assert mine <= theirs, (job, other)
    assert num_compared > 100


@pytest.mark.parametrize("ageing", [0.0, -1.0, float("nan")])
def test_ageing_must_take_time(ageing):
    with pytest.raises(ConfigError, match="ageing_seconds"):
        StrictPriority(ageing_seconds=ageing)


def test_a_chunk_must_hold_a_token():
    with pytest.raises(ConfigError, match="chunk_size"):
        StallFreeChunks(chunk_size=0)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_recompute_last_takes_the_last_admitted_and_recompute_lowest_the_last_in_line():
    """r0 (class 1) is admitted before r1 (class 0); when blocks run out, one policy takes r1 and the other r0."""
    limits = InstanceLimits(num_blocks=6, block_size=4, enable_prefix_caching=False)
    jobs = (
        Job(Request(RequestId("r0"), Instant(0), 6, 12, priority=1), 12),
        Job(Request(RequestId("r1"), Instant(1), 6, 12), 12),
    )
    first_victim = {}
    for memory in (RecomputeLast, RecomputeLowest):
        played = play(Workload(limits, jobs), EnginePolicies(StrictPriority(), VllmDefault(), memory()))
        first_victim[memory] = next(step.preempted for step in played.steps() if step.preempted)
    assert first_victim == {RecomputeLast: ("r1",), RecomputeLowest: ("r0",)}


def test_vllm_default_shares_a_step_between_prefill_and_decode():
    limits = InstanceLimits(num_blocks=100, block_size=4, max_num_batched_tokens=16)
    jobs = (
        Job(Request(RequestId("r0"), Instant(0), 4, 9), 9),
        Job(Request(RequestId("r1"), Instant(1), 40, 2), 2),
    )
    played = play(Workload(limits, jobs), EnginePolicies(Fcfs(), VllmDefault(), RecomputeLast()))
    steps = [dict(step.grants) for step in played.steps()]
    assert all(isinstance(step, RunStep) for step in played.steps())
    assert steps[:4] == [{"r0": 4}, {"r0": 1, "r1": 15}, {"r0": 1, "r1": 15}, {"r0": 1, "r1": 10}]
