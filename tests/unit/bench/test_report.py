"""What a load run is said to have measured, on requests whose times are known."""

import pytest

from rota.base.instant import Instant, milliseconds
from rota.serving.bench.client import Outcome, Sent
from rota.serving.bench.plan import Planned
from rota.serving.bench.report import LoadReport, report_of
from rota.serving.model.request import SLO, TenantId


def sent(
    index: int,
    *,
    late_ms: float = 0,
    chunks_ms: tuple[float, ...] = (100, 150, 200),
    outcome: Outcome = "finished",
    class_name: str = "all",
    tenant: str = "default",
    slo: SLO = SLO(),
    num_output_tokens: int = 3,
    error_kind: str = "",
) -> Sent:
    """Request number `index`, due at `index` seconds, sent late by so much, with chunks at times after its moment."""
    due = milliseconds(1_000 * index)
    planned = Planned(index, due, class_name, 10, 20, tenant=TenantId(tenant), slo=slo)
    return Sent(
        planned,
        scheduled_at=Instant(due),
        sent_at=Instant(due + milliseconds(late_ms)),
        ended_at=Instant(due + milliseconds(max(chunks_ms, default=300) + 1)),
        outcome=outcome,
        chunk_at=[Instant(due + milliseconds(at)) for at in chunks_ms],
        num_output_tokens=num_output_tokens,
        has_usage=True,
        num_prompt_tokens=13,
        error_kind=error_kind,
    )


def report(*all_sent: Sent, num_warmups: int = 0) -> LoadReport:
    return report_of(all_sent, url="u", model="m", seed=0, num_warmups=num_warmups, is_interrupted=False)


def test_time_counts_from_the_moment_not_from_the_sending() -> None:
    told = report(sent(0, late_ms=90), sent(1, late_ms=90))
    assert told.ttft_ms.mean == pytest.approx(100)
    assert told.ttft_from_send_ms.mean == pytest.approx(10)
    assert told.e2e_ms.mean == pytest.approx(200)
    assert told.schedule_lag_ms.max == pytest.approx(90)


def test_tpot_and_gaps() -> None:
    told = report(sent(0, chunks_ms=(100, 120, 180), num_output_tokens=5))
    assert told.tpot_ms.mean == pytest.approx(80 / 4)
    assert told.itl_ms.mean == pytest.approx(40)
    assert told.itl_ms.p50 == pytest.approx(40)


def test_whoever_got_no_answer_is_in_the_denominators() -> None:
    told = report(
        sent(0),
        sent(1),
        sent(2, chunks_ms=(), outcome="failed", error_kind="timeout", num_output_tokens=0),
        sent(3, chunks_ms=(), outcome="rejected", error_kind="status 503", num_output_tokens=0),
    )
    assert (told.num_requests, told.num_finished, told.num_failed, told.num_rejected) == (4, 2, 1, 1)
    assert told.errors == {"timeout": 1, "status 503": 1}
    assert told.slo_attainment == 0.5
    assert told.goodput_rps == pytest.approx(2 / told.span_seconds)
    assert told.achieved_rps == pytest.approx(2 / told.span_seconds)
    assert told.offered_rps == pytest.approx(1.0)


def test_goodput_is_of_those_that_meet_every_target() -> None:
    slo = SLO(ttft=milliseconds(110), tpot=milliseconds(60))
    told = report(sent(0, slo=slo), sent(1, slo=slo, chunks_ms=(120, 150, 200)), sent(2, slo=slo, chunks_ms=(100, 300)))
    assert told.slo_attainment == pytest.approx(1 / 3)


def test_warmups_are_left_out_of_everything() -> None:
    told = report(sent(0, chunks_ms=(5_000,)), sent(1), sent(2), num_warmups=1)
    assert (told.num_requests, told.num_warmups) == (2, 1)
    assert told.ttft_ms.mean == pytest.approx(100)


def test_classes_and_tenants_stand_apart_and_add_up() -> None:
    told = report(
        sent(0, class_name="high", tenant="a"),
        sent(1, class_name="low", tenant="a"),
        sent(2, class_name="low", tenant="b", outcome="failed", chunks_ms=(), error_kind="broken"),
    )
    assert {name: group.num_requests for name, group in told.by_class.items()} == {"high": 1, "low": 2}
    assert {name: group.num_requests for name, group in told.by_tenant.items()} == {"a": 2, "b": 1}
    assert sum(group.goodput_rps or 0 for group in told.by_class.values()) == pytest.approx(told.goodput_rps)
    assert told.by_class["low"].slo_attainment == 0.5


def test_who_counted_the_tokens_is_said() -> None:
    uncounted = sent(1)
    uncounted.has_usage = False
    assert report(sent(0)).token_counts == "usage"
    assert report(uncounted).token_counts == "chunks"
    assert report(sent(0), uncounted).token_counts == "mixed"
    assert (report(sent(0)).prompt_tokens_mean.asked, report(sent(0)).prompt_tokens_mean.counted) == (10, 13)


def test_nothing_measured_is_a_report_too() -> None:
    told = report()
    assert (told.num_requests, told.goodput_rps, told.offered_rps, told.schedule_lag_ms.p99) == (0, None, None, None)
