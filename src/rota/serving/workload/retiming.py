"""The same requests at other times: a trace cut short, sped up, or sent as a Poisson process."""

from collections.abc import Iterable, Iterator
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
    """The same arrivals, `factor` times as many per second; 2.0 halves every gap."""
    _check_positive("factor", factor)
    for arrival in arrivals:
        yield msgspec.structs.replace(arrival, at=Duration(round(arrival.at / factor)))


def with_poisson(arrivals: Iterable[Arrival], rate: float, stream: Stream) -> Iterator[Arrival]:
    """The same requests in the same order, arriving as a Poisson process of `rate` requests a second."""
    _check_positive("rate", rate)
    at = 0.0
    for arrival in arrivals:
        at += stream.exponential(1.0 / rate)
        yield msgspec.structs.replace(arrival, at=Duration(round(at * NANOSECONDS_PER_SECOND)))


def _check_positive(name: str, value: float) -> None:
    if not 0.0 < value < float("inf"):
        raise ConfigError(f"{name} must be a positive number, got {value!r}")
