"""The same requests at other times: a trace cut short, sped up, or sent as a Poisson process."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import msgspec

from rota.base.errors import ConfigError
from rota.base.instant import NANOSECONDS_PER_SECOND, Duration
from rota.base.random_streams import Stream
from rota.serving.workload.arrivals import Arrival


def take(arrivals: Iterable[Arrival], count: int) -> Iterator[Arrival]:
    """The first `count` arrivals."""
    return islice(arrivals, count)


def scale_rate(arrivals: Iterable[Arrival], factor: float) -> Iterator[Arrival]:
    """The same arrivals, `factor` times as many open rows per second; 2.0 halves every gap between them. Rows that wait
    move with what they wait for, after the same gaps: think time is not load."""
    _check_positive("factor", factor)
    return _retimed(arrivals, lambda at: round(at / factor))


def with_poisson(arrivals: Iterable[Arrival], rate: float, stream: Stream) -> Iterator[Arrival]:
    """The same requests in the same order, their open rows arriving as a Poisson process of `rate` a second. Rows that
    wait move with what they wait for."""
    _check_positive("rate", rate)
    now = 0.0

    def drawn(_: int) -> int:
        nonlocal now
        now += stream.exponential(1.0 / rate)
        return round(now * NANOSECONDS_PER_SECOND)

    return _retimed(arrivals, drawn)


def _retimed(arrivals: Iterable[Arrival], at_of: Callable[[int], int]) -> Iterator[Arrival]:
    """The rows, an open one at what `at_of` makes of its instant."""
    moved_by = 0
    for arrival in arrivals:
        if not arrival.after:
            moved_by = at_of(arrival.at) - arrival.at
        yield msgspec.structs.replace(arrival, at=Duration(arrival.at + moved_by))


def _check_positive(name: str, value: float) -> None:
    if not 0.0 < value < float("inf"):
        raise ConfigError(f"{name} must be a positive number, got {value!r}")
