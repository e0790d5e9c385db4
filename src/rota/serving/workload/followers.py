"""Requests that come because others have ended: the next turn of a conversation, the next call of an agent.

What plays a trace takes open rows from the flow one by one, tells it of every end, and is given what comes of it.
"""

from collections.abc import Callable, Iterable, Iterator

from rota.base.errors import DataError
from rota.base.instant import Instant, after
from rota.serving.model.request import Request, RequestId
from rota.serving.workload.arrivals import Arrival

Build = Callable[[Arrival, int, Instant | None], tuple[Request, int]]
"""`build(row, its number from 0, when it comes if it waited)` gives the request and its true output length."""


class ArrivalFlow:
    """Open rows of a trace in order, and rows that wait as soon as all that they wait for has ended.

    However a request ends (finished, rejected, failed, aborted), what waits for it comes: no row of a trace is lost.
    Holds the rows that wait for work which is under way, and no others. Request ids must differ.
    """

    def __init__(self, arrivals: Iterable[Arrival], build: Build) -> None:
        self._arrivals = iter(arrivals)
        self._build = build
        self._waiting: dict[int, list[_Waiting]] = {}
        """By the number of the row that is waited for."""
        self._numbers: dict[RequestId, int] = {}
        """Of the requests under way that others wait for."""

    def __iter__(self) -> Iterator[tuple[Request, int]]:
        """Yield open rows. When one is yielded, all rows that wait for it, however indirectly, have been read.

        Raises `DataError` for a row that waits for one that does not stand between the last open row and itself.
        """
        opened: tuple[int, Arrival] | None = None
        known: dict[str, int] = {}
        for number, arrival in enumerate(self._arrivals):
            if arrival.after:
                self._wait(number, arrival, known)
            else:
                if opened is not None:
                    yield self._come(*opened, None)
                opened = number, arrival
                known.clear()
            if arrival.id is not None:
                known[arrival.id] = number
        if opened is not None:
            yield self._come(*opened, None)

    def ended(self, request_id: RequestId, at: Instant) -> list[tuple[Request, int]]:
        """What comes because this request has ended, each with its `arrived_at`, which is `at` or later."""
        number = self._numbers.pop(request_id, None)
        if number is None:
            return []
        coming = []
        for waiting in self._waiting.pop(number):
            waiting.num_left -= 1
            if waiting.num_left == 0:
                arrival = waiting.arrival
                coming.append(self._come(waiting.number, arrival, after(at, arrival.gap)))
        return coming

    @property
    def num_waited_for(self) -> int:
        """Rows that others wait for."""
        return len(self._waiting)

    def _wait(self, number: int, arrival: Arrival, known: dict[str, int]) -> None:
        waiting = _Waiting(number, arrival)
        for name in arrival.after:
            parent = known.get(name)
            if parent is None:
                raise DataError(f"row {number + 1} of the trace waits for {name!r}, which no row before it is called")
            self._waiting.setdefault(parent, []).append(waiting)

    def _come(self, number: int, arrival: Arrival, at: Instant | None) -> tuple[Request, int]:
        request, num_output_tokens = self._build(arrival, number, at)
        if number in self._waiting:
            self._numbers[request.id] = number
        return request, num_output_tokens


class _Waiting:
    """A row that has not come yet."""

    __slots__ = ("arrival", "num_left", "number")

    def __init__(self, number: int, arrival: Arrival) -> None:
        self.number = number
        self.arrival = arrival
        self.num_left = len(arrival.after)


def refuse_waiting(arrivals: Iterable[Arrival]) -> Iterator[Arrival]:
    """The same arrivals, for who sends each at its own instant. Raises `DataError` at one that waits for another."""
    for number, arrival in enumerate(arrivals, start=1):
        if arrival.after:
            raise DataError(
                f"row {number} of the trace waits for another to end; here every row is sent at an instant of its own",
                hint="rota trace convert --lossy to a format without waits gives every row its earliest instant",
            )
        yield arrival
