"""Progress is told in hundredths, and laws are checked after every row."""

import pytest

from rota.base.errors import LawBroken
from rota.base.journal import Row
from rota.runtime.observers import CheckLaws, Progress


def test_progress_is_reported_in_hundredths_and_at_the_end():
    fractions = []
    progress = Progress(10_000, fractions.append)
    for _ in range(10_000):
        progress.advance()
    assert len(fractions) <= 102
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_progress_counts_rows():
    fractions = []
    progress = Progress(2, fractions.append, count=lambda row: len(row.commands))
    for commands in ((), ("a",), ("b",), ("c",)):
        progress.on_row(Row(0, "m", 0, "event", None, commands))
    assert fractions == [0.5, 1.0, 1.0]
    Progress(0, fractions.append).advance()
    assert fractions[-1] == 1.0


def test_a_machine_that_breaks_its_law_is_caught_at_the_row():
    class Broken:
        def check(self):
            raise LawBroken("law 3")

    with pytest.raises(LawBroken, match="law 3"):
        CheckLaws({"m": Broken()}).on_row(Row(0, "m", 0, "event", None, ()))
