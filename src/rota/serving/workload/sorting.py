"""Rows of a trace put in order of time, in bounded memory: sorted runs on disk, then merged."""

import heapq
from collections.abc import Iterable, Iterator
from itertools import count
from tempfile import TemporaryFile
from typing import IO

import msgspec

from rota.base.instant import Duration
from rota.serving.workload.arrivals import Arrival

RUN_ROWS = 100_000
"""Rows that are held in memory, and sorted, at a time."""

_LENGTH_BYTES = 8
_Group = list[Arrival]
"""An open row and the rows that wait, up to the next open one: they are moved together."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Arrival]).decode


def in_order(arrivals: Iterable[Arrival], *, run_rows: int = RUN_ROWS) -> Iterator[Arrival]:
    """The same rows by the instant of their open row, those of one instant in the order they came in, shifted so that
    none lies before 0. All rows are read before the first is yielded; `run_rows` of them are in memory, the rest in
    temporary files."""
    runs: list[IO[bytes]] = []
    numbers = count()
    held: list[tuple[int, int, _Group]] = []
    num_held, earliest = 0, 0
    try:
        for group in groups(arrivals):
            if num_held >= run_rows:
                runs.append(_written(held))
                held, num_held = [], 0
            held.append((group[0].at, next(numbers), group))
            num_held += len(group)
            earliest = min(earliest, group[0].at)
        held.sort(key=_place)
        merged = heapq.merge(*(_read(run) for run in runs), held, key=_place)
        for _, _, group in merged:
            yield from shifted(group, -earliest)
    finally:
        for run in runs:
            run.close()


def groups(arrivals: Iterable[Arrival]) -> Iterator[_Group]:
    """Every open row with the rows after it that wait."""
    group: _Group = []
    for arrival in arrivals:
        if not arrival.after and group:
            yield group
            group = []
        group.append(arrival)
    if group:
        yield group


def shifted(group: Iterable[Arrival], by: int) -> Iterator[Arrival]:
    """The rows, so much later."""
    if not by:
        return iter(group)
    return (msgspec.structs.replace(arrival, at=Duration(arrival.at + by)) for arrival in group)


def _place(entry: tuple[int, int, _Group]) -> tuple[int, int]:
    return entry[:2]


def _written(held: list[tuple[int, int, _Group]]) -> IO[bytes]:
    file: IO[bytes] = TemporaryFile()  # noqa: SIM115 - closed by `in_order`
    for at, number, group in sorted(held, key=_place):
        body = _encode(group)
        file.write(b"".join(value.to_bytes(_LENGTH_BYTES, "big", signed=True) for value in (at, number, len(body))))
        file.write(body)
    return file


def _read(file: IO[bytes]) -> Iterator[tuple[int, int, _Group]]:
    file.seek(0)
    while head := file.read(3 * _LENGTH_BYTES):
        at, number, size = (
            int.from_bytes(head[start : start + _LENGTH_BYTES], "big", signed=True)
            for start in range(0, len(head), _LENGTH_BYTES)
        )
        yield at, number, _decode(file.read(size))
