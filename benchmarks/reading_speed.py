"""Rows per CPU second that the trace readers read, and what of it turning rows into requests takes.

    python benchmarks/reading_speed.py > result.json

Files are generated; the median of three is reported, of a process that does nothing else. The published traces are read
as well where they are at hand."""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rota import __version__
from rota.base.instant import Duration, Instant
from rota.base.random_streams import RandomStreams
from rota.serving.workload.arrivals import Arrival, to_request
from rota.serving.workload.formats import read_trace, writer_of

NUM_ROWS = 200_000
ROUNDS = 3
DATA = Path(os.environ.get("ROTA_DATA") or Path(__file__).parents[2] / "shared") / "traces"
PUBLISHED = ("azure2023/AzureLLMInferenceTrace_conv.csv", "mooncake/conversation_trace.jsonl", "agents/agent_calls.csv")


def rows(num_blocks: int) -> Iterator[Arrival]:
    for number in range(NUM_ROWS):
        hashes = tuple(range(number, number + num_blocks))
        yield Arrival(Duration(number * 50_000_000), 512 * max(1, num_blocks), 1 + number % 700, hashes)


def measured(path: Path) -> dict[str, float]:
    reading, building = [], []
    for _ in range(ROUNDS):
        began = time.process_time()
        arrivals = list(read_trace(path, RandomStreams(0)))
        read = time.process_time()
        for number, arrival in enumerate(arrivals):
            to_request(arrival, f"r-{number}", Instant(0), max_model_len=131_072)
        built = time.process_time()
        reading.append(len(arrivals) / (read - began))
        building.append((built - read) / len(arrivals))
    return {
        "rows": len(arrivals),
        "rows_per_cpu_second": round(statistics.median(reading)),
        "to_request_us_per_row": round(statistics.median(building) * 1e6, 3),
    }


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        for name, num_blocks in (("azure", 0), ("burstgpt", 0), ("mooncake", 24), ("rota", 0), ("parquet", 0)):
            writer_of(name).write(path, rows(num_blocks))
            found[f"{name}, generated"] = measured(path)
    for name in PUBLISHED:
        if (DATA / name).exists():
            found[name] = measured(DATA / name)
    provenance = {
        "rota": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "rounds": ROUNDS,
    }
    print(json.dumps({"readers": found, "provenance": provenance}, indent=2))


if __name__ == "__main__":
    main()
