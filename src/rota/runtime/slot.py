"""What both drivers keep of a machine, and how they record what it did."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rota.base.errors import LawBroken, StarvationError
from rota.base.instant import Instant
from rota.base.journal import Journal, Row, RowKind
from rota.base.machine import Machine
from rota.runtime.observers import Observer

CarryOut = Callable[[str, Any, Instant], None]
"""`(machine name, command, now)`: does what the command says, at once; what comes of it is reported as an event."""

_NUM_IDS_SHOWN = 5


class Slot:
    """One machine with its name, its hands, and the wake-up it is owed."""

    __slots__ = ("armed_at", "carry_out", "expire", "handle", "machine", "name", "next_deadline", "timer")

    def __init__(self, name: str, machine: Machine[Any, Any], carry_out: CarryOut) -> None:
        self.name = name
        self.machine = machine
        self.carry_out = carry_out
        # Bound once: the loops call these for every event.
        self.handle = machine.handle
        self.expire = machine.expire
        self.next_deadline = machine.next_deadline
        self.armed_at: Instant | None = None
        self.timer: Any = None


class Recorder:
    """Writes rows to the journal, then shows them to the observers."""

    def __init__(self, journal: Journal | None, observers: Iterable[Observer]) -> None:
        self._journal = journal
        self._observers = list(observers)
        self._num_rows = 0
        self._last_at: Instant | None = None
        self.is_needed = journal is not None or bool(self._observers)

    def add_observer(self, observer: Observer) -> None:
        """Show it every row from now on."""
        self._observers.append(observer)
        self.is_needed = True

    def record(self, machine: str, at: Instant, kind: RowKind, event: object, commands: Sequence[object]) -> None:
        """One machine was told something and has answered; nothing was carried out yet."""
        if self._last_at is not None and at < self._last_at:
            raise LawBroken(f"law 5: a row of {machine} at {at} comes after one at {self._last_at}")
        self._last_at = at
        if self._journal is not None:
            row = self._journal.append(machine, at, kind, event, commands)
        else:
            row = Row(self._num_rows, machine, at, kind, event, tuple(commands))
            self._num_rows += 1
        for observer in self._observers:
            observer.on_row(row)


def add_slot(slots: dict[str, Slot], slot: Slot) -> None:
    """Enter a machine under its name, which must be new."""
    if slot.name in slots:
        raise LawBroken(f"a machine named {slot.name!r} is there already")
    slots[slot.name] = slot


def slot_named(slots: Mapping[str, Slot], name: str) -> Slot:
    """The machine of that name; `LawBroken` if nobody added it."""
    try:
        return slots[name]
    except KeyError:
        raise LawBroken(f"no machine is named {name!r}; there are {', '.join(sorted(slots)) or 'none'}") from None


def refuse_past_deadline(slot: Slot, now: Instant) -> None:
    """A machine that still has a deadline at or before `now` after it was expired would be woken for ever."""
    deadline = slot.next_deadline()
    if deadline is not None and deadline <= now:
        raise LawBroken(f"{slot.name}: still has a deadline at {deadline} after it was expired at {now}")


def starvation(slot: Slot, now: Instant, ids: Sequence[str], why: str) -> StarvationError:
    """Who starves, as an error to raise or report."""
    shown = ", ".join(ids[:_NUM_IDS_SHOWN]) + (", …" if len(ids) > _NUM_IDS_SHOWN else "")
    return StarvationError(
        f"{slot.name} at {now}: {len(ids)} unfinished and {why}: {shown}",
        hint="an outcome was never reported to the machine, or a policy passes these over for ever",
    )
