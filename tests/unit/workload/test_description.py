"""The numbers of a trace are what their definitions say, and what is published of the traces in hand."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rota.base.instant import Duration, seconds
from rota.base.random_streams import RandomStreams
from rota.serving.workload.arrivals import Arrival
from rota.serving.workload.description import NUM_BINS_MAX, OverTime, PrefixCache, describe, spread
from rota.serving.workload.formats import read_trace

DATA = Path(os.environ.get("ROTA_DATA", Path(__file__).parents[4] / "shared")) / "traces"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 200_000), min_size=3, max_size=60), st.integers(1, 90))
def test_moments_are_what_numpy_says(gaps_ms: list[int], output: int) -> None:
    at = np.cumsum(gaps_ms) * 1_000_000
    rows = [Arrival(Duration(int(each)), 10 + index, output) for index, each in enumerate(at)]
    found = describe(rows)
    gaps = np.diff(at) / 1e9
    assert found.span_seconds == pytest.approx(gaps.sum())
    if gaps.sum():
        assert found.rate == pytest.approx(len(gaps) / gaps.sum())
        assert found.gap_cv == pytest.approx(gaps.std() / gaps.mean(), abs=1e-6)
    for width, got in ((1, found.dispersion_1s), (60, found.dispersion_60s)):
        index = (at - at[0]) // (width * 10**9)
        counts = np.bincount(index)[: int(index[-1])]
        if len(counts) >= 2 and counts.sum():
            assert got == pytest.approx(counts.var() / counts.mean())
        else:
            assert got is None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=200))
def test_quantiles_are_the_least_values_that_reach_the_share(values: list[int]) -> None:
    found = spread(Counter(values))
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert getattr(found, name) == np.quantile(values, share, method="inverted_cdf")
    assert (found.min, found.max, found.mean) == (min(values), max(values), pytest.approx(np.mean(values)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=5, unique=True), max_size=30), st.integers(1, 12))
def test_a_cache_holds_what_was_used_last(prompts: list[list[int]], size: int) -> None:
    cache, held = PrefixCache(size), []
    for blocks in prompts:
        expected = next((n for n, block in enumerate(blocks) if block not in held), len(blocks))
        arrival = Arrival(Duration(0), 16 * len(blocks) + 1, 1, tuple(blocks), 16)
        assert cache.take(arrival) == 16 * expected
        held = ([block for block in held if block not in blocks] + blocks)[-size:]


def test_programs_sessions_and_waits_are_counted() -> None:
    rows = [
        Arrival(seconds(0), 10, 1, session="a", id="x"),
        Arrival(seconds(2), 10, 1, session="a", id="y", after=("x",), gap=seconds(2)),
        Arrival(seconds(6), 10, 1, session="a", after=("x", "y"), gap=seconds(4)),
        Arrival(seconds(1), 10, 1, session="b", priority=-1),
    ]
    found = describe(rows)
    assert (found.num_rows, found.num_open, found.num_programs, found.num_sessions) == (4, 2, 1, 2)
    assert (found.wait_seconds.mean, found.rows_per_session.mean, found.priorities) == (3.0, 2.0, (-1, 0))
    assert found.prefix_hits == () and found.hash_block_tokens is None


def test_bins_over_time_are_bounded_and_keep_every_row() -> None:
    over_time = OverTime()
    for number in range(100_000):
        over_time.take(number * 700_000_000)
    begins, rates = over_time.rates()
    assert NUM_BINS_MAX / 2 < len(begins) <= NUM_BINS_MAX
    assert sum(rates) * over_time.width / 1e9 == pytest.approx(100_000)


def test_what_is_published_of_the_traces_in_hand() -> None:
    """Rates and hit rates as others measured them on the same files."""
    path = DATA / "mooncake" / "conversation_trace.jsonl"
    assert path.exists(), f"{path} is absent; set ROTA_DATA to the folder that holds traces/"
    found = describe(read_trace(path, RandomStreams(0)), cache_blocks=(1_000, 5_000, 10_000, 30_000, 100_000))
    rates = [round(hits.hit_rate, 3) for hits in found.prefix_hits]
    assert rates == [0.374, 0.045, 0.113, 0.215, 0.332, 0.371]
    assert (found.num_rows, round(found.rate or 0, 2), round(found.gap_cv or 0, 2)) == (12_031, 3.40, 3.03)
    found = describe(read_trace(DATA / "azure2023" / "AzureLLMInferenceTrace_conv.csv", RandomStreams(0)))
    assert (found.num_rows, round(found.rate or 0, 2), round(found.gap_cv or 0, 2)) == (19_366, 5.53, 1.09)
    assert (found.prompt_tokens.p50, found.prompt_tokens.p99, found.output_tokens.p50) == (1020, 4142, 129)
