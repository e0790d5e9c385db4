"""Machines under the real clock, on one asyncio event loop: no threads, no locks.

A machine is told one thing after the other, in the order in which they were submitted, and is never suspended.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from rota.base.errors import StarvationError
from rota.base.instant import Duration, Instant, to_seconds
from rota.base.journal import Journal
from rota.base.machine import Machine
from rota.runtime.clocks import Clock
from rota.runtime.observers import Observer
from rota.runtime.slot import CarryOut, Recorder, Slot, add_slot, refuse_past_deadline, slot_named, starvation

_DEADLINE: Any = object()


class LiveLoop:
    """Drives machines through real time. All methods must be called from the thread of one running event loop."""

    def __init__(self, clock: Clock, journal: Journal | None = None, observers: Iterable[Observer] = ()) -> None:
        self._clock = clock
        self._journal = journal
        self._last_now = clock.now()
        self._slots: dict[str, Slot] = {}
        self._recorder = Recorder(journal, observers)
        self._inbox: deque[tuple[Slot, Any]] = deque()
        self._is_busy = False
        self._num_told: dict[str, int] = {}

    def now(self) -> Instant:
        """The present instant, which never goes back."""
        self._last_now = max(self._last_now, self._clock.now())
        return self._last_now

    def add_machine(self, name: str, machine: Machine[Any, Any], carry_out: CarryOut) -> None:
        """Drive `machine` under `name`; its commands go to `carry_out(name, command, now)`, in order.

        `carry_out` must not block: what takes time is a task that it starts.
        """
        slot = Slot(name, machine, carry_out)
        add_slot(self._slots, slot)
        self._num_told[name] = 0
        self._arm(slot)

    def add_observer(self, observer: Observer) -> None:
        """Show it every row from now on."""
        self._recorder.add_observer(observer)

    def remove_machine(self, name: str) -> None:
        """Drive a machine no more. Nothing may be submitted under its name afterwards."""
        self._disarm(slot_named(self._slots, name))
        del self._slots[name], self._num_told[name]

    def submit(self, machine_name: str, event: object) -> None:
        """Tell a machine of an event that has just happened.

        Its commands have been carried out when this returns, unless it was called while others were: then it waits
        until the last of those has been. An error in a machine or in `carry_out` is raised here, after everything else
        that was waiting has been dealt with; several errors are raised as a group.
        """
        self._inbox.append((slot_named(self._slots, machine_name), event))
        if not self._is_busy:
            self._drain()

    def expire_due(self) -> None:
        """Tell every machine whose deadline has come. The loop's own timers do so; a stopped clock's owner calls it."""
        now = self.now()
        self._inbox.extend(
            (slot, _DEADLINE) for slot in self._slots.values() if slot.armed_at is not None and slot.armed_at <= now
        )
        if not self._is_busy:
            self._drain()

    def close(self) -> None:
        """Stop the timers. Machines are told nothing more of deadlines."""
        for slot in self._slots.values():
            self._disarm(slot)

    async def liveness_watch(self, period: Duration, report: Callable[[StarvationError], None]) -> None:
        """Every `period`, report each machine that has unfinished work, no deadline, and was told nothing since.

        What is owed a wake-up from outside cannot be seen from here, so choose a period in which any live system would
        have said something. Runs until cancelled.
        """
        told_before: dict[str, int] = {}
        while True:
            await asyncio.sleep(to_seconds(period))
            for name, slot in self._slots.items():
                ids = slot.machine.unfinished()
                if ids and slot.armed_at is None and told_before.get(name) == self._num_told[name]:
                    report(starvation(slot, self.now(), ids, f"nothing was heard for {to_seconds(period):g} s"))
            told_before = dict(self._num_told)

    def _drain(self) -> None:
        errors: list[Exception] = []
        self._is_busy = True
        try:
            while self._inbox:
                slot, event = self._inbox.popleft()
                self._tell(slot, event, errors)
        finally:
            self._is_busy = False
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise ExceptionGroup("machines or their hands failed", errors)

    def _tell(self, slot: Slot, event: Any, errors: list[Exception]) -> None:
        now = self.now()
        is_deadline = event is _DEADLINE
        if is_deadline and (slot.armed_at is None or slot.armed_at > now):
            return  # what was told in between has moved the deadline
        self._num_told[slot.name] += 1
        try:
            if is_deadline:
                self._disarm(slot)
                commands = slot.expire(now)
                refuse_past_deadline(slot, now)
            else:
                commands = slot.handle(event, now)
            self._arm(slot)
        except Exception as error:
            errors.append(error)
            return
        if self._recorder.is_needed:
            try:
                if is_deadline:
                    self._recorder.record(slot.name, now, "deadline", None, commands)
                else:
                    self._recorder.record(slot.name, now, "event", event, commands)
                if self._journal is not None:
                    self._journal.flush()
            except Exception as error:  # a full disk must not lose the work that was accepted
                errors.append(error)
        for command in commands:
            try:
                slot.carry_out(slot.name, command, now)
            except Exception as error:
                errors.append(error)

    def _arm(self, slot: Slot) -> None:
        deadline = slot.next_deadline()
        if deadline == slot.armed_at:
            return
        self._disarm(slot)
        if deadline is not None:
            slot.armed_at = deadline
            delay = to_seconds(max(deadline - self.now(), 0))
            slot.timer = asyncio.get_running_loop().call_later(delay, self._fire, slot)

    def _disarm(self, slot: Slot) -> None:
        if slot.timer is not None:
            slot.timer.cancel()
        slot.timer = slot.armed_at = None

    def _fire(self, slot: Slot) -> None:
        if slot.armed_at is not None and slot.armed_at > self.now():
            # The event loop fired a little early by our clock: arm anew for the rest.
            self._disarm(slot)
            self._arm(slot)
            return
        self._inbox.append((slot, _DEADLINE))
        if not self._is_busy:
            self._drain()
