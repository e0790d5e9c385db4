"""The HTML report of a run: numbers first, then how latencies spread, how load moved, and who got what."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rota.base.instant import NANOSECONDS_PER_MILLISECOND, NANOSECONDS_PER_SECOND
from rota.export.html import Figure, Section, Table, Text, write_report
from rota.serving.metrics.definitions import RequestRecord, Samples
from rota.serving.metrics.summary import ClassSummary, GroupSummary, Summary, TenantSummary
from rota.serving.model.instance import InstanceId

if TYPE_CHECKING:
    from rota.base.provenance import Provenance

NUM_POINTS_MAX = 2000
"""Of one line of a figure: more than a screen has pixels to show."""
NUM_INSTANCES_MAX = 8
"""Lines of one figure; of more instances the busiest are drawn."""
NUM_TENANTS_MAX = 50
"""Rows of the table of tenants; of more the ones with most requests are listed."""


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
    sections += [
        Figure("How latencies spread", latency_figure(records), "Share of requests at or below a latency."),
        Figure("Load over time", load_figure(samples, num_blocks), _load_caption(samples)),
    ]
    if len({record.instance_id for record in records}) > 1:
        sections.append(Table("By instance", instance_rows(records), "Where each request ran last."))
    return sections


_CAPTION = (
    "Latencies are of requests that got so far; times count from arrival at the front door. Attainment counts every "
    "request, those that were rejected, failed or aborted included."
)
_CLASS_CAPTION = "A lower number is a higher class."


def latency_figure(records: Sequence[RequestRecord]) -> Any:
    """Cumulative shares of TTFT, TPOT and E2E side by side, one line for each class."""
    from plotly.subplots import make_subplots

    names = ("ttft", "tpot", "e2e")
    figure = make_subplots(rows=1, cols=3, subplot_titles=("TTFT", "TPOT", "E2E"), shared_yaxes=True)
    priorities = sorted({record.priority for record in records})
    for index, priority in enumerate(priorities[: len(_COLORS)]):
        for column, name in enumerate(names, start=1):
            values = [getattr(r, name) for r in records if r.priority == priority and getattr(r, name) is not None]
            shares = np.linspace(0, 1, min(len(values), NUM_POINTS_MAX)) if values else np.array([])
            nanoseconds = np.quantile(np.asarray(values, dtype=np.int64), shares) if values else np.array([])
            figure.add_scatter(
                x=np.round(nanoseconds / NANOSECONDS_PER_MILLISECOND, 4).tolist(),
                y=np.round(shares, 5).tolist(),
                mode="lines",
                name=f"class {priority}",
                legendgroup=str(priority),
                showlegend=column == 1 and len(priorities) > 1,
                line={"color": _COLORS[index], "width": 2},
                row=1,
                col=column,
            )
    figure.update_xaxes(title_text="ms", type="log", gridcolor=_GRID, exponentformat="none")
    figure.update_yaxes(gridcolor=_GRID, rangemode="tozero")
    figure.update_yaxes(title_text="share of requests", row=1, col=1)
    return _styled(figure).update_layout(height=420)


def load_figure(samples: Mapping[InstanceId, Samples], num_blocks: Mapping[InstanceId, int]) -> Any:
    """Running, waiting and the share of memory in use over time, one line for each of the busiest instances."""
    from plotly.subplots import make_subplots

    titles = ("Running", "Waiting", "KV blocks in use")
    figure = make_subplots(rows=3, cols=1, subplot_titles=titles, shared_xaxes=True, vertical_spacing=0.09)
    begins = min((series.at[0] for series in samples.values() if series.at), default=0)
    busiest = _busiest(samples)
    for index, instance_id in enumerate(busiest):
        series, total = samples[instance_id], num_blocks[instance_id]
        kept = _kept(len(series.at))
        seconds = [round((series.at[i] - begins) / NANOSECONDS_PER_SECOND, 4) for i in kept]
        in_use = [round(1 - series.free_blocks[i] / total, 4) for i in kept]
        lines = ([series.running[i] for i in kept], [series.waiting[i] for i in kept], in_use)
        for row, values in enumerate(lines, start=1):
            figure.add_scatter(
                x=seconds,
                y=values,
                mode="lines",
                name=instance_id,
                legendgroup=instance_id,
                showlegend=row == 1 and len(busiest) > 1,
                line={"color": _COLORS[index], "width": 1.5, "shape": "hv"},
                row=row,
                col=1,
            )
    figure.update_xaxes(gridcolor=_GRID)
    figure.update_xaxes(title_text="seconds since the first sample", row=3, col=1)
    figure.update_yaxes(gridcolor=_GRID, rangemode="tozero")
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02], row=3, col=1)
    return _styled(figure).update_layout(height=780)


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


def _load_caption(samples: Mapping[InstanceId, Samples]) -> str:
    num_drawn = len(_busiest(samples))
    return f"The {num_drawn} busiest of {len(samples)} instances." if num_drawn < len(samples) else ""


def _kept(count: int) -> list[int]:
    """Indices of at most `NUM_POINTS_MAX` points, evenly apart, the first and the last among them."""
    if count <= NUM_POINTS_MAX:
        return list(range(count))
    return [round(i * (count - 1) / (NUM_POINTS_MAX - 1)) for i in range(NUM_POINTS_MAX)]


def _styled(figure: Any) -> Any:
    return figure.update_layout(
        template="plotly_white",
        margin={"l": 60, "r": 20, "t": 50, "b": 50},
        legend={"orientation": "h", "y": 1.12, "x": 0},
        hovermode="x unified",
    )


_GRID = "#e8ecf0"
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00", "#444444")
"""Okabe and Ito's palette, which colour-blind readers can tell apart, its yellow darkened for a white page."""
