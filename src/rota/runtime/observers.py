"""Those who watch a run without taking part in it."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from rota.base.journal import Row
from rota.base.machine import Machine


class Observer(Protocol):
    """Hears every row, after it was written and before its commands are carried out. Must not change anything."""

    def on_row(self, row: Row) -> None:
        """One machine was told something and has answered."""
        ...


class Progress:
    """Reports the fraction of `total` that is done, each time it has grown by a hundredth, and at the end.

    An observer if `count` says how much of the total a row is; otherwise fed through `advance`.
    """

    def __init__(self, total: int, report: Callable[[float], None], count: Callable[[Row], int] | None = None) -> None:
        self.num_done = 0
        self._total = max(total, 1)
        self._report = report
        self._count = count
        self._report_at = 0.0

    def advance(self, num_done: int = 1) -> None:
        """So much more is done."""
        self.num_done += num_done
        if self.num_done >= self._report_at:
            self._report(min(self.num_done / self._total, 1.0))
            self._report_at = min(self.num_done + self._total / 100, self._total)

    def on_row(self, row: Row) -> None:
        """Advance by what this row is worth."""
        if self._count is not None:
            num_done = self._count(row)
            if num_done:
                self.advance(num_done)


class CheckLaws:
    """Asserts a machine's laws after every row of it. Slow; for tests and for hunting a bug."""

    def __init__(self, machines: Mapping[str, Machine[Any, Any]]) -> None:
        self._machines = machines

    def on_row(self, row: Row) -> None:
        """Check the machine that has just answered."""
        self._machines[row.machine].check()
