"""Latencies in bounded space against numpy, and records that stream into a file."""

import random
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from rota.base.instant import Duration
from rota.serving.metrics import latencies
from rota.serving.metrics.definitions import distribution_ms
from rota.serving.metrics.latencies import RELATIVE_ERROR, Latencies
from rota.serving.metrics.records_file import RecordsFile
from rota.serving.sim.run import SimulationConfig, simulate

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:{second // 60:02}:{second % 60:02}.0000000,{300 + second},{20 + second % 50}\n"
    for second in range(200)
)


@pytest.mark.parametrize("mean_ms", [0.002, 40.0, 90_000.0])
def test_buckets_are_as_near_as_they_say(mean_ms: float, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(3)
    values = [round(draw.expovariate(1 / mean_ms) * 1e6) for _ in range(20_000)]
    exact = distribution_ms(np.array(values))
    monkeypatch.setattr(latencies, "EXACT_MAX", 500)
    held = Latencies()
    for value in values:
        held.add(value)
    found = held.distribution_ms()
    assert found.mean == pytest.approx(exact.mean, rel=1e-12)
    for name in ("p50", "p90", "p99"):
        # Neighbouring ranks and whole nanoseconds beside the width of a bucket.
        near = max(1e-3, 2e-3 * (1e-3 / mean_ms)) + RELATIVE_ERROR
        assert getattr(found, name) == pytest.approx(getattr(exact, name), rel=near, abs=2e-6)
    assert len(held._buckets) < 10_000


def test_few_are_exact() -> None:
    held = Latencies()
    for value in (5, 1, 3):
        held.add(value)
    assert held.distribution_ms() == distribution_ms([1, 3, 5])
    assert Latencies().distribution_ms() == distribution_ms([])


def test_records_stream_into_a_file(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(TRACE)
    config = SimulationConfig(trace=trace)
    kept = simulate(config)
    streamed = simulate(config, records_path=tmp_path / "records.parquet", keep_records=False)
    assert not streamed.records
    assert streamed.summary.ttft_ms == kept.summary.ttft_ms
    rows = pq.read_table(tmp_path / "records.parquet").to_pylist()
    assert [(row["id"], row["finished_ns"], row["num_output_tokens"]) for row in rows] == [
        (record.id, record.finished_at, record.num_output_tokens) for record in kept.records
    ]
    moved = msgspec.structs.replace(kept.records[0], num_migrations=2, downtime=Duration(7))
    with RecordsFile(tmp_path / "moved.parquet") as file:
        file.add(moved)
    (row,) = pq.read_table(tmp_path / "moved.parquet").to_pylist()
    assert (row["num_migrations"], row["downtime_ns"]) == (2, 7)
