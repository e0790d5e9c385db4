"""A run in one object, as `--json` prints it: in all, by class and by tenant."""

from collections.abc import Iterable
from typing import Any

import msgspec

from rota.base.instant import NANOSECONDS_PER_SECOND
from rota.serving.metrics.definitions import (
    Distribution,
    RequestRecord,
    per_second,
    prefix_hit_rate,
    slo_attainment,
)
from rota.serving.metrics.latencies import Latencies
from rota.serving.metrics.length_errors import LengthFacts


class RunFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a summary says of a run that its requests do not know."""

    num_steps: int
    num_preemptions: int
    num_cached_tokens: int
    """Prompt tokens found in a prefix cache."""
    num_queried_tokens: int
    """Prompt tokens that were looked up in one."""
    cpu_seconds: float
    peak_rss_mb: float
    seed: int | None
    config_hash: str
    journal_digest: str | None
    version: str
    lengths: tuple[LengthFacts, ...] | msgspec.UnsetType = msgspec.UNSET
    """What predictions of output length were worth, if there were any."""


class GroupSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a set of requests. Latencies are of those that finished; TTFT of all that got a first token.

    `slo_attainment` has all requests in its denominator. Where no targets were given, all that finished meet them.
    """

    num_requests: int
    num_finished: int
    num_rejected: int
    num_failed: int
    num_aborted: int
    ttft_ms: Distribution
    tpot_ms: Distribution
    e2e_ms: Distribution
    goodput_rps: float | None
    slo_attainment: float | None
    output_tokens_per_second: float | None


class ClassSummary(GroupSummary, frozen=True, kw_only=True):
    """The requests of one priority."""

    priority: int


class TenantSummary(GroupSummary, frozen=True, kw_only=True):
    """The requests of one tenant."""

    tenant: str


class Summary(GroupSummary, frozen=True, kw_only=True):
    """A whole run. Every value is JSON-safe: None where there is nothing to say, never NaN."""

    span_seconds: float
    """From the first arrival to the last end."""
    num_preemptions: int
    prefix_hit_rate: float | None
    num_steps: int
    cpu_seconds: float
    peak_rss_mb: float
    seed: int | None
    config_hash: str
    journal_digest: str | None
    version: str
    by_class: tuple[ClassSummary, ...]
    """Highest class, that is lowest number, first."""
    by_tenant: tuple[TenantSummary, ...]
    """By name."""
    lengths: tuple[LengthFacts, ...] | msgspec.UnsetType = msgspec.UNSET
    """Of each predictor of output lengths that was asked."""


class _Group:
    """Counts and latencies of one set of requests."""

    def __init__(self) -> None:
        self.counts = {"finished": 0, "rejected": 0, "failed": 0, "aborted": 0}
        self.num_met = 0
        self.num_output_tokens = 0
        self.ttft, self.tpot, self.e2e = Latencies(), Latencies(), Latencies()

    def add(self, record: RequestRecord, ttft: int | None, tpot: int | None, e2e: int | None, *, is_met: bool) -> None:
        self.counts[record.status] += 1
        self.num_met += is_met
        self.num_output_tokens += record.num_output_tokens
        if ttft is not None:
            self.ttft.add(ttft)
        if tpot is not None:
            self.tpot.add(tpot)
        if e2e is not None:
            self.e2e.add(e2e)

    def summary(self, span: int) -> GroupSummary:
        num_requests = sum(self.counts.values())
        return GroupSummary(
            num_requests=num_requests,
            num_finished=self.counts["finished"],
            num_rejected=self.counts["rejected"],
            num_failed=self.counts["failed"],
            num_aborted=self.counts["aborted"],
            ttft_ms=self.ttft.distribution_ms(),
            tpot_ms=self.tpot.distribution_ms(),
            e2e_ms=self.e2e.distribution_ms(),
            goodput_rps=per_second(self.num_met, span),
            slo_attainment=slo_attainment(self.num_met, num_requests),
            output_tokens_per_second=per_second(self.num_output_tokens, span),
        )


class Tally:
    """A summary in the making: takes records in any order, and keeps no more of a long run than of a short one (see
    `Latencies`).

    Rates of classes and tenants are over the span of the whole run, so that they add up.
    """

    def __init__(self) -> None:
        self._total = _Group()
        self._classes: dict[int, _Group] = {}
        self._tenants: dict[str, _Group] = {}
        self._begins: int | None = None
        self._ends = 0

    def add(self, record: RequestRecord) -> None:
        """Take the record of one request that has ended."""
        priority, tenant = record.priority, record.tenant
        of_class, of_tenant = self._classes.get(priority), self._tenants.get(tenant)
        if of_class is None:
            of_class = self._classes[priority] = _Group()
        if of_tenant is None:
            of_tenant = self._tenants[tenant] = _Group()
        ttft, tpot, e2e, is_met = record.ttft, record.tpot, record.e2e, record.meets_slo
        for group in (self._total, of_class, of_tenant):
            group.add(record, ttft, tpot, e2e, is_met=is_met)
        if self._begins is None or record.arrived_at < self._begins:
            self._begins = record.arrived_at
        if record.finished_at > self._ends:
            self._ends = record.finished_at

    def summary(self, facts: RunFacts) -> Summary:
        """What it comes to."""
        span = 0 if self._begins is None else self._ends - self._begins
        by_class = [(priority, self._classes[priority].summary(span)) for priority in sorted(self._classes)]
        by_tenant = [(tenant, self._tenants[tenant].summary(span)) for tenant in sorted(self._tenants)]
        return Summary(
            **_fields(self._total.summary(span)),
            span_seconds=span / NANOSECONDS_PER_SECOND,
            num_preemptions=facts.num_preemptions,
            prefix_hit_rate=prefix_hit_rate(facts.num_cached_tokens, facts.num_queried_tokens),
            num_steps=facts.num_steps,
            cpu_seconds=facts.cpu_seconds,
            peak_rss_mb=facts.peak_rss_mb,
            seed=facts.seed,
            config_hash=facts.config_hash,
            journal_digest=facts.journal_digest,
            version=facts.version,
            by_class=tuple(ClassSummary(priority=priority, **_fields(group)) for priority, group in by_class),
            by_tenant=tuple(TenantSummary(tenant=tenant, **_fields(group)) for tenant, group in by_tenant),
            lengths=facts.lengths,
        )


def summarize(records: Iterable[RequestRecord], facts: RunFacts) -> Summary:
    """The summary of a run, in one pass over its records in any order."""
    tally = Tally()
    for record in records:
        tally.add(record)
    return tally.summary(facts)


def _fields(group: GroupSummary) -> dict[str, Any]:
    return {name: getattr(group, name) for name in GroupSummary.__struct_fields__}
