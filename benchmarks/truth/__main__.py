"""The table of truth: every group of comparisons, what Rota says, its error, the bound, and whether it holds.

    python -m benchmarks.truth                  # all groups
    python -m benchmarks.truth --only theory    # one; may be given several times
    python -m benchmarks.truth --quick          # fewer jobs, shorter traces, half the live load
    python -m benchmarks.truth --json           # for machines, on stdout

Exits 1 if a bound is missed or a group could not be run.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from benchmarks.truth.row import TruthRow
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from rota import __version__
from rota.base.errors import RotaError

GROUPS = ("theory", "real_runs", "silicon", "scheduler", "live")
"""Modules of this package, each with `rows() -> Iterator[TruthRow]`; cheap ones first."""

QUICK: dict[str, dict[str, float]] = {
    "theory": {"scale": 0.25},
    "real_runs": {},
    "silicon": {},
    "scheduler": {"num_requests": 400},
    "live": {"scale": 0.5},
}
"""How much each group is cut down in a quick run; theory's bounds widen as the square root says."""

_STYLES = {"holds": "green", "missed": "bold red", "shown": "dim"}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    groups = tuple(options.only or GROUPS)
    rows: list[TruthRow] = []
    failures: dict[str, str] = {}
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
    with progress:
        task = progress.add_task("", total=len(groups))
        for group in groups:
            progress.update(task, description=group)
            try:
                for row in _rows_of(group, QUICK[group] if options.quick else {}):
                    rows.append(row)
                    progress.update(task, description=f"{group}: {row.case}, {row.quantity}")
            except RotaError as error:
                failures[group] = str(error) + (f" ({error.hint})" if error.hint else "")
            progress.advance(task)
    missed = [row for row in rows if row.verdict == "missed"]
    if options.json:
        _print_json(rows, failures)
    else:
        _print_table(rows, failures)
    return 1 if missed or failures else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.truth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=GROUPS, metavar="NAME", help=", ".join(GROUPS))
    parser.add_argument("--quick", action="store_true", help="cut down to about half the time")
    parser.add_argument("--json", action="store_true", help="rows as JSON on stdout")
    return parser.parse_args(arguments)


def _rows_of(group: str, cut: dict[str, float]) -> Iterator[TruthRow]:
    rows: Iterator[TruthRow] = importlib.import_module(f"benchmarks.truth.{group}").rows(**cut)
    return rows


def _print_json(rows: Sequence[TruthRow], failures: dict[str, str]) -> None:
    document = {
        "rota": __version__,
        "rows": [{**asdict(row), "verdict": row.verdict} for row in rows],
        "num_missed": sum(row.verdict == "missed" for row in rows),
        "failures": failures,
    }
    print(json.dumps(document, indent=2))


def _print_table(rows: Sequence[TruthRow], failures: dict[str, str]) -> None:
    # A pipe has no width of its own, and a table cut at 80 columns says nothing.
    console = Console(width=None if sys.stdout.isatty() else 190)
    table = Table(title="Truth", title_justify="left")
    for name in ("group", "case", "quantity"):
        table.add_column(name, overflow="fold")
    for name in ("truth", "rota", "error", "bound"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("note", overflow="fold")
    before: str | None = None
    for row in rows:
        if before not in (None, row.group):
            table.add_section()
        before = row.group
        table.add_row(
            row.group, escape(row.case), escape(f"{row.quantity} ({row.unit})" if row.unit else row.quantity),
            _number(row.truth), _number(row.rota), _percent(row.error, "+"), _percent(row.bound),
            f"[{_STYLES[row.verdict]}]{row.verdict}[/]", escape(row.note),
        )  # fmt: skip
    console.print(table)
    verdicts = [row.verdict for row in rows]
    print(f"{verdicts.count('holds')} hold, {verdicts.count('missed')} missed, {verdicts.count('shown')} shown")
    # A log that is cut shows its end.
    for row in rows:
        if row.verdict == "missed":
            print(f"missed: {row.group}, {row.case}: {row.quantity}: {_percent(row.error, '+')} ({row.note})")
    for group, failure in failures.items():
        print(f"{group} could not be run: {failure}")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _percent(fraction: float | None, sign: str = "") -> str:
    return "" if fraction is None else f"{fraction:{sign}.2%}"


if __name__ == "__main__":
    sys.exit(main())
