"""A tenant's work follows its prefixes, and is spread over the instances within a bound."""

import random

import pytest

from rota.base.errors import ConfigError
from rota.base.instant import Instant
from rota.serving.api import InstanceId, Request, RequestId, TenantId
from rota.serving.policies.dispatch import prefix_by_credit
from rota.serving.policies.dispatch.prefix_by_credit import PrefixByCredit
from rota.testing.dispatch import ClusterSample, InstanceSample

A, B = TenantId("a"), TenantId("b")


def request(number, tenant=A, num_prompt_tokens=160, num_blocks=10, max_tokens=1000):
    return Request(
        RequestId(f"r{number}"),
        Instant(0),
        num_prompt_tokens,
        max_tokens,
        tenant=tenant,
        block_hashes=tuple(range(num_blocks)),
    )


def cluster(*num_cached_blocks, num_tokens=()):
    loads = num_tokens or [0] * len(num_cached_blocks)
    return ClusterSample(
        Instant(5),
        tuple(
            InstanceSample(InstanceId(f"i{place}"), 0, load, num_cached_blocks=num_blocks)
            for place, (num_blocks, load) in enumerate(zip(num_cached_blocks, loads, strict=True))
        ),
    )


def test_the_longest_prefix_is_followed_and_of_equals_the_least_loaded():
    policy = PrefixByCredit()
    assert policy.pick(request(0), cluster(2, 8, 4)).instance_id == "i1"
    assert policy.pick(request(1), cluster(8, 8, 4, num_tokens=(50, 20, 0))).instance_id == "i1"
    assert policy.pick(request(2), cluster(0, 0, 0, num_tokens=(50, 20, 5))).instance_id == "i2"


def test_without_credit_there_it_goes_where_there_is_some():
    policy = PrefixByCredit(quantum_tokens=10, expected_output_tokens=50)
    hot = cluster(0, 10, 0, num_tokens=(5, 0, 2))
    assert [policy.pick(request(number), hot).instance_id for number in range(3)] == ["i1", "i2", "i0"]
    assert policy.pick(request(4, B), hot).instance_id == "i1", "every tenant has its own"


def spread(policy, seed, *, tell=True, num_requests=300):
    """By how much what was sent to the instances differs, at the widest, when one of them has all the prefixes."""
    draw = random.Random(seed)
    sent, flying, widest = {"i0": 0.0, "i1": 0.0, "i2": 0.0}, [], 0.0
    for number in range(num_requests):
        fact = request(number, num_prompt_tokens=draw.randint(160, 400))
        view = cluster(0, 10, 0)
        chosen = policy.pick(fact, view).instance_id
        num_cached = next(each for each in view.instances if each.id == chosen).num_prefix_tokens(fact)
        sent[chosen] += fact.num_prompt_tokens - num_cached
        flying.append((fact, chosen))
        if len(flying) > 4:
            ended, where = flying.pop(draw.randrange(4))
            num_output_tokens = draw.randint(1, 100)
            sent[where] += num_output_tokens
            policy.request_ended(ended, num_output_tokens if tell else None)
        widest = max(widest, max(sent.values()) - min(sent.values()))
    return widest


def test_what_a_tenant_sends_to_two_instances_differs_within_the_bound():
    # One of them may have all five whose answers are still to come, each counted wrongly by a hundred at most.
    for seed in range(20):
        policy = PrefixByCredit(quantum_tokens=500, expected_output_tokens=100)
        bound = 2 * (500 + 400 + 100) + 5 * 100
        assert spread(policy, seed) <= bound
        assert spread(PrefixByCredit(quantum_tokens=1e15), seed) > 5 * bound, "otherwise the bound says nothing"


def test_what_was_expected_is_put_right_at_the_end():
    policy = PrefixByCredit(quantum_tokens=1000, expected_output_tokens=100)
    one = cluster(4)
    policy.pick(request(0), one)
    assert policy.credit(A, InstanceId("i0")) == 1000 - (160 - 64) - 100
    policy.request_ended(request(0), 20)
    assert policy.credit(A, InstanceId("i0")) == 1000 - (160 - 64) - 20
    policy.pick(request(1), one)
    expected = 100 + 0.2 * (20 - 100)
    assert policy.credit(A, InstanceId("i0")) == pytest.approx(1000 - 2 * 96 - 20 - expected)
    policy.request_ended(request(1), None)
    assert policy.credit(A, InstanceId("i0")) == pytest.approx(1000 - 2 * 96 - 20 - expected), "nothing is known of it"


def test_a_client_that_allows_less_is_expected_to_get_less():
    policy = PrefixByCredit(quantum_tokens=1000)
    policy.pick(request(0, max_tokens=7), cluster(0))
    assert policy.credit(A, InstanceId("i0")) == 1000 - 160 - 7


def test_one_that_is_sent_elsewhere_is_given_back_first():
    policy = PrefixByCredit(quantum_tokens=1000, expected_output_tokens=100)
    policy.pick(request(0), cluster(10, 0))
    assert policy.credit(A, InstanceId("i0")) < 1000
    failed_there = ClusterSample(Instant(6), cluster(10, 0).instances[1:])
    assert policy.pick(request(0), failed_there).instance_id == "i1"
    assert policy.credit(A, InstanceId("i0")) == 1000
    assert policy.credit(A, InstanceId("i1")) == 1000 - 160 - 100


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(prefix_by_credit, "_NUM_TENANTS_MAX", 10)
    policy = PrefixByCredit()
    for number in range(100):
        fact = request(number, TenantId(f"t{number % 30}"))
        instances = tuple(InstanceSample(InstanceId(f"i{number + place:03}")) for place in range(3))
        policy.pick(fact, ClusterSample(Instant(5), instances))
        policy.request_ended(fact, 5)
    assert len(policy._tenants) == 10
    assert not policy._flying
    steady = request(1000)
    for number in range(100):
        policy.pick(steady, ClusterSample(Instant(5), (InstanceSample(InstanceId(f"j{number:03}")),)))
    assert len(policy._tenants[A].credits) <= 11


@pytest.mark.parametrize(
    "wrong", [{"prompt_weight": 0.0}, {"output_weight": -1.0}, {"quantum_tokens": 0.5}, {"expected_output_tokens": 0}]
)
def test_a_number_that_is_none_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=rf"prefix_by_credit: {next(iter(wrong))} must be"):
        PrefixByCredit(**wrong)
