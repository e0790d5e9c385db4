"""What the command line says, and where: data on stdout, as a table or as JSON; talk on stderr, in one voice.

Colour is for terminals alone, and none at all under `NO_COLOR`.
"""

import os
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TextIO

import msgspec

BAR_AFTER_SECONDS = 2.0
"""Work that is over sooner shows no progress."""
LINE_EVERY_SECONDS = 10.0
"""Where stderr is no terminal, progress is a line now and then."""

_RED, _YELLOW, _CYAN, _RESET = "\x1b[1;31m", "\x1b[1;33m", "\x1b[1;36m", "\x1b[0m"


# --- talk -------------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """A line of talk."""
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Something that the reader of the result must know."""
    say(f"{_coloured('warning:', _YELLOW)} {text}")


def print_error(text: str, hint: str | None = None) -> None:
    """What went wrong, and what to try."""
    say(f"{_coloured('error:', _RED)} {text}")
    if hint:
        say(f"{_coloured('hint:', _CYAN)} {hint}")


def _coloured(text: str, colour: str) -> str:
    return f"{colour}{text}{_RESET}" if _is_terminal(sys.stderr) and not os.environ.get("NO_COLOR") else text


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


# --- data -------------------------------------------------------------------------------------------------------------


def print_json(value: Any) -> None:
    """One JSON object (anything that msgspec can encode), indented."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_lines(lines: Sequence[str]) -> None:
    """Data that is text."""
    for line in lines:
        print(line)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "") -> None:
    """Rows under column names, numbers to the right. A terminal gets as much as fits its width, a file gets all."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, name in enumerate(columns):
        values = [row[index] for row in rows]
        is_number = all(value is None or isinstance(value, (int, float)) for value in values)
        table.add_column(Text(name), justify="right" if is_number and rows else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(shown(value)) for value in row))
    is_terminal = _is_terminal(sys.stdout)
    console = Console(file=sys.stdout, width=None if is_terminal else 10_000, highlight=False)
    with console.capture() as capture:
        console.print(table)
    if title:
        print(title)
    for line in capture.get().splitlines():
        print(line.rstrip())


def shown(value: object) -> str:
    """A value as people read it: thousands parted, floats to four digits, nothing as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


# --- progress ---------------------------------------------------------------------------------------------------------


class Progress:
    """How far long work has come, on stderr: a bar on a terminal, else a line every ten seconds. Short work shows none.

    ```python
    with Progress("playing", total=19_366, unit="requests") as progress:
        progress.reached(4_000)
    ```
    """

    def __init__(self, what: str, *, total: int | None, unit: str) -> None:
        """Without a total there is no percentage."""
        self._what = what
        self._total = total
        self._unit = unit
        self._began_at = time.monotonic()
        self._next_line_at = self._began_at + LINE_EVERY_SECONDS
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def reached(self, num_done: int) -> None:
        """So much is done by now. Cheap enough to be called hundreds of times a second."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=num_done)
        elif _is_terminal(sys.stderr):
            if now - self._began_at >= BAR_AFTER_SECONDS:
                self._start_bar(num_done)
        elif now >= self._next_line_at:
            self._next_line_at = now + LINE_EVERY_SECONDS
            say(self._line(num_done, now - self._began_at))

    def reached_of(self, num_done: int, total: int) -> None:
        """As `reached`, where the total is known only now."""
        self._total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)
        self.reached(num_done)

    def _line(self, num_done: int, elapsed: float) -> str:
        if self._total is None or not num_done:
            return f"{self._what}: {num_done:,} {self._unit}"
        left = elapsed * max(0, self._total - num_done) / num_done
        share = 100 * num_done // self._total
        return f"{self._what}: {share} % ({num_done:,} of {self._total:,} {self._unit}), {left:.0f} s left"

    def _start_bar(self, num_done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(self._unit),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(self._what, total=self._total, completed=num_done)
        self._bar.start()
