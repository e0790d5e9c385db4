"""Machines under a virtual clock: as fast as the processor allows, and the same every time.

The world around the machines is made of `carry_out` functions and of calls that it schedules with `call_at`. Everything
that can happen is in one queue, ordered by `(instant, rank, order of scheduling)`.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rota.base.errors import StarvationError
from rota.base.event_queue import EventQueue
from rota.base.instant import Duration, Instant, seconds
from rota.base.journal import Journal
from rota.base.machine import Machine
from rota.base.random_streams import Stream
from rota.runtime.observers import Observer
from rota.runtime.slot import CarryOut, Recorder, Slot, add_slot, refuse_past_deadline, slot_named, starvation

DEADLINE_RANK = 1_000
"""Deadlines come after every event of their instant, as a live timer does after what arrived before it fired."""

DEFAULT_PATIENCE = seconds(60)

_DEADLINE: Any = object()
_CALL: Any = object()
_BACKGROUND: Any = object()


class SimulationLoop:
    """Drives machines through virtual time.

    `shuffle` permutes what happens at one instant with one rank, for the gate which shows that nothing leans on that
    order. `patience` is how long, in virtual time, background calls alone may go on while work is unfinished.
    """

    def __init__(
        self,
        start: Instant = Instant(0),
        journal: Journal | None = None,
        observers: Iterable[Observer] = (),
        *,
        shuffle: Stream | None = None,
        max_events_per_instant: int = 1_000_000,
        patience: Duration = DEFAULT_PATIENCE,
    ) -> None:
        self.num_events = 0
        """Events, deadlines and calls so far."""
        self._now = start
        self._queue: EventQueue[tuple[Any, Any]] = EventQueue(start, shuffle)
        self._slots: dict[str, Slot] = {}
        self._recorder = Recorder(journal, observers)
        self._inbox: deque[tuple[Slot, Any]] = deque()
        self._is_busy = False
        self._num_background = 0
        self._last_foreground_at = start
        self._max_events_per_instant = max_events_per_instant
        self._num_events_before_instant = 0
        self._patience = patience

    @property
    def now(self) -> Instant:
        """The present instant."""
        return self._now

    def add_machine(self, name: str, machine: Machine[Any, Any], carry_out: CarryOut) -> None:
        """Drive `machine` under `name`; its commands go to `carry_out(name, command, now)`, in order."""
        slot = Slot(name, machine, carry_out)
        add_slot(self._slots, slot)
        self._arm(slot, slot.next_deadline())

    def post(self, at: Instant, machine_name: str, event: object, rank: int = 0) -> int:
        """Have a machine told of an event at an instant. The handle is for `cancel`."""
        return self._queue.push(at, (slot_named(self._slots, machine_name), event), rank)

    def call_at(
        self, at: Instant, function: Callable[[Instant], None], rank: int = 0, *, background: bool = False
    ) -> int:
        """Have the world call `function(now)` at an instant. The handle is for `cancel`.

        A background call (a periodic report, say) does not keep the run going once all work is finished.
        """
        handle = self._queue.push(at, (_BACKGROUND if background else _CALL, function), rank)
        self._num_background += background
        return handle

    def cancel(self, handle: int) -> bool:
        """Take back what was posted or scheduled; False if it happened already."""
        item = self._queue.cancel(handle)
        if item is not None and item[0] is _BACKGROUND:
            self._num_background -= 1
        return item is not None

    def peek_time(self) -> Instant | None:
        """When the next thing will happen, or None if nothing will: a world that plays out a stretch of time at once
        need not look further."""
        return self._queue.peek_time()

    @property
    def is_recording(self) -> bool:
        """Whether anybody reads the rows."""
        return self._recorder.is_needed

    def recount(self, machine_name: str, at: Instant, event: object, commands: Sequence[object]) -> None:
        """Write a row for what a machine went through by itself, at an instant that is not past the present: the world
        played out a stretch of time at once. Raises `LawBroken` where a later row is written already."""
        self._recorder.record(slot_named(self._slots, machine_name).name, at, "event", event, commands)

    def deliver(self, machine_name: str, event: object) -> None:
        """Tell a machine of an event now, ahead of all that is queued.

        Called while commands are being carried out, it waits until the last of them has been: machines are told one
        thing after the other.
        """
        slot = slot_named(self._slots, machine_name)
        if self._is_busy:
            self._inbox.append((slot, event))
        else:
            self._tell(slot, event)

    def run(self, until: Instant | None = None) -> None:
        """Go on until nothing is left to happen, or through everything at or before `until`.

        Raises `StarvationError` when nothing is left to happen and a machine has unfinished work, or when one instant
        never ends.
        """
        queue = self._queue
        while len(queue) > self._num_background or self._waits_for_background():
            if until is not None and queue.peek_time() > until:  # type: ignore[operator]  # the queue is not empty
                break
            at, (slot, what) = queue.pop()
            if at != self._now:
                self._now = at
                self._num_events_before_instant = self.num_events
            if slot is _BACKGROUND:
                self._num_background -= 1
                self._count()
                what(at)
                continue
            self._last_foreground_at = at
            if slot is _CALL:
                self._count()
                what(at)
            else:
                if what is _DEADLINE:
                    slot.armed_at = slot.timer = None
                self._tell(slot, what)
        else:
            self._refuse_starvation()
        if until is not None and until > self._now:
            self._now = until

    def _tell(self, slot: Slot, event: Any) -> None:
        now = self._now
        self._is_busy = True
        try:
            while True:
                self._count()
                if event is _DEADLINE:
                    commands = slot.expire(now)
                    refuse_past_deadline(slot, now)
                else:
                    commands = slot.handle(event, now)
                if self._recorder.is_needed:
                    if event is _DEADLINE:
                        self._recorder.record(slot.name, now, "deadline", None, commands)
                    else:
                        self._recorder.record(slot.name, now, "event", event, commands)
                deadline = slot.next_deadline()
                if deadline != slot.armed_at:
                    self._arm(slot, deadline)
                for command in commands:
                    slot.carry_out(slot.name, command, now)
                if not self._inbox:
                    return
                slot, event = self._inbox.popleft()
        finally:
            self._is_busy = False

    def _arm(self, slot: Slot, deadline: Instant | None) -> None:
        if slot.timer is not None:
            self._queue.cancel(slot.timer)
        slot.armed_at = deadline
        if deadline is None:
            slot.timer = None
        else:
            slot.timer = self._queue.push(max(deadline, self._now), (slot, _DEADLINE), DEADLINE_RANK)

    def _count(self) -> None:
        self.num_events += 1
        if self.num_events - self._num_events_before_instant > self._max_events_per_instant:
            raise StarvationError(
                f"more than {self._max_events_per_instant} events at the one instant {self._now}: time stands still",
                hint="two machines answer each other for ever, or something takes no time at all",
            )

    def _waits_for_background(self) -> bool:
        """Whether background calls, the only ones left, may yet wake unfinished work."""
        if not self._num_background or self._now - self._last_foreground_at > self._patience:
            return False
        return any(slot.machine.unfinished() for slot in self._slots.values())

    def _refuse_starvation(self) -> None:
        for slot in self._slots.values():
            ids = slot.machine.unfinished()
            if ids:
                raise starvation(slot, self._now, ids, "no wake-up is owed to them")
