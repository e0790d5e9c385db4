"""Tokens per minute are exact, queues are bounded for each and for all, and whoever is refused is told when to come
back."""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rota.base.errors import ConfigError
from rota.base.instant import Instant, after, seconds
from rota.serving.api import Admission, InstanceId, Request, RequestId, TenantId
from rota.serving.policies.admission import tenant_limits
from rota.serving.policies.admission.drain_rate import DrainRate
from rota.serving.policies.admission.tenant_limits import TenantLimits
from rota.serving.policies.admission.token_bucket import TokenBucket
from rota.testing.dispatch import ClusterSample, InstanceSample

MINUTE = 60 * 10**9


def asked(
    number: int = 0, tenant: str = "a", num_prompt_tokens: int = 10, max_tokens: int = 10, **more: Any
) -> Request:
    return Request(RequestId(f"r{number}"), Instant(0), num_prompt_tokens, max_tokens, tenant=TenantId(tenant), **more)


def at(now: float, *instances: InstanceSample) -> ClusterSample:
    return ClusterSample(Instant(seconds(now)), instances)


def ask(policy: TenantLimits, now: float, number: int = 0, num_unfinished: int = 0, **of_request: Any) -> Admission:
    return policy.admit(asked(number, **of_request), at(now), num_unfinished)


@given(
    rate=st.integers(1, 10**7),
    steps=st.lists(st.tuples(st.integers(0, 10**11), st.integers(0, 10**7), st.integers(0, 10**6)), max_size=30),
)
def test_a_bucket_is_exact(rate: int, steps: list[tuple[int, int, int]]) -> None:
    now, level, bucket = 0, Fraction(rate), TokenBucket(rate, Instant(0))
    for passed, wanted, unused in steps:
        now, wanted = now + passed, min(wanted, rate)
        level = min(Fraction(rate), level + Fraction(passed * rate, MINUTE))
        wait = bucket.wait(wanted, Instant(now))
        exact = max(Fraction(0), (wanted - level) * MINUTE / rate)
        assert wait == -(-exact.numerator // exact.denominator), "rounded up to whole nanoseconds, and no more"
        bucket.take(wanted)
        bucket.give_back(min(unused, wanted))
        level = min(Fraction(rate), level - wanted + min(unused, wanted))
        assert bucket.is_full(Instant(now)) == (level == rate)


@given(
    rate=st.integers(20, 5000),
    sizes=st.lists(st.tuples(st.floats(0, 5), st.integers(1, 400)), min_size=1, max_size=60),
    on_limit=st.sampled_from(["refuse", "queue"]),
)
def test_no_minute_has_more_than_two_buckets(rate: int, sizes: list[tuple[float, int]], on_limit: str) -> None:
    """What goes within any minute is at most a full bucket and what a minute brings; with a queue, in order of
    arrival."""
    policy = TenantLimits(tokens_per_minute=rate, on_limit=on_limit, max_wait_seconds=200)  # type: ignore[arg-type]
    now, gone = 0.0, []
    for number, (passed, size) in enumerate(sizes):
        now += passed
        answer = ask(policy, now, number, num_prompt_tokens=size, max_tokens=1)
        if answer.admitted:
            goes_at = answer.not_before or Instant(seconds(now))
            assert goes_at >= seconds(now)
            gone.append((goes_at, size + 1))
            assert on_limit == "queue" or answer.not_before is None
        else:
            assert answer.status == 429
            assert (answer.retry_after_seconds is None) == (size + 1 > rate)
    assert gone == sorted(gone, key=lambda each: each[0])
    for start, _ in gone:
        assert sum(size for when, size in gone if start <= when < start + MINUTE) <= 2 * rate


@pytest.mark.parametrize("on_limit", ["refuse", "queue"])
def test_retry_after_is_when_it_would_pass(on_limit: Any) -> None:
    policy = TenantLimits(tokens_per_minute=600, on_limit=on_limit, max_wait_seconds=10)
    assert ask(policy, 0, 1, num_prompt_tokens=590).admitted
    refused = ask(policy, 0, 2, num_prompt_tokens=190)
    if on_limit == "queue":
        assert not refused.admitted
        assert refused.retry_after_seconds == 10.0, "20 s of tokens, of which 10 may be waited here"
        assert ask(policy, 0, 3, num_prompt_tokens=90).not_before == seconds(10)
    else:
        assert refused.retry_after_seconds == 20.0
        assert not ask(policy, 19.99, 3, num_prompt_tokens=190).admitted
        assert ask(policy, 20, 4, num_prompt_tokens=190).admitted


def test_what_was_not_used_is_given_back_and_what_was_used_is_not() -> None:
    policy = TenantLimits(tokens_per_minute=1000)
    for number, (output, left) in enumerate(((100, 0), (None, 0), (0, 900))):
        name, request = f"t{number}", asked(number, f"t{number}", 100, 900)
        assert policy.admit(request, at(0), 0).admitted
        policy.request_ended(request, output)
        left = left if output == 0 else 800 if output == 100 else 0
        assert ask(policy, 0, 10 + number, tenant=name, num_prompt_tokens=left + 1, max_tokens=1).admitted is False
        if left:
            assert ask(policy, 0, 20 + number, tenant=name, num_prompt_tokens=left - 1, max_tokens=1).admitted


def test_queues_are_bounded_for_each_and_for_all() -> None:
    policy = TenantLimits(max_unfinished=5, max_unfinished_per_tenant=2, tenants={"big": {"max_unfinished": 3}})
    assert [ask(policy, 0, n, n).admitted for n in range(2)] == [True, True]
    assert not ask(policy, 0, 9, 2).admitted, "a has two already"
    assert [ask(policy, 0, 20 + n, 2 + n, tenant="big").admitted for n in range(3)] == [True, True, True]
    mine, everybodys = ask(policy, 0, 30, 4, tenant="big"), ask(policy, 0, 31, 5, tenant="c")
    assert (mine.status, everybodys.status) == (429, 503)
    assert mine.retry_after_seconds == everybodys.retry_after_seconds == 60.0, "nothing has ended yet"
    policy.request_ended(asked(20, "big"), 3)
    assert ask(policy, 1, 40, 4, tenant="big").admitted


def test_who_comes_back_does_so_one_place_after_the_other() -> None:
    drain = DrainRate(seconds(10))
    drain.let_in(Instant(0))
    for _ in range(20):
        drain.ended()
    assert [drain.turned_away(Instant(seconds(10))) for _ in range(5)] == [1.0, 1.0, 1.5, 2.0, 2.5]
    drain.let_in(Instant(seconds(11)))
    assert drain.turned_away(Instant(seconds(11))) == 1.0


def test_what_can_never_fit_is_refused_at_the_door() -> None:
    small = InstanceSample(InstanceId("a"), num_blocks=10, block_size=16)
    long = InstanceSample(InstanceId("b"), num_blocks=1000, block_size=16, max_model_len=320)
    policy = TenantLimits(fit_slack=0.0)

    def status(*instances: InstanceSample, **of_request: Any) -> int:
        answer = policy.admit(asked(**of_request), at(0, *instances), 0)
        return 0 if answer.admitted else answer.status

    assert status(small, num_prompt_tokens=100, max_tokens=61) == 400
    assert status(small, num_prompt_tokens=100, max_tokens=60) == 0
    assert status(small, long, num_prompt_tokens=100, max_tokens=220) == 0
    assert status(small, long, num_prompt_tokens=100, max_tokens=221) == 400
    assert status(small, num_prompt_tokens=159, max_tokens=1024, declares_max_tokens=False) == 0, (
        "a guess refuses nobody"
    )
    assert status(num_prompt_tokens=10**6) == 0, "nobody is ready, so nobody knows"


def test_memory_is_bounded_whatever_names_are_invented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenant_limits, "_NUM_TENANTS_MAX", 50)
    policy = TenantLimits(tokens_per_minute=100, tenants={"known": {"tokens_per_minute": 10**6}})
    for number in range(1000):
        request = asked(number, f"t{number}")
        if policy.admit(request, at(number * 0.001), 0).admitted:
            policy.request_ended(request, 10)
    assert len(policy._tenants) <= 50
    assert not policy._inside
    assert not ask(policy, 1.0, 1001, tenant="one more").admitted, "those beyond share one bucket, which is empty"
    assert ask(policy, 1.0, 1002, tenant="known", num_prompt_tokens=10**5).admitted
    assert ask(policy, 200.0, 1003, tenant="one more").admitted
    assert "one more" in policy._tenants, "the others are idle again, and forgotten"


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"max_unfinished": 0}, "max_unfinished"),
        ({"max_unfinished_per_tenant": 0}, "max_unfinished"),
        ({"tokens_per_minute": 0}, "tokens_per_minute"),
        ({"on_limit": "wait"}, "on_limit"),
        ({"max_wait_seconds": 0}, "max_wait_seconds"),
        ({"window_seconds": float("nan")}, "window_seconds"),
        ({"fit_slack": -0.1}, "fit_slack"),
        ({"tenants": {"a": {"max_unfinished": 0}}}, "tenants.a"),
        ({"tenants": {"a": {"tokens": 5}}}, "tenants.a"),
    ],
)
def test_bad_parameters_are_named(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        TenantLimits(**parameters)
    assert words in raised.value.message


def test_a_request_that_waits_goes_at_its_instant_in_the_simulator_too() -> None:
    from rota.serving.assemble import SystemConfig
    from rota.serving.model.instance import InstanceLimits, InstanceSpec
    from rota.serving.predictors.step_time.affine import AffineStepTime
    from rota.serving.sim.cluster import SimulatedCluster
    from rota.serving.stack import Parameters, StackConfig

    step_time = AffineStepTime(base_ms=1.0, token_us=0.0, kv_token_ns=0.0, seq_us=0.0)
    instances = (InstanceSpec(InstanceId("i0"), InstanceLimits(num_blocks=1000)),)

    def run(on_limit: str, rate: int) -> list[tuple[str, str, int]]:
        admission = {"tenants": {"hog": {"tokens_per_minute": rate, "on_limit": on_limit}}}
        stack = StackConfig(admission="tenant_limits", parameters=Parameters(admission=admission))
        arrivals = [
            (Request(RequestId(f"r{n}"), after(Instant(0), seconds(n * 0.1)), 99, 1, tenant=TenantId("hog")), 1)
            for n in range(12)
        ]
        cluster = SimulatedCluster(SystemConfig(stack, instances), arrivals, step_time)
        cluster.run()
        cluster.cluster.check()
        return [(each.id, each.status, each.first_token_at or 0) for each in cluster.records]

    free, refused, queued = run("refuse", 10**6), run("refuse", 600), run("queue", 600)
    assert [status for _, status, _ in free] == ["finished"] * 12
    assert [status for _, status, _ in refused].count("rejected") == 6, "six fill the bucket"
    assert [status for _, status, _ in queued] == ["finished"] * 12
    assert queued[-1][2] > seconds(59)
