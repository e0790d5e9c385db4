"""The live loop: one thing after the other, nothing lost to an error, time that never goes back."""

import asyncio

import pytest

from rota.base.errors import LawBroken
from rota.base.instant import milliseconds
from rota.base.journal import Journal, header_for, read_journal
from rota.runtime.clocks import SystemClock, VirtualClock
from rota.runtime.live import LiveLoop

pytestmark = pytest.mark.asyncio


class Scripted:
    def __init__(self, answer=lambda event, now: ()):
        self.answer = answer
        self.told = []
        self.deadline = None
        self.owed = []
        self.keeps_deadline = False
        self.expired = asyncio.Event()

    def handle(self, event, now):
        self.told.append((now, event))
        return self.answer(event, now)

    def next_deadline(self):
        return self.deadline

    def expire(self, now):
        self.told.append((now, "deadline"))
        if not self.keeps_deadline:
            self.deadline = None
        self.expired.set()
        return ()

    def check(self):
        pass

    def unfinished(self):
        return self.owed


def nothing(name, command, now):
    pass


async def test_rows_reach_the_disk_before_commands_are_carried_out(tmp_path):
    path = tmp_path / "run.jsonl"
    journal = Journal(header_for(None, None), path=path)
    clock = VirtualClock(77)
    loop = LiveLoop(clock, journal)
    seen = []

    def carry_out(name, command, now):
        seen.append((name, command, now, [row.event for row in read_journal(path, {"m": (str, str)})]))

    loop.add_machine("m", Scripted(lambda event, now: [event.upper()]), carry_out)
    loop.submit("m", "a")
    clock.advance_to(80)
    loop.submit("m", "b")
    assert seen == [("m", "A", 77, ["a"]), ("m", "B", 80, ["a", "b"])]
    journal.close()


async def test_what_is_submitted_while_commands_are_carried_out_waits_its_turn():
    log = []
    loop = LiveLoop(VirtualClock())

    def first(name, command, now):
        log.append(("first", command))
        if command < 3:
            loop.submit("second", command)

    loop.add_machine("first", Scripted(lambda event, now: [1, 2, 3]), first)
    loop.add_machine("second", Scripted(lambda event, now: [event]), lambda name, c, now: log.append(("second", c)))
    loop.submit("first", "go")
    assert log == [("first", 1), ("first", 2), ("first", 3), ("second", 1), ("second", 2)]


async def test_now_never_goes_back_even_if_the_clock_does():
    class Jumpy:
        times = iter([50, 60, 40, 70])

        def now(self):
            return next(self.times)

    machine = Scripted()
    loop = LiveLoop(Jumpy())
    loop.add_machine("m", machine, nothing)
    for event in "abc":
        loop.submit("m", event)
    assert machine.told == [(60, "a"), (60, "b"), (70, "c")]


async def test_a_timer_is_kept_moved_and_taken_back():
    loop = LiveLoop(SystemClock())
    machine = Scripted()

    def answer(event, now):
        machine.deadline = None if event is None else now + milliseconds(event)
        return ()

    machine.answer = answer
    loop.add_machine("m", machine, nothing)
    loop.submit("m", 10_000_000)
    loop.submit("m", 2)
    due = machine.deadline
    await machine.expired.wait()
    assert machine.told[-1][1] == "deadline"
    assert machine.told[-1][0] >= due
    loop.submit("m", 1)
    loop.submit("m", None)
    await asyncio.sleep(0.01)
    assert machine.told[-1][1] is None
    loop.submit("m", 1)
    loop.close()
    await asyncio.sleep(0.01)
    assert machine.told[-1][1] == 1


async def test_who_owns_a_stopped_clock_expires_by_hand():
    clock = VirtualClock()
    loop = LiveLoop(clock)
    machines = {name: Scripted() for name in "abc"}
    machines["a"].deadline, machines["b"].deadline = 5, 6
    for name, machine in machines.items():
        loop.add_machine(name, machine, nothing)
    clock.advance_to(5)
    loop.expire_due()
    assert [machine.told for machine in machines.values()] == [[(5, "deadline")], [], []]
    loop.close()


async def test_errors_surface_after_everything_else_was_done():
    done = []
    loop = LiveLoop(VirtualClock())

    def carry_out(name, command, now):
        if command == 1:
            loop.submit("other", "x")
        if command == 2:
            raise OSError("hands")
        done.append(command)

    loop.add_machine("m", Scripted(lambda event, now: [1, 2, 3]), carry_out)
    other = Scripted()
    loop.add_machine("other", other, nothing)
    with pytest.raises(OSError, match="hands"):
        loop.submit("m", "go")
    assert done == [1, 3]
    assert other.told == [(0, "x")]
    loop.submit("other", "y")
    assert other.told[-1] == (0, "y")


async def test_several_errors_surface_as_a_group():
    def broken(event, now):
        raise LawBroken("machine")

    def carry_out(name, command, now):
        loop.submit("other", "x")
        raise OSError("hands")

    loop = LiveLoop(VirtualClock())
    loop.add_machine("m", Scripted(lambda event, now: [1]), carry_out)
    loop.add_machine("other", Scripted(broken), nothing)
    with pytest.raises(ExceptionGroup) as caught:
        loop.submit("m", "go")
    assert [type(error) for error in caught.value.exceptions] == [OSError, LawBroken]


async def test_a_journal_that_cannot_be_written_does_not_lose_the_commands():
    class FullDisk(Journal):
        def flush(self):
            raise OSError("no space left")

    done = []
    loop = LiveLoop(VirtualClock(), FullDisk(header_for(None, None)))
    loop.add_machine("m", Scripted(lambda event, now: [event]), lambda name, command, now: done.append(command))
    with pytest.raises(OSError, match="no space left"):
        loop.submit("m", "go")
    assert done == ["go"]


async def test_an_error_behind_a_timer_reaches_the_event_loop():
    heard = asyncio.Queue()
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: heard.put_nowait(context["exception"]))
    machine = Scripted()
    loop = LiveLoop(SystemClock())
    machine.keeps_deadline = True
    machine.deadline = loop.now()
    loop.add_machine("m", machine, nothing)
    assert isinstance(await heard.get(), LawBroken)
    await asyncio.sleep(0.01)
    assert heard.empty(), "a deadline that never clears must not spin"
    asyncio.get_running_loop().set_exception_handler(None)


async def test_the_liveness_watch_reports_who_starves_and_only_them():
    reports = asyncio.Queue()
    loop = LiveLoop(SystemClock())
    starving, busy, waiting, idle = Scripted(), Scripted(), Scripted(), Scripted()
    for name, machine in (("starving", starving), ("busy", busy), ("waiting", waiting), ("idle", idle)):
        machine.owed = [] if name == "idle" else ["job-1"]
        loop.add_machine(name, machine, nothing)
    waiting.deadline = loop.now() + milliseconds(10_000_000)
    loop.submit("waiting", "set the deadline")

    async def chatter():
        while True:
            loop.submit("busy", "still here")
            await asyncio.sleep(0)

    tasks = [
        asyncio.create_task(chatter()),
        asyncio.create_task(loop.liveness_watch(milliseconds(5), reports.put_nowait)),
    ]
    heard = [str(await reports.get()) for _ in range(3)]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    loop.close()
    assert all(message.startswith("starving at ") and "job-1" in message for message in heard)


async def test_names_are_unique_and_known():
    loop = LiveLoop(VirtualClock())
    loop.add_machine("m", Scripted(), nothing)
    with pytest.raises(LawBroken, match="there already"):
        loop.add_machine("m", Scripted(), nothing)
    with pytest.raises(LawBroken, match="no machine is named 'n'"):
        loop.submit("n", "x")
