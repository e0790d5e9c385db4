"""What a load run measured: latencies, goodput, errors by kind, and how well the generator itself kept its schedule."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import msgspec
import numpy as np

from rota import __version__
from rota.base.instant import NANOSECONDS_PER_SECOND, Duration, to_milliseconds
from rota.serving.bench.client import Sent
from rota.serving.metrics.definitions import Distribution, RequestRecord, distribution_ms, itl, per_second
from rota.serving.metrics.summary import GroupSummary, RunFacts, TenantSummary, summarize
from rota.serving.model.request import RequestId, TenantId

LAG_WARNING_MS = 20.0
"""A generator whose p99 lag is beyond this did not send what it was asked to."""


class Lag(msgspec.Struct, frozen=True):
    """How late requests left, in milliseconds after their moment."""

    p50: float | None
    p99: float | None
    max: float | None


class Lengths(msgspec.Struct, frozen=True):
    """Mean prompt tokens asked for, and as the server counted them."""

    asked: float | None
    counted: float | None


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """A load run. TTFT and E2E count from the moment at which a request was scheduled, not from its sending, so that a
    server that holds the generator up cannot look better for it. Requests that were refused, failed or aborted are in
    the denominators of `slo_attainment` and `goodput_rps`."""

    url: str
    model: str
    seed: int
    version: str
    is_interrupted: bool
    num_warmups: int
    """Sent first and left out of everything here."""
    num_requests: int
    num_finished: int
    num_rejected: int
    num_failed: int
    num_aborted: int
    errors: dict[str, int]
    """Requests that did not finish, by kind."""
    offered_rps: float | None
    """Requests a second that the schedule asked for."""
    sent_rps: float | None
    """Requests a second that left."""
    achieved_rps: float | None
    """Requests a second that were answered, from the first moment to the last answer."""
    span_seconds: float
    ttft_ms: Distribution
    ttft_from_send_ms: Distribution
    tpot_ms: Distribution
    itl_ms: Distribution
    e2e_ms: Distribution
    goodput_rps: float | None
    slo_attainment: float | None
    output_tokens_per_second: float | None
    num_output_tokens: int
    prompt_tokens_mean: Lengths
    token_counts: str
    """`usage`: the server counted output tokens; `chunks`: a chunk counts as one; `mixed`: some of each."""
    schedule_lag_ms: Lag
    by_class: dict[str, GroupSummary]
    by_tenant: dict[str, GroupSummary]


def report_of(
    sent: Sequence[Sent], *, url: str, model: str, seed: int, num_warmups: int, is_interrupted: bool
) -> LoadReport:
    """The report of a run. The first `num_warmups` requests of the schedule are left out."""
    measured = sorted((each for each in sent if each.planned.index >= num_warmups), key=lambda each: each.scheduled_at)
    records = [_record(each) for each in measured]
    summary = summarize(records, _FACTS)
    # Rates of a class are over the span of the whole run, as those of tenants are: so a class takes a tenant's place.
    by_class = summarize(
        [
            msgspec.structs.replace(record, tenant=TenantId(each.planned.class_name))
            for record, each in zip(records, measured, strict=True)
        ],
        _FACTS,
    )
    lags = [each.sent_at - each.scheduled_at for each in measured]
    return LoadReport(
        url=url,
        model=model,
        seed=seed,
        version=__version__,
        is_interrupted=is_interrupted,
        num_warmups=num_warmups,
        **_group_fields(summary),
        errors=dict(Counter(each.error_kind for each in measured if each.error_kind).most_common()),
        offered_rps=_rate([each.scheduled_at for each in measured]),
        sent_rps=_rate([each.sent_at for each in measured]),
        achieved_rps=per_second(summary.num_finished, round(summary.span_seconds * NANOSECONDS_PER_SECOND)),
        span_seconds=summary.span_seconds,
        ttft_from_send_ms=distribution_ms([each.chunk_at[0] - each.sent_at for each in measured if each.chunk_at]),
        itl_ms=distribution_ms(list(chain.from_iterable(itl(each.chunk_at) for each in measured))),
        num_output_tokens=sum(each.num_output_tokens for each in measured),
        prompt_tokens_mean=_prompt_lengths(measured),
        token_counts=_token_counts(measured),
        schedule_lag_ms=_lag(lags),
        by_class=_by_name(by_class.by_tenant),
        by_tenant=_by_name(summary.by_tenant),
    )


_FACTS = RunFacts(
    num_steps=0,
    num_preemptions=0,
    num_cached_tokens=0,
    num_queried_tokens=0,
    cpu_seconds=0.0,
    peak_rss_mb=0.0,
    seed=None,
    config_hash="",
    journal_digest=None,
    version=__version__,
)
"""A client sees nothing of the engine's steps and caches; none of this reaches the report."""


def _record(sent: Sent) -> RequestRecord:
    planned = sent.planned
    return RequestRecord(
        id=RequestId(str(planned.index)),
        tenant=planned.tenant,
        priority=planned.priority,
        arrived_at=sent.scheduled_at,
        first_token_at=sent.chunk_at[0] if sent.chunk_at else None,
        finished_at=sent.chunk_at[-1] if sent.outcome == "finished" and sent.chunk_at else sent.ended_at,
        num_prompt_tokens=planned.num_prompt_tokens,
        num_output_tokens=sent.num_output_tokens,
        status=sent.outcome,
        reason=sent.detail,
        slo=planned.slo,
    )


def _group_fields(group: GroupSummary) -> dict[str, Any]:
    return {name: getattr(group, name) for name in GroupSummary.__struct_fields__}


def _by_name(groups: Sequence[TenantSummary]) -> dict[str, GroupSummary]:
    return {group.tenant: GroupSummary(**_group_fields(group)) for group in groups}


def _rate(moments: Sequence[int]) -> float | None:
    """Events a second: gaps over the time from the first to the last."""
    return per_second(len(moments) - 1, max(moments) - min(moments)) if len(moments) > 1 else None


def _lag(lags: Sequence[int]) -> Lag:
    if not lags:
        return Lag(None, None, None)
    p50, p99 = (round(float(value)) for value in np.percentile(np.asarray(lags), (50, 99)))
    return Lag(to_milliseconds(p50), to_milliseconds(p99), to_milliseconds(Duration(max(lags))))


def _prompt_lengths(measured: Sequence[Sent]) -> Lengths:
    counted = [each for each in measured if each.num_prompt_tokens]
    if not counted:
        return Lengths(_mean([each.planned.num_prompt_tokens for each in measured]), None)
    return Lengths(
        _mean([each.planned.num_prompt_tokens for each in counted]),
        _mean([each.num_prompt_tokens or 0 for each in counted]),
    )


def _mean(values: Sequence[int]) -> float | None:
    return sum(values) / len(values) if values else None


def _token_counts(measured: Sequence[Sent]) -> str:
    finished = [each.has_usage for each in measured if each.outcome == "finished"]
    return "usage" if all(finished) else "mixed" if any(finished) else "chunks"
