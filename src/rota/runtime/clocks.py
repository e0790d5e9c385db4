"""Where `now` comes from. Nothing but a driver asks."""

import secrets
import time
from typing import Protocol

from rota.base.errors import LawBroken
from rota.base.instant import NANOSECONDS_PER_SECOND, Instant

_MAX_ORIGIN_HOURS = 1_000


class Clock(Protocol):
    """Gives instants that never go back."""

    def now(self) -> Instant:
        """The present, in nanoseconds since this clock's origin."""
        ...


class VirtualClock:
    """A clock that stands still until it is moved."""

    def __init__(self, start: Instant = Instant(0)) -> None:
        self._now = start

    def now(self) -> Instant:
        """The instant it was moved to last."""
        return self._now

    def advance_to(self, instant: Instant) -> None:
        """Move the clock on. Raises `LawBroken` if that would be back."""
        if instant < self._now:
            raise LawBroken(f"a clock at {self._now} was moved back to {instant}")
        self._now = instant


class SystemClock:
    """The computer's monotonic clock, with its origin a random number of hours ago.

    The random origin makes it notice at once when something compares an instant with a constant, or with an instant of
    another run.
    """

    def __init__(self) -> None:
        hours = secrets.randbelow(_MAX_ORIGIN_HOURS) + 1
        self._offset = hours * 3_600 * NANOSECONDS_PER_SECOND + secrets.randbelow(NANOSECONDS_PER_SECOND)
        self._offset -= time.monotonic_ns()
        self._to_wall = time.time_ns() - self.now()

    def now(self) -> Instant:
        """The present."""
        return Instant(time.monotonic_ns() + self._offset)

    def to_wall(self, at: Instant) -> int:
        """Nanoseconds since the Unix epoch, for display only: it does not follow later changes of the wall clock."""
        return at + self._to_wall
