"""A sweep as a page that opens offline: the best runs, and what each parameter does."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rota.base.provenance import provenance
from rota.export.html import Figure, Section, Table, Text, write_report
from rota.serving.metrics.charts import heat_figure, line_figure
from rota.serving.studies.sweep import Row, SweepResult

SHOWN = ("goodput_rps", "slo_attainment", "ttft_p99_ms", "tpot_p99_ms", "e2e_p99_ms")
"""Metrics that are drawn, besides the one that the best were picked by."""
NUM_CELLS_MAX = 40
"""Values of a parameter that a chart shows one by one."""


def write_sweep(path: Path, title: str, result: SweepResult, rows: Sequence[Row], *, is_sample: bool) -> None:
    """Write the report, replacing what is there."""
    metrics = list(dict.fromkeys((result.by, *SHOWN)))
    shown = [*result.varied, *metrics]
    table = [{"run": row["run"], **{name: row[name] for name in shown}} for row in result.best]
    sections: list[Section] = [
        Text("What was run", _what(result, rows)),
        Table("The best runs", table, f"By {result.by}."),
    ]
    failed = [{"run": row["run"], **{n: row[n] for n in result.varied}, "error": row["error"]} for row in rows]
    failed = [row for row in failed if row["error"] is not None]
    if failed:
        sections.append(Table("Runs that failed", failed[:50]))
    chosen = [row for row in rows if row["error"] is None]
    axes = [name for name in result.varied if name != "seed" and len({row[name] for row in chosen}) > 1]
    for metric in metrics:
        if any(row[metric] is not None for row in chosen):
            sections += _figures(metric, axes, chosen, is_sample=is_sample)
    write_report(path, title, sections, provenance(seed=None, config_hash=result.fingerprint))


def _what(result: SweepResult, rows: Sequence[Row]) -> str:
    seconds = sum(row["cpu_seconds"] or 0.0 for row in rows)
    return (
        f"{result.num_runs:,} runs over {', '.join(result.varied)}; {result.num_failed:,} failed. "
        f"They took {seconds:,.0f} CPU seconds. All results are in {result.out}."
    )


def _figures(metric: str, axes: Sequence[str], rows: Sequence[Row], *, is_sample: bool) -> list[Section]:
    if is_sample:
        return [_scatter(metric, axis, rows) for axis in axes if _is_number(rows, axis)]
    found: list[Section] = []
    if len(axes) >= 2:
        found.append(_heat(metric, axes[0], axes[1], rows))
    numbers = [axis for axis in axes if _is_number(rows, axis)]
    if numbers:
        x = numbers[-1] if len(numbers) > 1 and numbers[-1] in axes[:2] else numbers[0]
        others = [axis for axis in axes if axis != x]
        found.append(_lines(metric, x, others[0] if others else None, rows))
    return found


def _is_number(rows: Sequence[Row], name: str) -> bool:
    return all(isinstance(row[name], (int, float)) and not isinstance(row[name], bool) for row in rows)


def _means(metric: str, names: Sequence[str], rows: Sequence[Row]) -> dict[tuple[object, ...], float]:
    """The metric's mean over all else that varies, for each combination of the named parameters."""
    found: dict[tuple[object, ...], list[float]] = defaultdict(list)
    for row in rows:
        if row[metric] is not None:
            found[tuple(row[name] for name in names)].append(row[metric])
    return {key: fmean(values) for key, values in found.items()}


def _heat(metric: str, y: str, x: str, rows: Sequence[Row]) -> Figure:
    means = _means(metric, (y, x), rows)
    ys = list(dict.fromkeys(row[y] for row in rows))[:NUM_CELLS_MAX]
    xs = list(dict.fromkeys(row[x] for row in rows))[:NUM_CELLS_MAX]
    cells = [[means.get((one, other)) for other in xs] for one in ys]
    figure = heat_figure([_text(v) for v in xs], [_text(v) for v in ys], cells, x=x, y=y, unit=metric)
    return Figure(f"{metric} by {y} and {x}", figure, "Means over all else that varies.")


def _lines(metric: str, x: str, of: str | None, rows: Sequence[Row]) -> Figure:
    means = _means(metric, (x,) if of is None else (x, of), rows)
    lines = {}
    for value in dict.fromkeys(row[of] if of else None for row in rows):
        at = sorted(key[0] for key in means if of is None or key[1] == value)  # type: ignore[type-var]
        values = [means[(one,) if of is None else (one, value)] for one in at]
        lines[metric if of is None else f"{of} {_text(value)}"] = (at, values)
    tickformat = ".0%" if metric == "slo_attainment" else ""
    figure = line_figure(lines, x=x, y=metric, tickformat=tickformat)  # type: ignore[arg-type]
    return Figure(f"{metric} against {x}", figure, "Means over all else that varies.")


def _scatter(metric: str, axis: str, rows: Sequence[Row]) -> Figure:
    chosen = [row for row in rows if row[metric] is not None]
    points = ([row[axis] for row in chosen], [row[metric] for row in chosen])
    figure = line_figure({metric: points}, x=axis, y=metric).update_traces(mode="markers")
    return Figure(f"{metric} against {axis}", figure.update_layout(hovermode="closest"))


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
