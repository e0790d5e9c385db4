"""The shape of everything that decides: facts in, commands out, nothing else.

A machine never awaits, sleeps, reads a clock, draws an unseeded number, logs or opens a socket. A driver (the
simulation loop or the live loop, in `rota.runtime`) stamps each event with `now`, writes the row to the journal,
carries the commands out, and reports what came of each as a later event.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from rota.base.instant import Instant

Event = TypeVar("Event", contravariant=True)
Command = TypeVar("Command", covariant=True)


class Machine(Protocol[Event, Command]):
    """A synchronous state machine that a driver feeds with facts."""

    def handle(self, event: Event, now: Instant) -> Sequence[Command]:
        """Take one fact and return what to do about it. `now` never goes back for one machine."""
        ...

    def next_deadline(self) -> Instant | None:
        """When the machine wants `expire` called, or None; the driver owns the timer."""
        ...

    def expire(self, now: Instant) -> Sequence[Command]:
        """Act on every deadline at or before `now`."""
        ...

    def check(self) -> None:
        """Assert the machine's laws; raises `LawBroken` with the law's number."""
        ...

    def unfinished(self) -> Sequence[str]:
        """Ids of the work that is still owed an end, oldest first; empty means at rest."""
        ...
