"""The HTML report of a run: numbers first, then how latencies spread, how load moved, and who got what."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rota.base.instant import NANOSECONDS_PER_SECOND
from rota.export.html import Figure, Section, Table, Text, write_report
from rota.serving.metrics.charts import latency_figure, line_figure, load_figure
from rota.serving.metrics.columns import Columns, by_class, by_tenant, columns_of
from rota.serving.metrics.definitions import RequestRecord, Samples
from rota.serving.metrics.load import LoadOverTime, load_over_time
from rota.serving.metrics.summary import ClassSummary, GroupSummary, Summary, TenantSummary
from rota.serving.model.instance import InstanceId

if TYPE_CHECKING:
    from rota.base.provenance import Provenance

NUM_INSTANCES_MAX = 8
"""Lines of one figure; of more instances the busiest are drawn."""
NUM_TENANTS_MAX = 50
"""Rows of the table of tenants; of more the ones with most requests are listed."""
NUM_TENANTS_DRAWN = 6
NUM_WINDOWS = 60
"""Of the chart of rates: enough to see bursts, few enough that a window holds many requests."""


def write_run_report(
    path: str | Path,
    title: str,
    *,
    records: Sequence[RequestRecord],
    summary: Summary,
    samples: Mapping[InstanceId, Samples],
    num_blocks: Mapping[InstanceId, int],
    provenance: "Provenance | None" = None,
) -> None:
    """Write the report of one run as one HTML file that opens offline, replacing what is there."""
    write_report(path, title, run_sections(records, summary, samples, num_blocks), provenance)


def run_sections(
    records: Sequence[RequestRecord],
    summary: Summary,
    samples: Mapping[InstanceId, Samples],
    num_blocks: Mapping[InstanceId, int],
) -> list[Section]:
    """The sections of the report. `num_blocks` is the size of each instance's memory, for its share in use."""
    sections: list[Section] = [Table("Requests", [_row("all", summary)], _CAPTION), Table("Run", [_run_row(summary)])]
    if len(summary.by_class) > 1:
        sections.append(
            Table("By class", [_row(str(each.priority), each) for each in summary.by_class], _CLASS_CAPTION)
        )
    if len(summary.by_tenant) > 1:
        tenants = sorted(summary.by_tenant, key=lambda each: (-each.num_requests, each.tenant))[:NUM_TENANTS_MAX]
        left_out = len(summary.by_tenant) - len(tenants)
        note = f"{left_out} tenants with fewer requests are left out." if left_out else ""
        sections.append(Table("By tenant", [_row(each.tenant, each) for each in tenants], note))
    reasons = Counter((record.status, record.reason) for record in records if record.status != "finished")
    if reasons:
        rows = [{"status": s, "reason": r, "requests": count} for (s, r), count in reasons.most_common(20)]
        sections.append(Table("Requests that did not finish", rows, "The 20 most frequent reasons."))
    if not records:
        return [*sections, Text("Figures", "No request ended, so there is nothing to draw.")]
    columns = columns_of(records)
    classes, tenants_drawn = by_class(columns), by_tenant(columns, NUM_TENANTS_DRAWN)
    sections.append(Figure("How latencies spread", latency_figure({"all": columns}), _LATENCY_CAPTION))
    if len(classes) > 1:
        sections.append(Figure("How latencies spread, by class", latency_figure(classes), _CLASS_CAPTION))
    if len(tenants_drawn) > 1:
        caption = f"The {len(tenants_drawn)} tenants with most requests." if len(summary.by_tenant) > 6 else ""
        sections.append(Figure("How latencies spread, by tenant", latency_figure(tenants_drawn), caption))
    sections += [
        Figure("Load over time", load_figure(_loads(samples, num_blocks)), _load_caption(samples)),
        Figure("What came and what was served in time", rates_figure(columns), _RATES_CAPTION),
    ]
    if len({record.instance_id for record in records}) > 1:
        sections.append(Table("By instance", instance_rows(records), "Where each request ran last."))
    return sections


_CAPTION = (
    "Latencies are of requests that got so far; times count from arrival at the front door. Attainment counts every "
    "request, those that were rejected, failed or aborted included."
)
_CLASS_CAPTION = "A lower number is a higher class."
_LATENCY_CAPTION = "Share of requests at or below a latency."
_RATES_CAPTION = (
    "Requests a second, by when they arrived: all, and those that met every target; where there are no targets, those "
    "that finished."
)


def rates_figure(columns: Columns) -> Any:
    """Arrivals and goodput over time, in windows of equal length."""
    at = columns.arrived_at - columns.arrived_at.min()
    num_windows = max(1, min(NUM_WINDOWS, len(at) // 10))
    window = (int(at.max()) + 1) / num_windows / NANOSECONDS_PER_SECOND
    index = (at / NANOSECONDS_PER_SECOND / window).astype(np.int64).clip(max=num_windows - 1)
    came = np.bincount(index, minlength=num_windows) / window
    met = np.bincount(index, columns.is_met, num_windows) / window
    middles = ((np.arange(num_windows) + 0.5) * window).round(3).tolist()
    lines = {"arrived": (middles, came.round(4).tolist()), "in time": (middles, met.round(4).tolist())}
    figure = line_figure(lines, x="seconds", y="requests a second")
    return figure.update_traces(mode="lines")


def instance_rows(records: Sequence[RequestRecord]) -> list[dict[str, Any]]:
    """What each instance got and did, by name; requests that never reached one are under None."""
    rows: dict[InstanceId | None, dict[str, Any]] = {}
    for record in records:
        empty = {"instance": record.instance_id, "requests": 0, "finished": 0, "prompt tokens": 0, "output tokens": 0}
        row = rows.setdefault(record.instance_id, empty)
        row["requests"] += 1
        row["finished"] += record.status == "finished"
        row["prompt tokens"] += record.num_prompt_tokens
        row["output tokens"] += record.num_output_tokens
    return [rows[key] for key in sorted(rows, key=lambda key: (key is None, key or ""))]


def _row(name: str, group: GroupSummary) -> dict[str, Any]:
    kind = {ClassSummary: "class", TenantSummary: "tenant"}.get(type(group), "requests")
    row: dict[str, Any] = {kind: name, "number": group.num_requests, "finished": group.num_finished}
    row |= {"rejected": group.num_rejected, "failed": group.num_failed, "aborted": group.num_aborted}
    for label, values in (("TTFT", group.ttft_ms), ("TPOT", group.tpot_ms), ("E2E", group.e2e_ms)):
        row |= {f"{label} p50 ms": values.p50, f"{label} p99 ms": values.p99}
    return row | {"SLO met": group.slo_attainment, "goodput /s": group.goodput_rps}


def _run_row(summary: Summary) -> dict[str, Any]:
    return {
        "span s": summary.span_seconds,
        "output tokens /s": summary.output_tokens_per_second,
        "steps": summary.num_steps,
        "preemptions": summary.num_preemptions,
        "prefix hit rate": summary.prefix_hit_rate,
        "CPU s": summary.cpu_seconds,
        "peak RSS MB": summary.peak_rss_mb,
    }


def _busiest(samples: Mapping[InstanceId, Samples]) -> list[InstanceId]:
    """At most `NUM_INSTANCES_MAX` instances with most work over time, by name."""
    load = {key: float(np.mean(np.add(s.running, s.waiting))) for key, s in samples.items() if s.at}
    return sorted(sorted(load, key=lambda key: (-load[key], key))[:NUM_INSTANCES_MAX])


def _loads(samples: Mapping[InstanceId, Samples], num_blocks: Mapping[InstanceId, int]) -> dict[str, LoadOverTime]:
    return {key: load_over_time({key: samples[key]}, {key: num_blocks[key]}) for key in _busiest(samples)}


def _load_caption(samples: Mapping[InstanceId, Samples]) -> str:
    num_drawn = len(_busiest(samples))
    return f"The {num_drawn} busiest of {len(samples)} instances." if num_drawn < len(samples) else ""
