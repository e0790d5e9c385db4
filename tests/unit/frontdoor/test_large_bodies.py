"""Large bodies are read one of each tenant in turn, each is heard of once, and a process that dies is no end of it."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rota.serving.frontdoor import large_bodies
from rota.serving.frontdoor.identity import NOBODY
from rota.serving.frontdoor.large_bodies import LargeBodies, LargeBody, Outcome
from rota.serving.frontdoor.problems import Problem
from rota.serving.frontdoor.reading import CHAT, BodyReader, Reading
from rota.serving.frontdoor.reading_process import ReadingLostError, ReadingProcess

READER = BodyReader(CHAT, NOBODY, None, 1024, resume=True, counts_text=False)
STOPPING = Problem(503, "stopping", code="shutting_down")


class Reads:
    """A process that takes as long as a test wants, and dies when it is told to."""

    def __init__(self) -> None:
        self.is_alive = True
        self.has_ended = False
        self.go_on = threading.Semaphore(0)
        self.seen: list[bytes] = []

    def read(self, reader: BodyReader, parts: list[bytes]) -> Reading:
        self.seen.append(b"".join(parts))
        assert self.go_on.acquire(timeout=20)
        if not self.is_alive:
            raise ReadingLostError("it ended in the middle")
        if parts == [b"bad"]:
            raise Problem(400, "bad", code="malformed_json")
        return cast(Reading, parts[0])

    def kill(self) -> None:
        self.is_alive = False
        self.go_on.release()

    def end(self) -> None:
        self.kill()
        self.has_ended = True


class Desk:
    """Large bodies, and what was heard of each."""

    def __init__(self, start: Callable[[], Reads] = Reads) -> None:
        self.started: list[Reads] = []
        self._start = start
        self.bodies = LargeBodies(self._started)
        self.heard: list[tuple[bytes, Outcome]] = []

    def _started(self) -> ReadingProcess:
        self.started.append(self._start())
        return cast(ReadingProcess, self.started[-1])

    def take(self, who: str | None, raw: bytes) -> LargeBody:
        return self.bodies.read(who, READER, [raw], lambda outcome: self.heard.append((raw, outcome)))

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                await asyncio.sleep(0.001)

    async def next_one(self) -> None:
        """Let the process read one body."""
        await self.until(lambda: self.started)
        self.started[-1].go_on.release()


@asynccontextmanager
async def a_desk(start: Callable[[], Reads] = Reads) -> AsyncIterator[Desk]:
    desk = Desk(start)
    try:
        yield desk
    finally:
        await desk.bodies.close(STOPPING)


@settings(max_examples=60, deadline=None)
@given(
    whose=st.lists(st.sampled_from("abc"), min_size=1, max_size=14),
    leave=st.sets(st.integers(0, 13)),
    num_read=st.integers(0, 14),
)
def test_tenants_take_turns_each_body_is_heard_of_once_and_who_left_is_not_read(
    whose: list[str], leave: set[int], num_read: int
) -> None:
    async def scenario() -> None:
        async with a_desk() as desk:
            taken = [desk.take(who, name(whose, index)) for index, who in enumerate(whose)]
            await desk.until(lambda: desk.started and desk.started[0].seen)
            for index in leave:
                if index < len(taken):
                    taken[index].forget()
            stay = {index for index in range(len(taken)) if index not in leave}
            assert desk.bodies.num_unread == len(stay)
            process = desk.started[0]
            for _ in range(min(num_read, len(stay | {0}))):
                process.go_on.release()
            num_heard = min(num_read, len(stay | {0})) - (0 not in stay and num_read > 0)
            await desk.until(lambda: len(desk.heard) == num_heard)
            await desk.bodies.close(STOPPING)
            assert sorted(raw for raw, _ in desk.heard) == sorted(name(whose, index) for index in stay)
            assert all(outcome == raw for raw, outcome in desk.heard[:num_heard])
            assert all(outcome is STOPPING for _, outcome in desk.heard[num_heard:])
            assert process.has_ended
            assert desk.bodies.num_unread == 0
            in_turns(whose, stay | {0}, [raw.decode() for raw in process.seen])

    asyncio.run(scenario())


def name(whose: list[str], index: int) -> bytes:
    return b"%s%d" % (whose[index].encode(), index)


def in_turns(whose: list[str], wanted: set[int], seen: list[str]) -> None:
    """Between two bodies of a tenant that has more, each other one that has any is read once."""
    left = {who: [f"{who}{index}" for index in sorted(wanted) if whose[index] == who] for who in "abc"}
    last_read = dict.fromkeys("abc", -1)
    for number, read in enumerate(seen):
        assert read == left[read[0]].pop(0), "in the order of arrival within a tenant"
        for who, more in left.items():
            if more and who != read[0]:
                assert last_read[who] >= last_read[read[0]], f"{read[0]} was read twice while {who} waited"
        last_read[read[0]] = number


@pytest.mark.asyncio
async def test_a_flood_of_one_makes_another_wait_for_what_is_read_and_one_more() -> None:
    async with a_desk() as desk:
        for number in range(50):
            desk.take("flood", b"%d" % number)
        await desk.until(lambda: desk.started and desk.started[0].seen)
        desk.take("other", b"other")
        for _ in range(3):
            await desk.next_one()
        await desk.until(lambda: len(desk.heard) == 3)
        assert [raw for raw, _ in desk.heard] == [b"0", b"1", b"other"]


@pytest.mark.asyncio
async def test_no_process_is_started_before_there_is_a_body_and_one_reads_them_all() -> None:
    async with a_desk() as desk:
        await asyncio.sleep(0)
        assert not desk.started
        for raw in (b"one", b"bad", b"two"):
            desk.take(None, raw)
            await desk.next_one()
            await desk.until(lambda raw=raw: desk.heard and desk.heard[-1][0] == raw)  # type: ignore[misc]
        assert [getattr(outcome, "status", outcome) for _, outcome in desk.heard] == [b"one", 400, b"two"]
    assert [each.has_ended for each in desk.started] == [True]


@pytest.mark.asyncio
async def test_whose_process_dies_is_told_to_try_again_and_the_next_has_a_new_one_after_a_while(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paused: list[float] = []

    async def pause(self: LargeBodies, seconds: float) -> None:
        paused.append(seconds)

    monkeypatch.setattr(LargeBodies, "_pause", pause)
    async with a_desk() as desk:
        for raw in (b"deadly", b"deadly too", b"good"):
            desk.take("a", raw)
        for number in (1, 2):
            await desk.until(lambda number=number: len(desk.started) == number and desk.started[-1].seen)  # type: ignore[misc]
            desk.started[-1].kill()
        await desk.until(lambda: len(desk.started) == 3)
        await desk.next_one()
        await desk.until(lambda: len(desk.heard) == 3)
        for _, outcome in desk.heard[:2]:
            assert isinstance(outcome, Problem)
            assert (outcome.status, outcome.code, outcome.retry_after_seconds) == (503, "body_not_read", 1)
        assert desk.heard[2] == (b"good", b"good")
        assert [each.has_ended for each in desk.started] == [True, True, False]
    assert paused[0] <= 0, "the first is started at once"
    assert all(0 < each <= large_bodies.RESTART_SECONDS for each in paused[1:])
    assert "it ended in the middle" in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.asyncio
async def test_a_process_that_died_while_nobody_asked_costs_no_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_bodies, "RESTART_SECONDS", 0.0)
    async with a_desk() as desk:
        for raw in (b"one", b"two"):
            desk.take("a", raw)
            await desk.until(lambda raw=raw: desk.started and desk.started[-1].seen == [raw])  # type: ignore[misc]
            desk.started[-1].go_on.release()
            await desk.until(lambda raw=raw: desk.heard and desk.heard[-1] == (raw, raw))  # type: ignore[misc]
            desk.started[-1].kill()
    assert len(desk.started) == 2


@pytest.mark.asyncio
async def test_a_process_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_bodies, "READ_SECONDS_MAX", 0.05)
    async with a_desk() as desk:
        desk.take("a", b"endless")
        await desk.until(lambda: desk.heard)
        assert isinstance(desk.heard[0][1], Problem)
        assert desk.started[0].has_ended


@pytest.mark.asyncio
async def test_what_cannot_be_started_at_all_is_no_end_either(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(large_bodies, "RESTART_SECONDS", 0.0)
    tries: list[int] = []

    def start() -> Reads:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("can't start new thread")
        return Reads()

    async with a_desk(start) as desk:
        desk.take("a", b"one")
        desk.take("a", b"two")
        await desk.next_one()
        await desk.until(lambda: len(desk.heard) == 2)
    assert isinstance(desk.heard[0][1], Problem)
    assert desk.heard[1] == (b"two", b"two")
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.asyncio
async def test_closing_while_a_process_starts_leaves_none() -> None:
    starting = threading.Event()
    closing = threading.Event()

    def start() -> Reads:
        starting.set()
        assert closing.wait(20)
        return Reads()

    desk = Desk(start)
    desk.take("a", b"one")
    await asyncio.to_thread(starting.wait, 20)
    ended = asyncio.create_task(desk.bodies.close(STOPPING))
    await desk.until(lambda: desk.heard)
    closing.set()
    await asyncio.wait_for(ended, 20)
    assert desk.heard == [(b"one", STOPPING)]
    assert [(each.has_ended, each.seen) for each in desk.started] == [(True, [])]
