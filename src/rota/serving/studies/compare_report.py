"""What a comparison says, in sentences, and as a page that opens offline."""

from collections.abc import Mapping
from pathlib import Path

from rota.base.provenance import provenance
from rota.export.html import Figure, Section, Table, Text, write_report
from rota.serving.metrics.charts import interval_figure, latency_figure, load_figure
from rota.serving.metrics.columns import by_class
from rota.serving.studies.compare import Comparison
from rota.serving.studies.differences import Difference
from rota.serving.studies.observe import Observation

_DESIGNS = {
    "windows": (
        "One run of each stack on the same arrivals; chance is judged from how differences vary between windows."
    ),
    "resampled": (
        "The trace as it was recorded, and resamples of it, through every stack; chance is judged from how differences "
        "vary between the resamples."
    ),
    "drawn": ("Several draws of the workload, each through every stack alike; differences are means over them."),
}
_WORDS = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E", "mean": "mean", "p99": "p99", "ms": ""}


def label(difference: Difference) -> str:
    """The quantity in words, with its group unless that is everything."""
    names = {"share_finished": "share finished", "slo_attainment": "share in time"}
    parts = [_WORDS.get(part, part) for part in difference.quantity.split("_")]
    name = names.get(difference.quantity) or " ".join(part for part in parts if part)
    return name if difference.group == "all" else f"{name}, {difference.group}"


def sentence(one: Difference) -> str:
    """The verdict on one difference, such as `faster by 12 ± 3 %`; the interval is of this difference by itself."""
    if one.verdict == "identical":
        return "the same in every request"
    is_share = one.quantity in ("share_finished", "slo_attainment")
    size, margin, unit = one.relative, one.relative_margin, "%"
    if is_share or size is None or margin is None:
        size, margin, unit = one.difference, one.margin, "points"
    if one.verdict == "no difference shown":
        return f"no difference shown ({_digits(100 * size, '+')} ± {_digits(100 * margin)} {unit})"
    way = {("better", False): "faster", ("worse", False): "slower", ("better", True): "more", ("worse", True): "less"}
    return f"{way[one.verdict, is_share]} by {_digits(100 * abs(size))} ± {_digits(100 * margin)} {unit}"


def _digits(value: float, sign: str = "") -> str:
    """Two digits, or all those before the point."""
    return f"{value:{sign}.0f}" if abs(value) >= 100 else f"{value:{sign}.2g}"


def write_comparison(path: Path, title: str, comparison: Comparison, observed: Mapping[str, Observation]) -> None:
    """Write the report, replacing what is there."""
    others = [stack.name for stack in comparison.stacks[1:]]
    sections: list[Section] = [Text("The question", _question(comparison))]
    for name in others:
        found = [one for one in comparison.differences if one.stack == name]
        rows = [
            {
                "quantity": label(one),
                comparison.baseline: one.baseline_value,
                name: one.value,
                "verdict": sentence(one),
                "p, Holm": one.p_adjusted,
            }
            for one in found
        ]
        sections.append(Table(f"{name} beside {comparison.baseline}", rows))
        drawn = [
            (label(one), one.relative, one.relative_margin, one.verdict in ("better", "worse"))
            for one in found
            if one.relative is not None and one.relative_margin is not None
        ]
        caption = f"Intervals hold {comparison.confidence:.0%} each; verdicts are corrected for their number."
        sections.append(Figure(f"{name}: differences", interval_figure(drawn, x="relative difference"), caption))
    columns = {name: one.columns for name, one in observed.items()}
    sections.append(Table("What each got", [_row(name, one) for name, one in observed.items()], _first(comparison)))
    sections.append(Figure("How latencies spread", latency_figure(columns), "Share of requests at or below a latency."))
    if len(by_class(next(iter(columns.values())))) > 1:
        classes = {f"{name}, {kind}": part for name, all_ in columns.items() for kind, part in by_class(all_).items()}
        sections.append(Figure("How latencies spread, by class", latency_figure(classes)))
    loads = {name: one.load for name, one in observed.items()}
    sections.append(Figure("Load over time", load_figure(loads), "All instances of a fleet together."))
    write_report(path, title, sections, provenance(seed=comparison.seed, config_hash=comparison.config_hash))


def _question(comparison: Comparison) -> str:
    level = 1.0 - comparison.confidence
    return (
        f"{_DESIGNS[comparison.design]}\n\nA difference is called real where chance would show one as large, anywhere "
        f"among the {len(comparison.differences)} that were looked at, in at most {level:.0%} of such studies (Holm)."
    )


def _first(comparison: Comparison) -> str:
    return "" if comparison.num_repeats == 1 else "The first of the repeats, as are the charts below."


def _row(name: str, observation: Observation) -> dict[str, object]:
    summary = observation.summary
    row: dict[str, object] = {"stack": name, "requests": summary.num_requests, "finished": summary.num_finished}
    for words, values in (("TTFT", summary.ttft_ms), ("TPOT", summary.tpot_ms), ("E2E", summary.e2e_ms)):
        row |= {f"{words} p50 ms": values.p50, f"{words} p99 ms": values.p99}
    return row | {
        "in time": summary.slo_attainment,
        "goodput /s": summary.goodput_rps,
        "preemptions": summary.num_preemptions,
    }
