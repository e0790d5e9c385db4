"""A million rows are read, and described, in the memory that some thousands take."""

import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from rota.base.instant import Duration
from rota.base.random_streams import RandomStreams
from rota.serving.workload.arrivals import Arrival
from rota.serving.workload.formats import read_trace, writer_of
from rota.serving.workload.sorting import in_order

NUM_ROWS = 1_000_000
MEGABYTE = 1024 * 1024


def rows(count: int) -> Iterator[Arrival]:
    for number in range(count):
        yield Arrival(Duration(number * 50_000_000), 100 + number % 3000, 1 + number % 700)


def with_blocks(count: int) -> Iterator[Arrival]:
    for row in rows(count):
        first = row.num_prompt_tokens
        yield Arrival(row.at, first, row.num_output_tokens, tuple(range(first, first + -(-first // 512))), 512)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "trace.csv"
    assert writer_of("azure").write(path, rows(NUM_ROWS)) == NUM_ROWS
    return path


def peak_of(arrivals: Iterator[Arrival]) -> tuple[int, int]:
    """How many rows there are, and the most memory that reading them took, in bytes."""
    tracemalloc.start()
    try:
        count = sum(1 for _ in arrivals)
        return count, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


PEAKS = """
import resource, sys
from itertools import islice
from pathlib import Path
from rota.base.random_streams import RandomStreams
from rota.serving.workload.description import Gathering
from rota.serving.workload.formats import read_trace

gathering = Gathering(cache_blocks=())
for number, arrival in enumerate(read_trace(Path(sys.argv[1]), RandomStreams(0)), start=1):
    gathering.take(arrival)
    if number == 20_000:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(number, gathering.description().num_rows)
"""


@pytest.mark.slow
def test_a_million_rows_are_read_and_described_in_bounded_memory(trace: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", PEAKS, str(trace)], capture_output=True, text=True, check=True)
    early, late, *counts = map(int, ran.stdout.split())
    assert counts == [NUM_ROWS, NUM_ROWS]
    assert (late - early) / 1024 < 16, "megabytes more after a million rows than after twenty thousand"


@pytest.mark.parametrize("name", ["azure", "burstgpt", "mooncake", "rota", "parquet"])
def test_no_reader_holds_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "trace"
    peaks = []
    for count in (5_000, 10_000):
        writer_of(name).write(path, with_blocks(count) if name == "mooncake" else rows(count))
        read, peak = peak_of(read_trace(path, RandomStreams(0)))
        assert read == count
        peaks.append(peak)
    assert peaks[1] < 1.3 * peaks[0] + MEGABYTE


def test_a_few_rows_are_had_without_reading_the_rest(trace: Path) -> None:
    tracemalloc.start()
    try:
        assert len(list(islice(read_trace(trace, RandomStreams(0)), 10))) == 10
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEGABYTE


def test_sorting_holds_a_run_at_a_time() -> None:
    backwards = (Arrival(Duration(-row.at), row.num_prompt_tokens, 1) for row in rows(12_000))
    count, peak = peak_of(in_order(backwards, run_rows=1_000))
    assert count == 12_000
    assert peak < 2 * MEGABYTE
