"""Large bodies are read by a process of their own, one at a time, and tenants take turns.

One thread serves everybody: to read a body of 8 MiB takes some 10 ms of it, and of one that is made for it a second.
What is smaller than `LARGE_BYTES` is read where it comes, at once. A process is started at the first large body.
"""

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MappingProxyType

from rota.serving.frontdoor.problems import Problem
from rota.serving.frontdoor.reading import CHAT, COMPLETIONS, BodyReader, Reading
from rota.serving.frontdoor.reading_process import ReadingLostError, ReadingProcess

LARGE_BYTES: Mapping[str, int] = MappingProxyType({CHAT: 128 * 1024, COMPLETIONS: 32 * 1024})
"""From here on a body is read elsewhere: 32,000 tokens of text, half a millisecond. The worst below is 3 ms for a chat.
A text completion may be lists and numbers, which take ten times as long to read: 5 ms for the worst below."""
READ_SECONDS_MAX = 20.0
"""After so long the process is taken to hang. The worst body of 8 MiB takes one to three."""
RESTART_SECONDS = 1.0
"""From one start of the process to the next, whatever it dies of."""

_log = logging.getLogger(__name__)

Outcome = Reading | Problem


class LargeBody:
    """One body that waits to be read, or is being read."""

    __slots__ = ("_bodies", "heard", "is_wanted", "parts", "reader", "who")

    def __init__(
        self,
        bodies: "LargeBodies",
        who: str | None,
        reader: BodyReader,
        parts: list[bytes],
        heard: Callable[[Outcome], None],
    ) -> None:
        self._bodies = bodies
        self.who = who
        self.reader = reader
        self.parts = parts
        self.heard = heard
        self.is_wanted = True

    def forget(self) -> None:
        """Nobody wants to hear of it any more."""
        self.is_wanted = False
        self._bodies.forget(self)

    def tell(self, outcome: Outcome) -> None:
        if self.is_wanted:
            self.is_wanted = False
            self.heard(outcome)


class LargeBodies:
    """Has large bodies read, one of each tenant in turn.

    Nobody waits for more than what is being read and one body of each other tenant before the next of its own, however
    many one has sent. A body whose process dies or hangs is not read: its client is told to try again, and the next
    body gets a new process, one a second at most. What waits is bounded by the connections, of each of which one body
    waits at most.
    """

    def __init__(self, start: Callable[[], ReadingProcess]) -> None:
        """`start` starts a process, in a thread."""
        self._start = start
        self._process: ReadingProcess | None = None
        self._started_at = float("-inf")
        self._waiting: OrderedDict[str | None, OrderedDict[LargeBody, None]] = OrderedDict()
        """By tenant, in the order of their turns; of a tenant in the order of arrival."""
        self._being_read: LargeBody | None = None
        self._reading: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    @property
    def num_unread(self) -> int:
        """Bodies that somebody waits for."""
        return sum(map(len, self._waiting.values())) + (self._being_read is not None and self._being_read.is_wanted)

    def read(
        self, who: str | None, reader: BodyReader, parts: list[bytes], heard: Callable[[Outcome], None]
    ) -> LargeBody:
        """Have a body of a tenant read; `heard` is told once what came of it, never from within this call."""
        body = LargeBody(self, who, reader, parts, heard)
        self._waiting.setdefault(who, OrderedDict())[body] = None
        if self._reading is None:
            self._reading = asyncio.create_task(self._read_all(), name="large bodies")
        return body

    def forget(self, body: LargeBody) -> None:
        """Do not read a body that waits."""
        waiting = self._waiting.get(body.who)
        if waiting is not None:
            waiting.pop(body, None)
            if not waiting:
                del self._waiting[body.who]

    async def close(self, problem: Problem) -> None:
        """Answer everybody who waits with a problem, and end the process."""
        self._closing.set()
        for waiting in list(self._waiting.values()):
            for body in list(waiting):
                body.tell(problem)
        self._waiting.clear()
        if self._being_read is not None:
            self._being_read.tell(problem)
        if self._process is not None:
            self._process.kill()
        if self._reading is not None:
            await self._reading
        await self._end()

    async def _read_all(self) -> None:
        while self._waiting:
            body = self._being_read = self._next()
            outcome = await self._read(body)
            self._being_read = None
            body.tell(outcome)
        self._reading = None

    def _next(self) -> LargeBody:
        """The first of the tenant whose turn it is; its next one waits behind all other tenants."""
        who, waiting = self._waiting.popitem(last=False)
        body, _ = waiting.popitem(last=False)
        if waiting:
            self._waiting[who] = waiting
        return body

    async def _read(self, body: LargeBody) -> Outcome:
        if self._process is not None and not self._process.is_alive:
            await self._end()
        if self._process is None:
            await self._pause(self._started_at + RESTART_SECONDS - time.monotonic())
            self._started_at = time.monotonic()
        overdue = asyncio.get_running_loop().call_later(READ_SECONDS_MAX, self._kill)
        try:
            return await asyncio.to_thread(self._ask, body)
        except Problem as problem:
            return problem
        except Exception as error:
            if not self._closing.is_set():
                is_known = isinstance(error, ReadingLostError)
                _log.warning("the process that reads large bodies was lost: %s", error, exc_info=not is_known)
            await self._end()
            return Problem(503, "the body could not be read; try again", code="body_not_read", retry_after_seconds=1)
        finally:
            overdue.cancel()

    def _ask(self, body: LargeBody) -> Reading:
        """In a thread, which waits without holding up anybody."""
        if self._process is None and not self._closing.is_set():
            self._process = self._start()
        if self._process is None or self._closing.is_set():
            raise ReadingLostError("the router stops")
        return self._process.read(body.reader, body.parts)

    async def _pause(self, seconds: float) -> None:
        """Wait, unless the router stops meanwhile."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._closing.wait()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await asyncio.to_thread(process.end)
