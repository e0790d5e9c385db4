"""The charts of every report. Their lines are of middle lightness, so that they can be told apart on white and on
black; what is text or grid gets its colour from the page (see `rota.export.html`)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rota.serving.metrics.columns import Columns, Floats
from rota.serving.metrics.load import LoadOverTime

NUM_POINTS_MAX = 1000
"""Of one line: as many as a screen has pixels to show."""
PALETTE = ("#2f8fd0", "#e2711d", "#1fa37a", "#c65c9a", "#b8901c", "#7f77dd", "#5fa8a0", "#8b929b")
"""Neighbours differ in lightness as well as in hue; the order is Okabe and Ito's."""


def latency_figure(groups: Mapping[str, Columns]) -> Any:
    """Cumulative shares of TTFT, TPOT and E2E side by side, one line for each group."""
    from plotly.subplots import make_subplots

    names = ("ttft", "tpot", "e2e")
    titles = ("TTFT", "TPOT", "E2E")
    figure = make_subplots(rows=1, cols=3, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.04)
    for index, (group, columns) in enumerate(shown_groups(groups).items()):
        for column, name in enumerate(names, start=1):
            values, shares = _quantiles(getattr(columns, name))
            figure.add_scatter(
                x=values,
                y=shares,
                mode="lines",
                name=group,
                legendgroup=group,
                showlegend=column == 1 and len(groups) > 1,
                line={"color": PALETTE[index], "width": 2},
                hovertemplate="%{x:,.4~g} ms: %{y:.1%}",
                row=1,
                col=column,
            )
    figure.update_xaxes(title_text="ms", type="log")
    for column, name in enumerate(names, start=1):
        ticks = _log_ticks([getattr(columns, name) for columns in groups.values()])
        figure.update_xaxes(tickvals=ticks, ticktext=[f"{tick:,g}" for tick in ticks], row=1, col=column)
    figure.update_yaxes(rangemode="tozero", tickformat=".0%")
    figure.update_yaxes(title_text="requests", row=1, col=1)
    return styled(figure, height=420, num_lines=len(groups)).update_layout(hovermode="closest")


def load_figure(fleets: Mapping[str, LoadOverTime]) -> Any:
    """Running, waiting and the share of KV blocks in use over time, one line for each fleet."""
    from plotly.subplots import make_subplots

    titles = ("Requests running", "Requests waiting", "KV blocks in use")
    figure = make_subplots(rows=3, cols=1, subplot_titles=titles, shared_xaxes=True, vertical_spacing=0.08)
    for index, (name, load) in enumerate(shown_groups(fleets).items()):
        kept = np.linspace(0, max(0, len(load.seconds) - 1), min(len(load.seconds), NUM_POINTS_MAX)).round().astype(int)
        for row, values in enumerate((load.running, load.waiting, np.round(load.share_in_use, 4)), start=1):
            figure.add_scatter(
                x=np.round(load.seconds[kept], 3).tolist(),
                y=values[kept].tolist(),
                mode="lines",
                name=name,
                legendgroup=name,
                showlegend=row == 1 and len(fleets) > 1,
                line={"color": PALETTE[index], "width": 1.5, "shape": "hv"},
                row=row,
                col=1,
            )
    figure.update_xaxes(title_text="seconds", row=3, col=1)
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(tickformat=".0%", row=3, col=1)
    return styled(figure, height=780, num_lines=len(fleets))


def line_figure(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float | None]]],
    *,
    x: str,
    y: str,
    tickformat: str = "",
    level: tuple[str, float] | None = None,
    mark: tuple[str, float] | None = None,
    diagonal: bool = False,
) -> Any:
    """Points joined by lines: `lines` are x and y values by name. `level` and `mark` are a named horizontal and
    vertical, `diagonal` draws where y equals x."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for index, (name, (at, values)) in enumerate(shown_groups(lines).items()):
        figure.add_scatter(
            x=list(at),
            y=list(values),
            mode="lines+markers",
            name=name,
            showlegend=len(lines) > 1,
            line={"color": PALETTE[index], "width": 2},
            marker={"size": 7},
        )
    faint = {"color": PALETTE[-1], "width": 1.5, "dash": "dot"}
    if diagonal:
        ends = [0, max(max(at) for at, _ in lines.values())]
        figure.add_scatter(x=ends, y=ends, mode="lines", line=faint, showlegend=False, hoverinfo="skip")
    if level is not None:
        figure.add_hline(level[1], line=faint, annotation_text=level[0], annotation_position="bottom right")
    if mark is not None:
        figure.add_vline(mark[1], line=faint, annotation_text=mark[0], annotation_position="top left")
    figure.update_xaxes(title_text=x, rangemode="tozero")
    figure.update_yaxes(title_text=y, rangemode="tozero", tickformat=tickformat)
    return styled(figure, height=420, num_lines=len(lines))


def interval_figure(rows: Sequence[tuple[str, float, float, bool]], *, x: str) -> Any:
    """Estimates with their intervals, one below the other: name, estimate, margin, and whether it is told apart from 0.
    All are shares."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for is_real, label, colour in ((True, "a difference", PALETTE[1]), (False, "none shown", PALETTE[-1])):
        chosen = [row for row in rows if row[3] == is_real]
        figure.add_scatter(
            x=[row[1] for row in chosen],
            y=[row[0] for row in chosen],
            error_x={"type": "data", "array": [row[2] for row in chosen], "thickness": 2, "width": 5, "color": colour},
            mode="markers",
            name=label,
            marker={"color": colour, "size": 9},
            hovertemplate="%{y}: %{x:+.1%} ± %{error_x.array:.1%}<extra></extra>",
        )
    figure.add_vline(0, line={"color": PALETTE[-1], "width": 1.5})
    order = [row[0] for row in reversed(rows)]
    figure.update_yaxes(categoryorder="array", categoryarray=order, range=[-0.7, len(rows) - 0.3])
    figure.update_xaxes(title_text=x, tickformat="+.0%", zeroline=False)
    styled(figure, height=150 + 26 * len(rows), num_lines=2)
    return figure.update_layout(hovermode="closest", margin={"l": 10}).update_yaxes(automargin=True)


def heat_figure(
    columns: Sequence[str], rows: Sequence[str], values: Sequence[Sequence[float | None]], *, x: str, y: str, unit: str
) -> Any:
    """One cell for each pair of values, with its number in it."""
    import plotly.graph_objects as go

    text = [["" if value is None else f"{value:.4g}" for value in row] for row in values]
    figure = go.Figure(
        go.Heatmap(
            x=list(columns),
            y=list(rows),
            z=[list(row) for row in values],
            text=text,
            texttemplate="%{text}",
            colorscale="Viridis",
            colorbar={"title": unit, "outlinewidth": 0},
            xgap=2,
            ygap=2,
            hovertemplate=f"{x} %{{x}}, {y} %{{y}}: %{{z:.4g}}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text=x, type="category", showgrid=False)
    figure.update_yaxes(title_text=y, type="category", showgrid=False)
    return styled(figure, height=max(320, 140 + 44 * len(rows)), num_lines=1).update_layout(hovermode="closest")


def shown_groups(groups: Mapping[str, Any]) -> dict[str, Any]:
    """The first of them, as many as can be told apart by colour."""
    return dict(list(groups.items())[: len(PALETTE)])


def styled(figure: Any, *, height: int, num_lines: int) -> Any:
    """The look that all charts share: no ground of their own, so that the page's shows through."""
    figure.update_layout(
        template="plotly_white",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        height=height,
        margin={"l": 60, "r": 20, "t": 80 if num_lines > 1 else 50, "b": 50},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1 + 36 / height, "x": 0},
        hovermode="x unified",
    )
    return figure


def _log_ticks(values: Sequence[Floats]) -> list[float]:
    """1, 2 and 5 times the powers of ten, or the powers alone where that would be too many."""
    positive = np.concatenate([each[each > 0] for each in values]) if values else np.zeros(0)
    if not len(positive):
        return []
    low, high = math.log10(positive.min()), math.log10(positive.max())
    steps = (1, 2, 5) if high - low < 2 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    return [round(step * 10.0**power, 6) for power in powers for step in steps]


def _quantiles(values: Floats) -> tuple[list[float], list[float]]:
    """Points of the cumulative distribution, evenly apart in share."""
    values = values[~np.isnan(values)]
    if not len(values):
        return [], []
    shares = np.linspace(0, 1, min(len(values), NUM_POINTS_MAX))
    return np.round(np.quantile(values, shares), 4).tolist(), np.round(shares, 5).tolist()
