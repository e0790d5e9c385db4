"""Metrics follow their definitions, count those who did not get through, and never print what is not a number."""

import json
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rota.base.instant import Instant, milliseconds, seconds
from rota.serving.metrics.definitions import Distribution, RequestRecord, distribution_ms, itl, prefix_hit_rate
from rota.serving.metrics.summary import RunFacts, Summary, summarize
from rota.serving.model.request import SLO, RequestId, TenantId

FACTS = RunFacts(
    num_steps=7,
    num_preemptions=3,
    num_cached_tokens=25,
    num_queried_tokens=100,
    cpu_seconds=1.5,
    peak_rss_mb=80.0,
    seed=4,
    config_hash="ab",
    journal_digest=None,
    version="0.1.0",
)
KEYS = [
    "num_requests",
    "num_finished",
    "num_rejected",
    "num_failed",
    "ttft_ms",
    "tpot_ms",
    "e2e_ms",
    "goodput_rps",
    "slo_attainment",
    "num_preemptions",
    "prefix_hit_rate",
    "num_steps",
    "cpu_seconds",
    "peak_rss_mb",
    "seed",
    "config_hash",
    "journal_digest",
    "version",
    "by_class",
    "by_tenant",
]


def record(**changes: Any) -> RequestRecord:
    """A request of 11 tokens: 100 ms to the first, 200 ms more to the last."""
    base = RequestRecord(
        id=RequestId("r"),
        tenant=TenantId("default"),
        priority=0,
        arrived_at=Instant(seconds(5)),
        first_token_at=Instant(seconds(5.1)),
        finished_at=Instant(seconds(5.3)),
        num_prompt_tokens=50,
        num_output_tokens=11,
        status="finished",
    )
    return msgspec.structs.replace(base, **changes)


REJECTED = record(status="rejected", first_token_at=None, finished_at=Instant(seconds(5)), num_output_tokens=0)


def test_latencies_by_their_definitions() -> None:
    one = record(first_scheduled_at=Instant(seconds(5.02)))
    assert (one.ttft, one.tpot, one.e2e, one.queue_time) == tuple(map(milliseconds, (100, 20, 300, 20)))
    assert record(num_output_tokens=1).tpot is None
    assert record().queue_time is None
    for status in ("failed", "aborted"):
        cut = record(status=status)
        assert (cut.ttft, cut.tpot, cut.e2e) == (milliseconds(100), None, None)
    assert (REJECTED.ttft, REJECTED.tpot, REJECTED.e2e) == (None, None, None)


def test_gaps_between_tokens() -> None:
    assert itl([10, 13, 13, 20]) == [3, 0, 7]
    assert itl([10]) == itl([]) == []


@dataclass(frozen=True)
class Case:
    slo: SLO
    met: bool
    num_output_tokens: int = 11


@pytest.mark.parametrize(
    "case",
    [
        Case(SLO(), True),
        Case(SLO(ttft=milliseconds(100)), True),
        Case(SLO(ttft=milliseconds(99)), False),
        Case(SLO(tpot=milliseconds(20)), True),
        Case(SLO(tpot=milliseconds(19.999)), False),
        Case(SLO(tpot=milliseconds(1)), True, num_output_tokens=1),
        Case(SLO(e2e=milliseconds(300)), True),
        Case(SLO(e2e=milliseconds(299)), False),
        Case(SLO(ttft=milliseconds(100), tpot=milliseconds(20), e2e=milliseconds(299)), False),
    ],
)
def test_every_target_must_be_met(case: Case) -> None:
    assert record(slo=case.slo, num_output_tokens=case.num_output_tokens).meets_slo is case.met
    for status in ("rejected", "failed", "aborted"):
        assert not record(slo=case.slo, status=status).meets_slo


def test_tpot_is_judged_by_the_total_not_by_a_rounded_mean() -> None:
    slow = record(finished_at=Instant(seconds(5.1) + 31), num_output_tokens=11)
    assert slow.tpot == 3
    assert not msgspec.structs.replace(slow, slo=SLO(tpot=3)).meets_slo


def test_percentiles_are_linear_between_ranks() -> None:
    got = distribution_ms([milliseconds(v) for v in (40, 10, 20, 30)])
    assert (got.mean, got.p50, got.p90) == (25.0, 25.0, pytest.approx(37.0))
    assert distribution_ms([milliseconds(7)]) == Distribution(7.0, 7.0, 7.0, 7.0)
    assert distribution_ms([]) == Distribution(None, None, None, None)


def test_those_who_did_not_get_through_are_in_the_denominator() -> None:
    late = record(slo=SLO(ttft=milliseconds(1)))
    summary = summarize([record(), record(), late, REJECTED, record(status="failed"), record(status="aborted")], FACTS)
    counts = (summary.num_requests, summary.num_finished, summary.num_rejected, summary.num_failed, summary.num_aborted)
    assert counts == (6, 3, 1, 1, 1)
    assert summary.slo_attainment == pytest.approx(2 / 6)
    assert summary.span_seconds == pytest.approx(0.3)
    assert summary.goodput_rps == pytest.approx(2 / 0.3)


def test_without_targets_all_that_finished_meet_them() -> None:
    assert summarize([record(), REJECTED], FACTS).slo_attainment == 0.5


def as_json(summary: Summary) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    loaded: dict[str, Any] = json.loads(msgspec.json.encode(summary), parse_constant=refuse)
    return loaded


@pytest.mark.parametrize("records", [[], [REJECTED], [record(num_output_tokens=1)]])
def test_nothing_to_say_is_null(records: list[RequestRecord]) -> None:
    facts = msgspec.structs.replace(FACTS, num_cached_tokens=0, num_queried_tokens=0)
    shown = as_json(summarize(records, facts))
    assert set(KEYS) <= set(shown)
    assert set(shown["ttft_ms"]) == set(shown["tpot_ms"]) == set(shown["e2e_ms"]) == {"mean", "p50", "p90", "p99"}
    assert set(shown["tpot_ms"].values()) == {None}
    assert shown["prefix_hit_rate"] is None
    assert (shown["slo_attainment"] is None) == (records == [])


def test_facts_of_the_run_are_carried_over() -> None:
    shown = as_json(summarize([record()], FACTS))
    for name in ("num_steps", "num_preemptions", "cpu_seconds", "peak_rss_mb", "seed", "config_hash", "version"):
        assert shown[name] == getattr(FACTS, name)
    assert shown["prefix_hit_rate"] == 0.25
    assert prefix_hit_rate(0, 0) is None


records = st.builds(
    lambda arrived, ttft, rest, tokens, status, priority, tenant: record(
        arrived_at=Instant(arrived),
        first_token_at=None if status == "rejected" else Instant(arrived + ttft),
        finished_at=Instant(arrived + ttft + rest),
        num_output_tokens=tokens,
        status=status,
        priority=priority,
        tenant=TenantId(tenant),
        slo=SLO(ttft=milliseconds(500)),
    ),
    st.integers(0, 10**12),
    st.integers(0, 10**9),
    st.integers(0, 10**11),
    st.integers(1, 500),
    st.sampled_from(["finished", "finished", "finished", "rejected", "failed", "aborted"]),
    st.integers(-1, 1),
    st.sampled_from(["a", "b", "c"]),
)


@given(st.lists(records, max_size=30), st.randoms())
def test_groups_add_up_and_order_does_not_matter(rows: list[RequestRecord], chance: Any) -> None:
    summary = summarize(rows, FACTS)
    shuffled = [*rows]
    chance.shuffle(shuffled)
    assert as_json(summarize(shuffled, FACTS)) == as_json(summary)
    for groups in (summary.by_class, summary.by_tenant):
        for name in ("num_requests", "num_finished", "num_rejected", "num_failed", "num_aborted"):
            assert sum(getattr(group, name) for group in groups) == getattr(summary, name)
        goodput = [group.goodput_rps for group in groups]
        if summary.goodput_rps is not None:
            assert sum(rate or 0 for rate in goodput) == pytest.approx(summary.goodput_rps)
    assert [group.priority for group in summary.by_class] == sorted({row.priority for row in rows})
    assert [group.tenant for group in summary.by_tenant] == sorted({row.tenant for row in rows})
    e2e = [row.e2e for row in rows if row.e2e is not None]
    assert summary.e2e_ms.mean == (pytest.approx(fmean(e2e) / 1e6) if e2e else None)
