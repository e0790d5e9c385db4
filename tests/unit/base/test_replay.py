"""Replaying and comparing journals find the first difference, and only real ones."""

import msgspec
import pytest

from rota.base.errors import DataError, LawBroken
from rota.base.journal import Row
from rota.base.replay import first_difference, replay


class Add(msgspec.Struct, frozen=True, tag=True):
    amount: int


class Say(msgspec.Struct, frozen=True, tag=True):
    total: int


class Adder:
    def __init__(self, bias=0):
        self.total = bias

    def handle(self, event, now):
        if event.amount < 0:
            raise LawBroken("amounts are positive")
        self.total += event.amount
        return [Say(self.total)]

    def expire(self, now):
        return [Say(-self.total)]

    def next_deadline(self):
        return None

    def check(self):
        pass

    def unfinished(self):
        return ()


ROWS = [
    Row(0, "adder", 1, "event", Add(2), (Say(2),)),
    Row(1, "adder", 5, "event", Add(3), (Say(5),)),
    Row(2, "adder", 9, "deadline", None, (Say(-5),)),
]


def test_an_equal_machine_replays():
    assert replay(ROWS, {"adder": Adder()}) is None


def test_the_first_difference_is_shown_readably():
    difference = replay(ROWS, {"adder": Adder(bias=1)})
    assert (difference.seq, difference.machine, difference.at, difference.what) == (0, "adder", 1, "commands")
    assert str(difference) == (
        "row 0: adder at 1: commands differ\n"
        "  told:     Add(amount=2)\n"
        "  expected: (Say(total=2),)\n"
        "  got:      (Say(total=3),)"
    )


def test_deadlines_are_replayed_too():
    spoilt = [*ROWS[:2], msgspec.structs.replace(ROWS[2], commands=())]
    assert replay(spoilt, {"adder": Adder()}).seq == 2


def test_a_machine_that_was_not_built_is_named():
    with pytest.raises(DataError, match="'adder', which was not built"):
        replay(ROWS, {})


def test_an_error_names_the_row():
    with pytest.raises(LawBroken) as caught:
        replay([Row(0, "adder", 1, "event", Add(-1), ())], {"adder": Adder()})
    assert "while replaying row 0: adder at 1" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"machine": "other"}, "machine"),
        ({"at": 6}, "at"),
        ({"kind": "deadline"}, "kind"),
        ({"event": Add(4)}, "event"),
        ({"commands": (Say(6),)}, "commands"),
    ],
)
def test_any_part_of_a_row_may_differ(change, what):
    other = [ROWS[0], msgspec.structs.replace(ROWS[1], **change), ROWS[2]]
    difference = first_difference(ROWS, other)
    assert (difference.seq, difference.what) == (1, what)
    assert first_difference(ROWS, list(ROWS)) is None


def test_a_run_that_is_longer_differs():
    assert first_difference(ROWS, ROWS[:2]).what == "row"
    assert first_difference(ROWS[:2], ROWS).seq == 2


def test_a_shifted_run_has_shifted_instants_and_equal_commands():
    shifted = [msgspec.structs.replace(row, at=row.at + 100) for row in ROWS]
    assert first_difference(ROWS, shifted, shift=100) is None
    assert first_difference(ROWS, shifted, shift=99).what == "at"
    shifted[1] = msgspec.structs.replace(shifted[1], commands=())
    assert first_difference(ROWS, shifted, shift=100).what == "commands"
