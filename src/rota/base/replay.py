"""Are two runs the same run? Feeds a journal into fresh machines, and finds the first row in which two differ."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import msgspec

from rota.base.errors import DataError
from rota.base.instant import Duration, Instant
from rota.base.journal import Row
from rota.base.machine import Machine

_encode = msgspec.json.Encoder(order="deterministic").encode


@dataclass(frozen=True, slots=True)
class Difference:
    """The first place where two runs part."""

    seq: int
    machine: str
    at: Instant
    what: str
    """Which part of the row differs: `commands`, `event`, `machine`, `at`, or `row` when one run has no such row."""
    expected: Any
    got: Any
    event: Any = None
    """What the machine had just been told."""

    def __str__(self) -> str:
        return "\n".join(
            (
                f"row {self.seq}: {self.machine} at {self.at}: {self.what} differ",
                f"  told:     {self.event!r}",
                f"  expected: {self.expected!r}",
                f"  got:      {self.got!r}",
            )
        )


def replay(rows: Iterable[Row], machines: Mapping[str, Machine[Any, Any]]) -> Difference | None:
    """Feed every event and deadline into `machines`, which must be fresh, and compare the commands that they give.

    Values are compared as they are written to a journal. An error that a machine raises carries the row as a note.
    """
    for row in rows:
        machine = machines.get(row.machine)
        if machine is None:
            raise DataError(
                f"row {row.seq}: the journal speaks of a machine {row.machine!r}, which was not built",
                hint="replay with the configuration that the journal was made with",
            )
        try:
            got = machine.handle(row.event, row.at) if row.kind == "event" else machine.expire(row.at)
        except Exception as error:
            error.add_note(f"while replaying row {row.seq}: {row.machine} at {row.at}: {row.event!r}")
            raise
        if _encode(tuple(got)) != _encode(row.commands):
            return Difference(row.seq, row.machine, row.at, "commands", row.commands, tuple(got), row.event)
    return None


def first_difference(
    expected: Iterable[Row], got: Iterable[Row], *, shift: Duration | None = None
) -> Difference | None:
    """The first row in which two journals differ, or None if they are the same.

    With `shift`, the second run is the first with every instant moved by so much: instants must differ by exactly that,
    and events, which may hold instants, are not compared.
    """
    offset = shift or 0
    for index, (left, right) in enumerate(zip_longest(expected, got)):
        if left is None or right is None:
            present = left or right
            return Difference(index, present.machine, present.at, "row", left, right, present.event)
        parts: list[tuple[str, Any, Any]] = [
            ("machine", left.machine, right.machine),
            ("at", left.at + offset, right.at),
            ("kind", left.kind, right.kind),
            ("commands", left.commands, right.commands),
        ]
        if shift is None:
            parts.insert(3, ("event", left.event, right.event))
        for what, one, other in parts:
            if _encode(one) != _encode(other):
                return Difference(index, left.machine, left.at, what, one, other, left.event)
    return None
