"""The HTML report of a trace: its numbers, how its lengths spread, how it comes over time. It opens offline."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rota.export.html import Figure, Section, Table, write_report
from rota.serving.workload.description import Description, Gathering, Spread, cumulative

if TYPE_CHECKING:
    from rota.base.provenance import Provenance

_LINES = ("#2f8fd0", "#e2711d")
"""Of middle lightness: they stand out on white and on black."""
_CLEAR = "rgba(0,0,0,0)"
_GRID = "rgba(128,128,128,0.25)"


def write_trace_report(
    path: Path, title: str, gathering: Gathering, description: Description, source: "Provenance"
) -> None:
    """Write the report, replacing what is there."""
    write_report(path, title, trace_sections(gathering, description), source)


def trace_sections(gathering: Gathering, description: Description) -> list[Section]:
    """Tables first, then the figures."""
    sections: list[Section] = [
        Table("Arrivals", [arrival_facts(description)], ARRIVAL_CAPTION),
        Table("Lengths", length_rows(description)),
    ]
    if description.prefix_hits:
        sections.append(Table("Prefix sharing", prefix_rows(description), PREFIX_CAPTION))
    if description.not_taken_as_they_are:
        rows = [{"what": what, "rows": count} for what, count in description.not_taken_as_they_are.items()]
        sections.append(Table("Not taken as they are", rows))
    sections.append(Figure("Lengths", lengths_figure(gathering), "Share of rows that are no longer than that."))
    seconds, rates = gathering.over_time.rates()
    if len(seconds) > 1:
        caption = f"Mean over bins of {gathering.over_time.width / 1e9:g} s."
        sections.append(Figure("Arrivals over time", rate_figure(seconds, rates), caption))
    return sections


ARRIVAL_CAPTION = (
    "Gaps and dispersion are of rows that come at an instant of their own; 1 is Poisson in both. Dispersion is "
    "variance over mean of the rows in windows of that width."
)
PREFIX_CAPTION = (
    "Share of prompt tokens that a cache of so many blocks, the least recently used going first, would hold."
)


def arrival_facts(description: Description) -> dict[str, Any]:
    """The numbers of arrivals, by what they are called in tables."""
    named = {
        "rows": description.num_rows,
        "span s": description.span_seconds,
        "rate /s": description.rate,
        "gap CV": description.gap_cv,
        "dispersion 1 s": description.dispersion_1s,
        "dispersion 60 s": description.dispersion_60s,
        "sessions": description.num_sessions,
        "rows a session": description.rows_per_session.mean,
        "tenants": description.num_tenants,
    }
    if description.num_rows > description.num_open:
        named |= {"rows that wait": description.num_rows - description.num_open}
    return named


def length_rows(description: Description) -> list[dict[str, Any]]:
    """A row for each kind of length, and one for waits where there are any."""
    rows = [
        _spread_row("prompt tokens", description.prompt_tokens),
        _spread_row("output tokens", description.output_tokens),
    ]
    if description.wait_seconds.mean is not None:
        rows.append(_spread_row("wait s", description.wait_seconds))
    return rows


def prefix_rows(description: Description) -> list[dict[str, Any]]:
    """A row for each size of cache."""
    return [
        {
            "cache blocks": "without end" if hits.num_blocks is None else hits.num_blocks,
            "tokens a block": description.hash_block_tokens,
            "hit rate": hits.hit_rate,
        }
        for hits in description.prefix_hits
    ]


def lengths_figure(gathering: Gathering) -> Any:
    """Cumulative shares of prompt and output lengths."""
    from plotly.graph_objects import Figure as Plot

    figure = Plot()
    for colour, (name, counts) in zip(
        _LINES, (("prompt", gathering.prompts), ("output", gathering.outputs)), strict=True
    ):
        values, shares = cumulative(counts)
        figure.add_scatter(
            x=values, y=shares, mode="lines", name=name, line={"color": colour, "width": 2, "shape": "hv"}
        )
    figure.update_xaxes(title_text="tokens", type="log")
    figure.update_yaxes(title_text="rows", tickformat=".0%", rangemode="tozero")
    return _styled(figure)


def rate_figure(seconds: list[float], rates: list[float]) -> Any:
    """Rows a second over time."""
    from plotly.graph_objects import Figure as Plot

    figure = Plot()
    figure.add_scatter(
        x=seconds, y=rates, mode="lines", name="rate", line={"color": _LINES[0], "width": 1.5, "shape": "hv"}
    )
    figure.update_xaxes(title_text="seconds since the start")
    figure.update_yaxes(title_text="rows a second", rangemode="tozero")
    return _styled(figure)


def _spread_row(name: str, spread: Spread) -> dict[str, Any]:
    return {
        "": name,
        "mean": spread.mean,
        "p50": spread.p50,
        "p90": spread.p90,
        "p99": spread.p99,
        "min": spread.min,
        "max": spread.max,
    }


def _styled(figure: Any) -> Any:
    figure.update_xaxes(gridcolor=_GRID, zeroline=False)
    figure.update_yaxes(gridcolor=_GRID, zeroline=False)
    return figure.update_layout(
        height=360,
        paper_bgcolor=_CLEAR,
        plot_bgcolor=_CLEAR,
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        legend={"orientation": "h", "y": 1.12, "x": 0},
        hovermode="x unified",
    )
