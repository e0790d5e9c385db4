"""Within their shares tenants are served by cached prefix: the published bound, what breaks it, each part of the
rule."""

from collections import Counter

import pytest

from rota.base.errors import ConfigError, LawBroken
from rota.base.instant import Instant
from rota.serving.api import Pool
from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import Request, RequestId, TenantId
from rota.serving.policies.batch.vllm_default import VllmDefault
from rota.serving.policies.memory.recompute_last import RecomputeLast
from rota.serving.policies.order.fair_prefix import FairPrefix
from rota.serving.policies.order.fair_tokens import FairTokens
from rota.serving.policies.order.fcfs import Fcfs
from rota.serving.stack import EnginePolicies
from rota.testing.fairness import COMPUTED, check_fair_prefix, overload_with_prefixes, widest_gap
from rota.testing.worlds import Job, Workload, play

MS = 1_000_000
QUANTUM = 32


def fair_prefix():
    return FairPrefix(quantum_tokens=QUANTUM)


def longest_prefix():
    """Plain longest prefix match: credit never ends."""
    return FairPrefix(quantum_tokens=1e15)


def job(name, tenant="a", *, at=0, document=None, prompt=16, output=4, priority=0):
    hashes = () if document is None else tuple((document, block) for block in range(prompt // 4))
    request = Request(
        RequestId(name),
        Instant(at),
        prompt,
        max_tokens=output,
        priority=priority,
        tenant=TenantId(tenant),
        block_hashes=hashes,
    )
    return Job(request, output)


def played(jobs, order, **limits):
    settings = {"num_blocks": 100, "block_size": 4, "max_num_seqs": 1, "max_num_batched_tokens": 64, **limits}
    return play(Workload(InstanceLimits(**settings), tuple(jobs)), policies(order), steady=False)


def admitted(jobs, order, **limits):
    """The requests in the order in which they were first served."""
    return list(
        dict.fromkeys(grant.request_id for step in played(jobs, order, **limits).steps() for grant in step.grants)
    )


def policies(order):
    return EnginePolicies(order, VllmDefault(), RecomputeLast())


def test_the_bound_holds_and_is_not_empty():
    assert 0.1 < check_fair_prefix(fair_prefix, quantum_tokens=QUANTUM) < 1.0


@pytest.mark.slow
def test_the_bound_holds_on_a_thousand_overloads():
    check_fair_prefix(fair_prefix, quantum_tokens=QUANTUM, num_workloads=1000)


@pytest.mark.parametrize("order", [longest_prefix, Fcfs])
def test_the_longest_prefix_without_credit_breaks_it_and_so_do_orders_that_know_no_tenants(order):
    with pytest.raises(LawBroken, match="drifted"):
        check_fair_prefix(order, quantum_tokens=QUANTUM)


class Watched(FairPrefix):
    """Holds each choice against all who wait."""

    def __init__(self, **parameters):
        super().__init__(**parameters)
        self.num_choices = self.num_out_of_turn = 0

    def open(self, view, pool):
        cursor = super().open(view, pool)
        return cursor if pool is Pool.RUNNING else WatchedCursor(self, cursor, view)


class WatchedCursor:
    def __init__(self, policy, cursor, view):
        self.policy, self.cursor, self.view = policy, cursor, view
        self.given = set()
        self.granted, self.refused = cursor.granted, cursor.refused

    def next(self):
        chosen = self.cursor.next()
        left = [each for each in self.view.waiting if each.id not in self.given]
        assert (chosen is None) == (not left)
        if chosen is None:
            return None
        self.given.add(chosen.id)
        left = [each for each in left if each.priority == min(one.priority for one in left)]
        able = [each for each in left if self.policy.credit(each.priority, each.tenant) > 0]
        best = min(able, key=lambda each: (-self.view.num_cached_tokens(each), each.queue_position))
        assert chosen is best
        self.policy.num_choices += 1
        self.policy.num_out_of_turn += chosen is not left[0]
        return chosen


@pytest.mark.parametrize("quantum", [QUANTUM, 1e15])
def test_whoever_is_chosen_has_the_most_cached_of_those_with_credit(quantum):
    """What is known of who waits is kept by what is heard; here against a look at everybody, with evictions."""
    num_choices = num_out_of_turn = 0
    for seed in range(4):
        order = Watched(quantum_tokens=quantum)
        play(overload_with_prefixes(seed), policies(order), steady=False)
        num_choices += order.num_choices
        num_out_of_turn += order.num_out_of_turn
        assert not order._entries
        assert not order._wanted
        assert not order._bills
        assert not order._filling
    assert num_out_of_turn > num_choices // 3


def test_the_longest_cached_prefix_goes_first():
    jobs = [
        job("first", document="x"),
        job("other", at=1, document="y"),
        job("none", at=2),
        job("same", at=3, document="x"),
    ]
    assert admitted(jobs, fair_prefix()) == ["first", "same", "other", "none"]
    assert admitted(jobs, Fcfs()) == ["first", "other", "none", "same"]


def test_what_is_being_computed_counts_as_it_is_filled():
    """`long` takes four steps. Of what `same` shares with it a part was cached when it came, and in the end it is more
    than what `other` finds, which came before it."""
    jobs = [job("first", document="y", prompt=48), job("long", at=1, document="x", prompt=64, priority=-1)]
    jobs += [job("other", at=2, document="y", prompt=48), job("same", at=7_500_000, document="x", prompt=64)]
    chunks = {"max_num_seqs": 1, "max_num_batched_tokens": 24, "long_prefill_token_threshold": 16}
    assert admitted(jobs, Watched(quantum_tokens=1e15), **chunks) == ["first", "long", "same", "other"]


def test_the_turn_goes_on_when_the_credit_is_spent():
    """`hot` has the longer prefixes for ever; without credit that ends, it is served first for ever."""
    jobs = [job(f"hot-{number:02}", "hot", document="x") for number in range(20)]
    jobs += [job(f"cold-{number:02}", "cold", at=1, prompt=4) for number in range(20)]
    fair = Counter(each.partition("-")[0] for each in admitted(jobs, fair_prefix())[:19])
    assert fair["cold"] >= 7
    plain = admitted(jobs, longest_prefix())
    assert {each.partition("-")[0] for each in plain[:20]} == {"hot"}


def test_a_larger_quantum_uses_more_of_the_cache():
    """Two tenants with a document each, and room for one of them."""
    jobs = [
        job(f"{tenant}-{number:02}", tenant, at=number, document=tenant, prompt=64)
        for number in range(20)
        for tenant in ("a", "b")
    ]
    hits = [
        played(jobs, order, num_blocks=18, max_num_batched_tokens=128).statistics.num_cached_tokens
        for order in (FairTokens(), FairPrefix(quantum_tokens=8), FairPrefix(quantum_tokens=100), longest_prefix())
    ]
    assert hits == sorted(hits)
    assert hits[-1] > 1.3 * hits[1] > 0


def test_what_is_charged_is_what_was_computed_once():
    """Cached tokens are free, and what is computed again after a preemption is not charged again."""
    num_preemptions = num_cached = 0
    for seed in range(6):
        workload = overload_with_prefixes(seed)
        jobs = tuple(each for each in workload.jobs if each.leaves_after is None)
        order = longest_prefix()
        statistics = play(Workload(workload.limits, jobs), policies(order), steady=False).statistics
        num_preemptions += statistics.num_preemptions
        num_cached += statistics.num_cached_tokens
        num_computed = statistics.num_prompt_tokens - statistics.num_cached_tokens
        charged = sum(1e15 - order.credit(0, tenant) for tenant in order.class_of(0).lines)
        assert charged == num_computed + sum(each.num_output_tokens for each in jobs)
    assert num_preemptions > 15
    assert num_cached > 500


def test_weights_divide_the_service():
    jobs = [job(f"{tenant}-{number:02}", tenant) for number in range(30) for tenant in ("gold", "plain")]
    order = admitted(jobs, FairPrefix(quantum_tokens=QUANTUM, weights={"gold": 3.0}))[:24]
    assert 16 <= Counter(each.partition("-")[0] for each in order)["gold"] <= 20


def test_the_bound_holds_with_weights_too():
    """Services by weight, and the larger of what either may owe by its weight."""
    weights = {"tenant-0": 3.0, "tenant-1": 0.5}
    for seed in range(5):
        workload = overload_with_prefixes(seed)
        gap = widest_gap(workload, FairPrefix(quantum_tokens=QUANTUM, weights=weights), weights, COMPUTED)
        longest = max(each.request.num_prompt_tokens for each in workload.jobs)
        owed = (longest + workload.limits.num_blocks * workload.limits.block_size) / 0.5
        assert gap.service <= 2 * (QUANTUM + owed)


def test_whoever_comes_back_has_saved_up_a_quantum_at_most():
    jobs = [job("away-first", "away"), *(job(f"here-{number:02}", "here", at=1) for number in range(60))]
    jobs += [job(f"away-{number}", "away", at=120 * MS) for number in range(6)]
    order = admitted(jobs, fair_prefix())
    since = Counter(each.partition("-")[0] for each in order[order.index("away-0") :][:8])
    assert 3 <= since["away"] <= 5


def test_classes_go_first_and_tenants_have_an_account_in_each():
    jobs = [job(f"low-{number}", "a", priority=1, document="x") for number in range(2)]
    jobs += [job(f"high-{tenant}-{number}", tenant, priority=0) for tenant in ("a", "b") for number in range(2)]
    # low-0 is alone when it comes, and low-1 finds its prefix cached.
    assert admitted(jobs, fair_prefix())[0] == "low-0"
    assert admitted(jobs, fair_prefix())[-1] == "low-1"


@pytest.mark.parametrize(
    "wrong",
    [{"prompt_weight": 0.0}, {"output_weight": -1.0}, {"weights": {"a": float("inf")}}, {"quantum_tokens": 0.0}],
)
def test_a_number_that_is_none_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=rf"fair_prefix: {next(iter(wrong))}.* must be above 0"):
        FairPrefix(**wrong)


def test_a_quantum_that_gives_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"quantum_tokens must be at least 1, not 0\.5"):
        FairPrefix(quantum_tokens=0.5)


def test_what_is_kept_of_tenants_is_bounded(monkeypatch):
    monkeypatch.setattr("rota.serving.policies.order.fair_prefix._NUM_TENANTS_MAX", 40)
    jobs = [job(f"r{number}", f"tenant-{number}", at=number * 8 * MS, output=1) for number in range(300)]
    order = fair_prefix()
    played(jobs, order)
    group = order.class_of(0)
    assert len(group.lines) <= 40
    assert len(group.parked) + len(group.heads) < 200


def test_nobody_is_lost_when_notes_are_thinned_out(monkeypatch):
    monkeypatch.setattr("rota.serving.policies.order.fair_prefix._NUM_STALE", -4)
    for seed in range(4):
        play(overload_with_prefixes(seed), policies(Watched(quantum_tokens=QUANTUM)), steady=False)
