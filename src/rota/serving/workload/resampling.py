"""Another trace of the same kind: blocks of time drawn from a recorded one, so that it can be asked twice."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator

import msgspec

from rota.base.errors import ConfigError
from rota.base.instant import Duration
from rota.base.random_streams import Stream
from rota.serving.workload.arrivals import Arrival
from rota.serving.workload.followers import refuse_waiting


def resample_blocks(arrivals: Iterable[Arrival], block: Duration, stream: Stream) -> Iterator[Arrival]:
    """As long a trace, glued of blocks of `block` ns that begin at random moments of the recorded one (the circular
    block bootstrap of Politis and Romano, 1992): bursts shorter than a block and the lengths that go with them stay
    together, the order of blocks and how often each comes are drawn.

    Holds the whole trace in memory. A request that is drawn again is another request: its session and its prefixes get
    names of their own, shared only with those that are drawn for as many times, so that no copy finds the first one's
    blocks in a cache. Raises `ConfigError` for a block that is not positive, `DataError` for a row that waits for
    another: a block would cut its program in two.
    """
    if block <= 0:
        raise ConfigError(f"the block of a resampled trace must be longer than 0, not {block} ns")
    recorded = list(refuse_waiting(arrivals))
    if not recorded:
        return
    at = [arrival.at for arrival in recorded]
    # The gap after the last arrival is not recorded; a mean gap closes the circle.
    span = at[-1] + max(1, at[-1] // max(1, len(at) - 1))
    stride = 1 + max((h for arrival in recorded for h in arrival.prefix_hashes), default=0)
    num_drawn = [0] * len(recorded)
    for begins in range(0, span, block):
        length = min(block, span - begins)
        start = stream.integers(0, span)
        for index, offset in _within(at, start, length, span):
            yield _copied(recorded[index], Duration(begins + offset), num_drawn[index], stride)
            num_drawn[index] += 1


def _within(at: list[Duration], start: int, length: int, span: int) -> Iterator[tuple[int, int]]:
    """Index and offset of each arrival in `[start, start + length)`, on a circle of `span`."""
    index, lap = bisect_left(at, start), 0
    while True:
        if index == len(at):
            index, lap = 0, lap + span
        offset = at[index] + lap - start
        if offset >= length:
            return
        yield index, offset
        index += 1


def _copied(arrival: Arrival, at: Duration, copy: int, stride: int) -> Arrival:
    if not copy:
        return msgspec.structs.replace(arrival, at=at)
    session = None if arrival.session is None else f"{arrival.session}#{copy}"
    hashes = tuple(h + copy * stride for h in arrival.prefix_hashes)
    return msgspec.structs.replace(arrival, at=at, session=session, prefix_hashes=hashes)
