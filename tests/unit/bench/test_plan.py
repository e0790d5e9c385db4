"""What is sent and when: bounded, in order, drawn from a seed, and of the wanted length."""

from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rota.base.instant import Duration, seconds
from rota.base.random_streams import RandomStreams
from rota.serving.bench.plan import LoadClass, Mix, TenantShare, at_rate, bounded, from_trace
from rota.serving.bench.prompts import WORDS, Prompts
from rota.serving.model.request import SLO, TenantId
from rota.serving.workload.arrivals import Arrival
from rota.serving.workload.generator import Lengths

CLASSES = (
    LoadClass("high", 1.0, priority=-1, slo=SLO(ttft=seconds(1))),
    LoadClass("low", 3.0, tenant=TenantId("batch"), prompt=Lengths({"0": 5, "1": 5})),
)
TENANTS = (TenantShare(TenantId("a"), 3.0), TenantShare(TenantId("b"), 1.0))
LENGTHS = Lengths({"0": 10, "1": 100})


def rate_plan(seed: int, rate: float = 10.0, burstiness: float = 1.0):  # type: ignore[no-untyped-def]
    streams = RandomStreams(seed)
    return at_rate(rate, burstiness, LENGTHS, LENGTHS, Mix(CLASSES, TENANTS, streams), streams)


@given(seed=st.integers(0, 10_000), num_requests=st.integers(1, 200), duration=st.floats(0.1, 20))
def test_a_bounded_plan_keeps_both_bounds_and_its_order(seed: int, num_requests: int, duration: float) -> None:
    plan = list(bounded(rate_plan(seed), num_requests=num_requests, duration=seconds(duration)))
    assert len(plan) <= num_requests
    assert all(planned.at <= seconds(duration) for planned in plan)
    assert [planned.at for planned in plan] == sorted(planned.at for planned in plan)
    assert [planned.index for planned in plan] == list(range(len(plan)))
    assert plan == list(bounded(rate_plan(seed), num_requests=num_requests, duration=seconds(duration)))


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (100.0, 0.1)])
def test_rate_and_burstiness_are_as_asked(burstiness: float, variation: float) -> None:
    plan = list(islice(rate_plan(3, 50.0, burstiness), 20_000))
    gaps = [later.at - earlier.at for earlier, later in pairwise(plan)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert 1e9 / mean == pytest.approx(50, rel=0.05)
    assert deviation / mean == pytest.approx(variation, rel=0.05)


def test_classes_and_tenants_get_their_shares_and_facts() -> None:
    plan = list(islice(rate_plan(1), 8_000))
    high = [planned for planned in plan if planned.class_name == "high"]
    assert len(high) / len(plan) == pytest.approx(0.25, abs=0.02)
    assert {planned.priority for planned in high} == {-1}
    assert {planned.slo.ttft for planned in high} == {seconds(1)}
    from_a = sum(planned.tenant == "a" for planned in high)
    assert from_a / len(high) == pytest.approx(0.75, abs=0.03)
    low = [planned for planned in plan if planned.class_name == "low"]
    assert {planned.tenant for planned in low} == {"batch"}, "a class's own tenant outranks the draw"
    assert {planned.num_prompt_tokens for planned in low} == {5}
    assert all(10 <= planned.num_prompt_tokens <= 100 for planned in high)


def test_another_rate_leaves_lengths_and_classes_alone() -> None:
    slow, fast = islice(rate_plan(1, 1.0), 50), islice(rate_plan(1, 9.0), 50)
    for one, other in zip(slow, fast, strict=True):
        assert (one.class_name, one.num_prompt_tokens, one.max_tokens) == (
            other.class_name,
            other.num_prompt_tokens,
            other.max_tokens,
        )


def test_a_trace_keeps_its_facts_but_for_caps_and_speed() -> None:
    arrivals = [
        Arrival(at=seconds(10), num_prompt_tokens=5_000, num_output_tokens=7, prefix_hashes=(1, 2), priority=3),
        Arrival(at=seconds(20), num_prompt_tokens=6, num_output_tokens=900, session="s", tenant=TenantId("t")),
    ]
    mix = Mix((LoadClass(),), (), RandomStreams(0))
    first, second = from_trace(arrivals, 2.0, mix, max_prompt_tokens=1_000, max_output_tokens=100)
    assert (first.at, second.at) == (seconds(5), seconds(10))
    assert (first.num_prompt_tokens, first.max_tokens, first.priority) == (1_000, 7, 3)
    assert (second.num_prompt_tokens, second.max_tokens, second.tenant, second.session) == (6, 100, "t", "s")
    (uncapped, _) = from_trace(arrivals, 1.0, mix)
    assert (uncapped.num_prompt_tokens, uncapped.prefix_hashes) == (5_000, (1, 2))


@given(index=st.integers(0, 10**9), num_tokens=st.integers(1, 3_000))
def test_a_prompt_has_as_many_words_as_asked(index: int, num_tokens: int) -> None:
    text = PROMPTS.text(index, num_tokens)
    assert len(text.split(" ")) == num_tokens
    assert set(text.split(" ")) <= set(WORDS)


PROMPTS = Prompts(RandomStreams(0))


def test_prompts_share_a_beginning_only_where_their_hashes_do() -> None:
    prompts = Prompts(RandomStreams(0))
    heads = {" ".join(prompts.text(index, 64).split(" ")[:6]) for index in range(3_000)}
    assert len(heads) == 3_000
    one, other = prompts.text(1, 100, (7, 8), 32), prompts.text(2, 100, (7, 9), 32)
    assert one.split(" ")[:32] == other.split(" ")[:32]
    assert one.split(" ")[32:38] != other.split(" ")[32:38]
    assert len(prompts.text(3, 50, (7, 8), 32).split(" ")) == 50
    named = {prompts._words(index, 0, 64) for index in range(3_000)}
    assert len(named) == 3_000, "its number alone tells a text from all others, wherever the rest begins"


def test_the_same_seed_makes_the_same_prompts() -> None:
    one, other = (Prompts(RandomStreams(5)).text(3, 200) for _ in range(2))
    assert one == other
    assert one != Prompts(RandomStreams(6)).text(3, 200)


def test_a_tokenizer_cuts_to_length() -> None:
    class Letters:
        def cut(self, text: str, num_tokens: int) -> str:
            return text[:num_tokens]

    assert len(Prompts(RandomStreams(0), Letters()).text(0, 33)) == 33


def test_durations_are_inclusive() -> None:
    plan = list(from_trace([Arrival(at=Duration(5), num_prompt_tokens=1, num_output_tokens=1)], 1.0, MIX))
    assert list(bounded(plan, num_requests=None, duration=Duration(5))) == plan
    assert list(bounded(plan, num_requests=None, duration=Duration(4))) == []


MIX = Mix((LoadClass(),), (), RandomStreams(0))
