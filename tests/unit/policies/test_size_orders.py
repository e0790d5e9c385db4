"""Orders by length, by service and by deadline: each part of the rule, beside what it is to do without."""

from itertools import pairwise

import pytest

from rota.base.errors import ConfigError
from rota.base.instant import Duration, Instant
from rota.serving.api import SLO, Pool
from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import ProgramId, Request, RequestId
from rota.serving.policies.batch.vllm_default import VllmDefault
from rota.serving.policies.memory.recompute_lowest import RecomputeLowest
from rota.serving.policies.order.earliest_deadline import EarliestDeadline
from rota.serving.policies.order.fcfs import Fcfs
from rota.serving.policies.order.highest_response_ratio import HighestResponseRatio
from rota.serving.policies.order.least_attained_service import LeastAttainedService
from rota.serving.policies.order.least_slack import LeastSlack
from rota.serving.policies.order.shortest_predicted_first import ShortestPredictedFirst
from rota.serving.policies.order.skip_join_mlfq import SkipJoinMlfq
from rota.serving.policies.order.skip_predict import SkipPredict
from rota.serving.predictors.length.declared import Declared
from rota.serving.stack import EnginePolicies
from rota.testing.worlds import Job, Workload, play

MS = 1_000_000
DECLARED = Declared()


def job(name, output, *, at=0, prompt=1, priority=0, max_tokens=None, program=None, **slo_ms):
    """One request; `max_tokens`, what is declared, is its true length unless said."""
    request = Request(
        RequestId(name),
        Instant(at * MS),
        prompt,
        output if max_tokens is None else max_tokens,
        priority=priority,
        program=None if program is None else ProgramId(program),
        slo=SLO(**{target: Duration(span * MS) for target, span in slo_ms.items()}),
    )
    return Job(request, output)


def played(jobs, order, **limits):
    settings = {"num_blocks": 100, "block_size": 4, "max_num_seqs": 1, "max_num_batched_tokens": 64, **limits}
    jobs = sorted(jobs, key=lambda one: one.request.arrived_at)
    return play(
        Workload(InstanceLimits(**settings), tuple(jobs)), EnginePolicies(order, VllmDefault(), RecomputeLowest())
    )


def ended(jobs, order, **limits):
    """The requests in the order of their last step."""
    last = {}
    for number, step in enumerate(played(jobs, order, **limits).steps()):
        last |= {grant.request_id: number for grant in step.grants}
    return sorted(last, key=last.__getitem__)


def longest_gap(jobs, order, name):
    """Steps between two in which `name`, which is there from the first, got something."""
    served = [0]
    for number, step in enumerate(played(jobs, order).steps()):
        if any(grant.request_id == name for grant in step.grants):
            served.append(number)
    return max(after - before for before, after in pairwise(served))


def shortest(**parameters):
    return ShortestPredictedFirst(lengths=DECLARED, bucket_tokens=1, **parameters)


# --- shortest predicted first -----------------------------------------------------------------------------------------


def test_short_ones_go_first_and_displace():
    jobs = [job("long", 30), job("middle", 10, at=1), job("short", 3, at=2)]
    assert ended(jobs, shortest()) == ["short", "middle", "long"]
    assert ended(jobs, Fcfs()) == ["long", "middle", "short"]


def test_only_as_long_as_predictions_rank_them():
    """The control: predictions the wrong way around serve the wrong way around."""
    jobs = [
        job("long", 30, max_tokens=31),
        job("middle", 10, at=1, max_tokens=40),
        job("short", 3, at=2, max_tokens=50),
    ]
    assert ended(jobs, shortest()) == ["long", "middle", "short"]


def test_within_one_bucket_nobody_displaces():
    jobs = [job("first", 19), job("second", 11, at=1)]
    assert ended(jobs, ShortestPredictedFirst(lengths=DECLARED)) == ["first", "second"]
    assert ended(jobs, shortest()) == ["second", "first"]


def test_classes_go_ahead_of_lengths():
    jobs = [job("low and short", 3, priority=1), job("high and long", 30, at=1, priority=0)]
    assert ended(jobs, shortest()) == ["high and long", "low and short"]


def test_the_guard_ends_starving():
    """Short requests keep coming; without the guard the long one gets nothing until they stop."""
    jobs = [job("long", 20), *(job(f"short-{number:02}", 4, at=4 * number) for number in range(1, 60))]
    guarded = longest_gap(jobs, shortest(starvation_steps=12, preempted_at_most=1000), "long")
    unguarded = longest_gap(jobs, shortest(starvation_steps=0, preempted_at_most=1000), "long")
    assert guarded < 40
    assert unguarded > 100


def test_nobody_is_displaced_more_often_than_was_said():
    jobs = [job("long", 60), *(job(f"short-{number:02}", 1, at=10 * number) for number in range(1, 40))]

    def num_displaced(at_most):
        run = played(jobs, shortest(starvation_steps=0, preempted_at_most=at_most))
        return sum("long" in step.preempted for step in run.steps())

    assert num_displaced(3) == 3
    assert num_displaced(1000) > 4


class NobodyWhoRunsIsIdle(ShortestPredictedFirst):
    """Looks itself over whenever it says who runs."""

    def open(self, view, pool):
        cursor = super().open(view, pool)
        if pool is Pool.RUNNING:
            for one in view.running:
                assert one.id not in self._idling._since, f"{one.id} runs, and counts as starving"
                assert self._fixed.get(one.id, self.rank(one)) == self.rank(one), f"{one.id} runs with an old rank"
        return cursor


def test_whoever_is_displaced_and_runs_again_by_the_next_step_does_not_starve():
    jobs = [*(job(f"r{number}", 1) for number in range(5)), job("long prompt", 1, prompt=12), job("last", 1)]
    order = NobodyWhoRunsIsIdle(lengths=DECLARED, starvation_steps=5, promoted_tokens=2, bucket_tokens=2)
    assert len(ended(jobs, order, num_blocks=5, max_num_seqs=2, max_num_batched_tokens=3)) == 7


# --- least attained service -------------------------------------------------------------------------------------------


def test_whoever_was_served_least_goes_first():
    jobs = [job("long", 60), job("new", 6, at=30)]
    order = LeastAttainedService(quantum_tokens=8)
    assert ended(jobs, order) == ["new", "long"]
    assert ended(jobs, LeastAttainedService(quantum_tokens=1000)) == ["long", "new"], (
        "within a quantum nobody displaces"
    )


def test_what_a_program_was_served_before_counts():
    jobs = [job("call-1", 20, program="agent"), job("call-2", 8, at=60, program="agent"), job("other", 8, at=60)]
    assert ended(jobs, LeastAttainedService(of="program", quantum_tokens=8))[1:] == ["other", "call-2"]
    assert ended(jobs, LeastAttainedService(quantum_tokens=8))[1:] == ["call-2", "other"]


# --- queues with feedback ---------------------------------------------------------------------------------------------


def test_the_level_of_entry_is_the_first_whose_quantum_covers_the_prompt():
    order = SkipJoinMlfq(base_ms=10, prefill_us_per_token=100, num_levels=4)
    assert [order.entry_level(num) for num in (1, 100, 101, 200, 201, 401, 5000)] == [0, 0, 1, 1, 2, 3, 3]


def test_whoever_used_up_its_quantum_makes_way():
    jobs = [job("long", 60), job("new", 4, at=30)]
    assert ended(jobs, SkipJoinMlfq(base_ms=5)) == ["new", "long"]
    assert ended(jobs, SkipJoinMlfq(base_ms=100_000)) == ["long", "new"], "in one level it is first come, first served"


def test_a_long_prompt_joins_below_and_waits():
    jobs = [job("busy", 4), job("long prompt", 4, at=1, prompt=50), job("short prompt", 4, at=2)]
    slow = SkipJoinMlfq(base_ms=10, prefill_us_per_token=1000)
    assert ended(jobs, slow) == ["busy", "short prompt", "long prompt"]
    assert ended(jobs, SkipJoinMlfq(base_ms=100, prefill_us_per_token=1)) == ["busy", "long prompt", "short prompt"]


def test_idle_time_begins_at_arrival():
    """In the authors' code it begins at 0, so that all who have waited at all starve at the first sweep."""
    steady = [job("long", 40), *(job(f"new-{number:02}", 3, at=3 * number) for number in range(1, 60))]
    raised = longest_gap(steady, SkipJoinMlfq(base_ms=5, starvation_seconds=0.03, sweep_steps=2), "long")
    starved = longest_gap(steady, SkipJoinMlfq(base_ms=5, starvation_seconds=9.0, sweep_steps=2), "long")
    assert raised < starved / 2


# --- highest response ratio -------------------------------------------------------------------------------------------


def test_short_work_overtakes_until_the_long_has_waited_long():
    order = HighestResponseRatio(lengths=DECLARED)
    early = [job("busy", 20), job("long", 40, at=1), job("short", 2, at=2)]
    assert ended(early, order) == ["busy", "short", "long"]
    assert ended(early, Fcfs()) == ["busy", "long", "short"]
    # When the first ends, the long one has waited for 1.5 times its 40 tokens, the other for half of its 2.
    late = [job("busy", 60), job("long", 40, at=1), job("short", 2, at=59)]
    assert ended(late, order) == ["busy", "long", "short"]


def test_whoever_follows_one_of_its_kind_has_its_own_wait():
    order = HighestResponseRatio(lengths=DECLARED)
    busy = [job("busy-0", 60), job("busy-1", 59), job("busy-2", 59)]  # The last two begin a step later.
    waiting = [job("first", 8, at=1), job("other", 16, at=20), job("follows", 8, at=58)]
    admitted = next(
        [grant.request_id for grant in step.grants]
        for step in played(busy + waiting, order, max_num_seqs=3).steps()
        if any(grant.request_id == "first" for grant in step.grants)
    )
    assert admitted == ["first", "other", "follows"]


# --- deadlines --------------------------------------------------------------------------------------------------------


def test_the_earliest_deadline_goes_first_and_those_without_last():
    jobs = [job("none", 5), job("late", 5, at=1, ttft=900), job("soon", 5, at=2, ttft=50)]
    assert ended(jobs, EarliestDeadline(displace=True)) == ["soon", "late", "none"]
    waiting_only = EarliestDeadline()
    assert ended(jobs, waiting_only) == ["none", "soon", "late"]
    assert not waiting_only.displacing
    assert ended(jobs, Fcfs()) == ["none", "late", "soon"]


def test_a_set_that_can_be_served_in_time_is():
    """Ten bursts, each with deadlines that only the right order keeps."""
    jobs = []
    for burst in range(10):
        for number in range(4):
            jobs.append(job(f"b{burst}-{number}", 4, at=200 * burst, e2e=(4 - number) * 6 + 3))

    def num_late(order):
        ends = played(jobs, order).ends
        return sum(ends[one.request.id].at > one.request.arrived_at + one.request.slo.e2e for one in jobs)

    assert num_late(EarliestDeadline(displace=True)) == 0
    assert num_late(Fcfs()) >= 10


def test_of_equal_deadlines_the_one_with_more_to_do_goes_first():
    jobs = [job("busy", 3), job("little", 3, at=1, ttft=500), job("much", 3, at=2, prompt=50, ttft=500)]
    slack = LeastSlack(lengths=DECLARED, prefill_us_per_token=1000)
    assert ended(jobs, slack)[1:] == ["much", "little"]
    assert ended(jobs, EarliestDeadline())[1:] == ["little", "much"]


# --- skip predict -----------------------------------------------------------------------------------------------------


class Counting(Declared):
    """Says how often it was asked."""

    def __init__(self):
        self.asked = []

    def predict(self, request):
        self.asked.append(request.id)
        return super().predict(request)


def test_only_the_long_are_predicted():
    costly = Counting()
    jobs = [job("long", 40), job("longer", 50, at=1), job("short", 3, at=2)]
    order = SkipPredict(lengths=costly, quick_lengths=DECLARED, short_tokens=10, bucket_tokens=1)
    assert ended(jobs, order) == ["short", "long", "longer"]
    assert costly.asked == ["long", "longer"]


def test_the_two_ends_are_first_come_and_shortest_first():
    jobs = [job("long", 30), job("middle", 10, at=1), job("short", 3, at=2)]

    def with_bit_at(tokens):
        return SkipPredict(lengths=DECLARED, quick_lengths=DECLARED, short_tokens=tokens, bucket_tokens=1)

    assert ended(jobs, with_bit_at(1000)) == ended(jobs, Fcfs())
    assert ended(jobs, with_bit_at(0)) == ended(jobs, shortest())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: shortest(promoted_tokens=0),
        lambda: LeastAttainedService(quantum_tokens=0),
        lambda: SkipJoinMlfq(base_ms=0),
        lambda: LeastSlack(lengths=DECLARED, decode_ms_per_token=-1),
        lambda: HighestResponseRatio(lengths=DECLARED, prompt_weight=float("inf")),
    ],
)
def test_a_constant_that_is_none_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match="must be"):
        wrong()
