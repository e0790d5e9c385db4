"""Reports as one HTML file that opens offline: no script, style or font comes from elsewhere."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import msgspec

from rota.base.provenance import Provenance


@dataclass(frozen=True, slots=True)
class Text:
    """Paragraphs, separated by blank lines."""

    heading: str
    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of values under the columns of the first row. Numbers are aligned to the right."""

    heading: str
    rows: Sequence[Mapping[str, Any]]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """A plotly figure."""

    heading: str
    figure: Any
    caption: str = ""


Section = Text | Table | Figure

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2430; --soft: #5a6675; --line: #e3e7ec; --grid: #e8ecf0;
  --strong: #cfd6de; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181e; --ink: #e4e8ee; --soft: #9aa6b4; --line: #2a313b; --grid: #262d36; --strong: #46505d; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 3rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: 0 0 .75rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .925rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; border-bottom: 2px solid var(--strong); vertical-align: bottom; }
.number { text-align: right; }
td.number { white-space: nowrap; }
.caption, footer { color: var(--soft); font-size: .875rem; }
.figure { min-height: 18rem; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); overflow-wrap: anywhere; }
footer span { display: inline-block; margin-right: 1.5rem; }

/* Figures have no ground of their own; their text and grid follow the page. */
.js-plotly-plot :is([class$="tick"], .infolayer, .hoverlayer .legend) text { fill: var(--ink) !important; }
.js-plotly-plot .gridlayer path { stroke: var(--grid) !important; }
.js-plotly-plot .zerolinelayer path { stroke: var(--strong) !important; }
.js-plotly-plot .hoverlayer .legend .bg { fill: var(--page) !important; stroke: var(--strong) !important; }
.js-plotly-plot .modebar { background: none !important; }
.js-plotly-plot .modebar-group { background: none !important; }
.js-plotly-plot .modebar-btn path { fill: var(--soft) !important; }
"""


def write_report(
    path: str | Path, title: str, sections: Iterable[Section], provenance: Provenance | None = None
) -> None:
    """Write the sections, in order, as one page. plotly's script is inlined once, if there is a figure at all."""
    parts: list[str] = []
    num_figures = 0
    for section in sections:
        parts.append(f"<section>\n<h2>{escape(section.heading)}</h2>")
        if isinstance(section, Figure):
            parts.append(_figure(section, is_first=num_figures == 0))
            num_figures += 1
        elif isinstance(section, Table):
            parts.append(_table(section))
        else:
            parts += [f"<p>{escape(paragraph.strip())}</p>" for paragraph in section.text.split("\n\n")]
        parts.append("</section>")
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + _footer(provenance)
        + "\n</body>\n</html>\n"
    )
    Path(path).write_text(page, encoding="utf-8")


def _figure(section: Figure, *, is_first: bool) -> str:
    # Imported here: plotly takes long to load, and most reports of a few tables never need it.
    from plotly.io import to_html

    html = to_html(
        section.figure,
        full_html=False,
        include_plotlyjs=is_first,
        config={"displaylogo": False, "responsive": True},
        default_width="100%",
        default_height=section.figure.layout.height or "26rem",
    )
    return f'<div class="figure">{html}</div>{_caption(section.caption)}'


def _table(section: Table) -> str:
    if not section.rows:
        return f"<p>(no rows)</p>{_caption(section.caption)}"
    columns = list(section.rows[0])
    numeric = {
        column
        for column in columns
        if all(row.get(column) is None or isinstance(row[column], (int, float)) for row in section.rows)
    }

    def cell(tag: str, column: str, text: str) -> str:
        css = ' class="number"' if column in numeric else ""
        return f"<{tag}{css}>{escape(text)}</{tag}>"

    head = "".join(cell("th", column, column) for column in columns)
    body = "\n".join(
        "<tr>" + "".join(cell("td", column, _shown(row.get(column))) for column in columns) + "</tr>"
        for row in section.rows
    )
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
        f"{_caption(section.caption)}"
    )


def _shown(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)


def _caption(text: str) -> str:
    return f'\n<p class="caption">{escape(text)}</p>' if text else ""


def _footer(provenance: Provenance | None) -> str:
    if provenance is None:
        return ""
    facts = msgspec.to_builtins(provenance).items()
    shown = "".join(f"<span>{escape(name.replace('_', ' '))}: {escape(str(value))}</span>" for name, value in facts)
    return f"\n<footer>{shown}</footer>"
