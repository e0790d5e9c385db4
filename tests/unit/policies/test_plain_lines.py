"""The line of those who run, and whom somebody displaces, are found with fewer looks than the rule says: same steps."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rota.serving.api import InOrder, Pool
from rota.serving.instance import draft
from rota.serving.instance.displacement import _left_by_running, _outranked
from rota.serving.policies.batch.stall_free_chunks import StallFreeChunks
from rota.serving.policies.batch.vllm_default import VllmDefault
from rota.serving.policies.memory.recompute_last import RecomputeLast
from rota.serving.policies.memory.recompute_lowest import RecomputeLowest
from rota.serving.policies.order.least_attained_service import LeastAttainedService
from rota.serving.policies.order.shortest_predicted_first import ShortestPredictedFirst
from rota.serving.policies.order.skip_join_mlfq import SkipJoinMlfq
from rota.serving.policies.order.skip_predict import SkipPredict
from rota.serving.predictors.length.declared import Declared
from rota.serving.stack import EnginePolicies
from rota.testing.worlds import check_same_commands, play, seeded_workload, workloads

DECLARED = Declared()
ORDERS = {
    "least_attained_service": lambda: LeastAttainedService(quantum_tokens=3),
    "shortest_predicted_first": lambda: ShortestPredictedFirst(
        lengths=DECLARED, starvation_steps=5, promoted_tokens=2, bucket_tokens=2
    ),
    "skip_join_mlfq": lambda: SkipJoinMlfq(starvation_seconds=0.02, sweep_steps=3, base_ms=2, prefill_us_per_token=500),
    "skip_predict": lambda: SkipPredict(lengths=DECLARED, quick_lengths=DECLARED, short_tokens=6, bucket_tokens=2),
}


class Plainly:
    """An order whose line is sorted whenever it is asked for."""

    def __init__(self, order):
        self._order = order
        self.requires, self.running_order, self.displacing = order.requires, order.running_order, order.displacing
        self.displaces = order.displaces
        if hasattr(order, "request_ended"):
            self.request_ended = order.request_ended

    def open(self, view, pool):
        cursor = self._order.open(view, pool)
        if pool is Pool.WAITING:
            return cursor
        fixed = self._order._fixed if self._order.fixed_ranks else {}
        return InOrder(sorted(view.running, key=lambda one: (one.priority, fixed.get(one.id) or self._order.rank(one))))


def plainly_displaced(view, order, memory, *, token_budget, num_blocks_to_take, num_slots_aside=0):
    """`choose_displaced`, counting first and asking then."""
    limits = view.limits
    chunk_max = min(limits.long_prefill_token_threshold or token_budget, token_budget)
    running = list(view.running)
    cursor = order.open(view, Pool.WAITING)
    waiting = cursor.next()
    line = list(iter(order.open(view, Pool.RUNNING).next, None))
    num_slots = limits.max_num_seqs - len(running) - num_slots_aside
    num_tokens, num_blocks = _left_by_running(view, running, token_budget, chunk_max)
    victims, starters = [], []
    while waiting is not None and (candidates := _outranked(view, order, waiting, line)):
        starters.append(waiting)
        leaving = list(victims)
        while True:
            num_freed = view.num_blocks_freed(leaving)
            num_taken = sum(num_blocks_to_take(one, leaving) for one in starters)
            given = [one for one in leaving if one not in victims]
            num_free_tokens = num_tokens + sum(min(one.num_pending_tokens, chunk_max) for one in given)
            grown = [one.num_computed_tokens + min(one.num_pending_tokens, chunk_max) for one in given]
            num_regained = sum(
                -(-end // limits.block_size) - -(-one.num_computed_tokens // limits.block_size)
                for one, end in zip(given, grown, strict=True)
            )
            has_blocks = num_blocks + num_regained + num_freed >= num_taken + limits.watermark_blocks
            if num_slots + len(given) >= 1 and num_free_tokens >= 1 and has_blocks:
                break
            victim = memory.victim(view, candidates, waiting) if candidates else None
            if victim is None:
                return victims
            candidates.remove(victim)
            line.remove(victim)
            leaving.append(victim)
        victims = leaving
        num_slots += len(given) - 1
        num_tokens = num_free_tokens - min(waiting.num_pending_tokens, chunk_max)
        num_blocks += num_regained
        waiting = cursor.next()
    return victims


def check_same_steps(order, batch, memory, workload):
    quick = play(workload, EnginePolicies(ORDERS[order](), batch(), memory()))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(draft, "choose_displaced", plainly_displaced)
        plain = play(workload, EnginePolicies(Plainly(ORDERS[order]()), batch(), memory()))
    check_same_commands(quick, plain, "with fewer looks")
    return sum(len(step.preempted) for step in quick.steps())


@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=10)
@given(
    batch=st.sampled_from([VllmDefault, lambda: StallFreeChunks(chunk_size=8)]),
    memory=st.sampled_from([RecomputeLowest, RecomputeLast]),
    workload=workloads(),
)
def test_fewer_looks_give_the_same_steps(order, batch, memory, workload):
    check_same_steps(order, batch, memory, workload)


@pytest.mark.parametrize("order", ORDERS)
def test_also_where_many_are_displaced(order):
    assert sum(check_same_steps(order, VllmDefault, RecomputeLowest, seeded_workload(seed)) for seed in range(3))
