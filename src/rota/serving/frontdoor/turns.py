"""Whose request the router looks at next, where many come at once: tenants take turns by the time that theirs take.

One thread reads, prices and answers for everybody, so whoever sends as fast as requests are answered would otherwise
make all others wait behind whatever lies in front of them.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable

from rota.serving.frontdoor.exchange import Exchange

TURN_SECONDS = 0.00025
"""What one tenant may take of each pass of the event loop: two or three requests."""


class Turns:
    """Has each tenant's requests looked at for a quarter of a millisecond in each pass of the event loop, and one at
    least.

    A request of a tenant that has nothing waiting and has not had its turn in this pass is looked at at once, so nobody
    who asks less than that waits at all. What waits is kept in the order of arrival within the tenant. Where n tenants
    flood, anybody else waits for n turns at most and for whatever the router does meanwhile for the answers; it never
    waits for a whole queue. Nothing is idle while something waits.

    What waits is bounded by the connections, of each of which one request waits at most.
    """

    def __init__(
        self,
        handle: Callable[[Exchange], None],
        *,
        turn_seconds: float = TURN_SECONDS,
        clock: Callable[[], float] = time.perf_counter,
        soon: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        """`clock` is in seconds; `soon` calls back in the next pass of the event loop, the running one by default."""
        self._handle = handle
        self._turn_seconds = turn_seconds
        self._clock = clock
        self._soon = soon
        self._waiting: dict[str | None, deque[Exchange]] = {}
        """By tenant, those of whom something waits; strangers are None, all together."""
        self._had: dict[str | None, float] = {}
        """Seconds that each had in this pass."""
        self._is_due = False

    def take(self, who: str | None, exchange: Exchange) -> None:
        """Look at a request now or when its tenant's turn comes."""
        if not self._is_due:
            self._is_due = True
            (self._soon or asyncio.get_running_loop().call_soon)(self._next_pass)
        if who in self._waiting or self._had.get(who, 0.0) >= self._turn_seconds:
            self._waiting.setdefault(who, deque()).append(exchange)
        else:
            self._look(who, exchange)

    def _next_pass(self) -> None:
        self._is_due = False
        self._had.clear()
        if not self._waiting:
            return
        self._is_due = True
        (self._soon or asyncio.get_running_loop().call_soon)(self._next_pass)
        for who in list(self._waiting):
            queue = self._waiting[who]
            while queue and self._had.get(who, 0.0) < self._turn_seconds:
                self._look(who, queue.popleft())
            if not queue:
                del self._waiting[who]

    def _look(self, who: str | None, exchange: Exchange) -> None:
        began_at = self._clock()
        if not exchange.done:  # Its client may have left.
            self._handle(exchange)
        self._had[who] = self._had.get(who, 0.0) + self._clock() - began_at
