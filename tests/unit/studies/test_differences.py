"""Differences that are not there are not called real more often than stated; those that are there are found."""

import dataclasses
import math

import numpy as np
import pytest

from rota.base.random_streams import RandomStreams
from rota.serving.metrics.columns import Columns
from rota.serving.studies.differences import Design, Pair, differences
from rota.serving.studies.statistics import share_interval

NUM_REQUESTS = 600


def columns(noise: np.ndarray, factor: float = 1.0) -> Columns:
    """Requests a second apart whose latencies are 100 ms, more or less."""
    latencies = 100.0 * np.exp(0.3 * noise) * factor
    count = len(noise)
    return Columns(
        arrived_at=np.arange(count, dtype=np.int64) * 10**9,
        priority=np.zeros(count, dtype=np.int64),
        tenant=np.array(["default"] * count),
        ttft=latencies,
        tpot=latencies / 10,
        e2e=latencies * 10,
        is_met=latencies < 150,
        is_finished=np.ones(count, dtype=bool),
    )


def noise_of(rng: np.random.Generator, memory: float) -> np.ndarray:
    """Standard normal values that forget by a factor of `memory` from one to the next."""
    fresh = rng.standard_normal(NUM_REQUESTS + 200) * math.sqrt(1 - memory**2)
    values = np.zeros_like(fresh)
    for index in range(1, len(fresh)):
        values[index] = memory * values[index - 1] + fresh[index]
    return values[200:]


def judged(pairs: list[Pair], design: Design, seed: int) -> list[str]:
    stream = RandomStreams(seed).stream("bootstrap")
    found = differences({"other": pairs}, "base", design=design, has_slo=True, confidence=0.95, stream=stream)
    return [one.verdict for one in found]


def is_alarm(verdicts: list[str]) -> bool:
    return not {"better", "worse"}.isdisjoint(verdicts)


@pytest.mark.parametrize(("design", "num_pairs"), [("windows", 1), ("drawn", 8), ("resampled", 12)])
@pytest.mark.parametrize("memory", [0.0, 0.96])
def test_equal_stacks_are_called_different_no_more_often_than_stated(
    design: Design, num_pairs: int, memory: float
) -> None:
    rng = np.random.default_rng(7)
    num_studies = 80
    num_alarms = 0
    for study in range(num_studies):
        pairs = [Pair(columns(noise_of(rng, memory)), columns(noise_of(rng, memory))) for _ in range(num_pairs)]
        num_alarms += is_alarm(judged(pairs, design, study))
    low, _ = share_interval(num_alarms, num_studies, 0.998)
    assert low <= 0.05, f"{num_alarms} of {num_studies} studies called equal stacks different"


@pytest.mark.parametrize(("design", "num_pairs"), [("windows", 1), ("drawn", 8), ("resampled", 12)])
def test_a_planted_difference_is_found_with_its_size_and_its_way(design: Design, num_pairs: int) -> None:
    rng = np.random.default_rng(7)
    pairs = []
    for _ in range(num_pairs):
        noise = noise_of(rng, 0.5)
        pairs.append(Pair(columns(noise), columns(noise + 0.1 * noise_of(rng, 0.0), factor=0.88)))
    stream = RandomStreams(0).stream("bootstrap")
    found = differences({"other": pairs}, "base", design=design, has_slo=True, confidence=0.95, stream=stream)
    by_name = {one.quantity: one for one in found}
    mean = by_name["ttft_mean_ms"]
    assert mean.verdict == "better"
    assert mean.relative is not None and mean.relative_margin is not None
    assert abs(mean.relative + 0.12) < max(2 * mean.relative_margin, 0.01)
    assert by_name["slo_attainment"].verdict == "better", "more requests in time is better, though the number rises"
    assert by_name["share_finished"].verdict == "identical"


def test_the_same_columns_are_identical() -> None:
    one = columns(noise_of(np.random.default_rng(1), 0.5))
    assert set(judged([Pair(one, one)], "windows", 0)) == {"identical"}


def test_requests_are_paired_whenever_each_stack_saw_them() -> None:
    """A call that waits for another comes later where that one took longer."""
    noise = noise_of(np.random.default_rng(1), 0.5)
    base, slow = columns(noise), columns(noise, factor=1.5)
    later = dataclasses.replace(slow, arrived_at=slow.arrived_at[::-1] * 3)
    stream = [RandomStreams(0).stream("bootstrap") for _ in range(2)]
    found = [
        differences({"x": [Pair(base, one)]}, "b", design="windows", has_slo=False, confidence=0.95, stream=each)
        for one, each in zip((slow, later), stream, strict=True)
    ]
    assert found[0] == found[1]


def test_too_few_requests_are_refused() -> None:
    few = columns(np.zeros(20))
    with pytest.raises(ValueError, match="20 requests are too few"):
        judged([Pair(few, few)], "windows", 0)
