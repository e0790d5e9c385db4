"""Open-loop load: every request leaves at its moment, however slow the server is."""

import asyncio
from collections.abc import Callable, Iterable

from rota.base.instant import NANOSECONDS_PER_SECOND, Instant, after
from rota.serving.bench.client import Sent, Target
from rota.serving.bench.plan import Planned


async def send_load(
    plan: Iterable[Planned],
    target: Target,
    text_of: Callable[[Planned], str],
    clock: Callable[[], Instant],
    *,
    stop: asyncio.Event,
    on_ended: Callable[[int], None] | None = None,
) -> list[Sent]:
    """Send a plan and wait for every answer; returns what came of each request, in order of their ends.

    The plan's moments count from the call. `stop` ends it early: nothing more is sent, and what is in flight is dropped
    and comes back as aborted. `on_ended` hears how many have ended.
    """
    ended: list[Sent] = []
    in_flight: set[asyncio.Task[Sent]] = set()
    began_at = clock()

    def over(task: asyncio.Task[Sent]) -> None:
        in_flight.discard(task)
        if not task.cancelled():
            ended.append(task.result())
            if on_ended is not None:
                on_ended(len(ended))

    for planned in plan:
        # The body is made ahead of its moment, while the generator would be waiting anyway.
        body = target.body(planned, text_of(planned))
        scheduled_at = after(began_at, planned.at)
        if await _reached(scheduled_at, clock, stop):
            break
        task = asyncio.create_task(target.ask(planned, body, scheduled_at))
        in_flight.add(task)
        task.add_done_callback(over)
    waiter = asyncio.create_task(stop.wait())
    while in_flight and not stop.is_set():
        await asyncio.wait({*in_flight, waiter}, return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    # A task that has not begun yet is given a turn first: cancelled before that, it could not say that it was.
    await asyncio.sleep(0)
    dropped = list(in_flight)
    for task in dropped:
        task.cancel()
    await asyncio.gather(*dropped, return_exceptions=True)
    await asyncio.sleep(0)
    return ended


async def _reached(moment: Instant, clock: Callable[[], Instant], stop: asyncio.Event) -> bool:
    """Wait for a moment; returns whether the run was stopped meanwhile."""
    while not stop.is_set():
        left = moment - clock()
        if left <= 0:
            # Late already: let what is due happen before the next is sent.
            await asyncio.sleep(0)
            break
        try:
            async with asyncio.timeout(left / NANOSECONDS_PER_SECOND):
                await stop.wait()
        except TimeoutError:
            continue
    return stop.is_set()
