"""The theory group holds, is not blind, and its formulas and intervals are themselves right."""

import heapq
import random
from math import sqrt

import pytest
from benchmarks.truth import queues, theory

from rota.base.instant import Instant
from rota.serving.metrics.definitions import RequestRecord
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import RequestId, TenantId

LOAD = 0.7


@pytest.mark.slow
def test_a_short_table_holds_and_tells_that_it_was_congested():
    rows = list(theory.rows(scale=0.15))
    assert len(rows) > 20
    assert [row for row in rows if row.verdict == "missed"] == []
    assert all(row.bound == 0 or row.bound < 0.4 for row in rows if row.bound is not None)
    assert all("0 preemptions" not in row.note and "0 left" not in row.note for row in rows if "Little" in row.case)


@pytest.mark.slow
def test_steps_a_twentieth_too_slow_are_found_by_every_kind_of_queue():
    rows = list(theory.rows(scale=0.15, slowness=1.05))
    missed = {row.case for row in rows if row.verdict == "missed"}
    assert missed >= {
        "M/M/1",
        "M/D/1",
        "M/G/1, few long jobs",
        "M/M/1, shortest job first",
        "M/D/1, shared",
        "8 × M/M/1, in turn",
        "8 × M/M/1, at random",
    }


def shortest_remaining_first(num_jobs, load, seed):
    """Mean response in services: jobs of exponential size, displaced at any moment. Nothing of Rota's."""
    rng = random.Random(seed)
    at = now = total = 0.0
    left: list[tuple[float, float]] = []
    for _ in range(num_jobs):
        at += rng.expovariate(load)
        while left and now < at:
            size, arrived = heapq.heappop(left)
            if now + size <= at:
                now += size
                total += now - arrived
            else:
                heapq.heappush(left, (size - (at - now), arrived))
                now = at
        now = max(now, at)
        heapq.heappush(left, (rng.expovariate(1.0), at))
    return (total + sum(sum(size for size, _ in sorted(left)[: n + 1]) for n in range(len(left)))) / num_jobs


def test_the_formula_of_schrage_and_miller_by_plain_simulation():
    means = [shortest_remaining_first(20_000, LOAD, seed) for seed in range(10)]
    mean = sum(means) / 10
    error = sqrt(sum((one - mean) ** 2 for one in means) / 90)
    assert error < 0.02
    assert abs(mean - queues.shortest_remaining_first(LOAD)) < 4 * error


def test_the_formulas_where_they_meet():
    assert queues.shortest_remaining_first(1e-9) == pytest.approx(1.0, abs=1e-6)
    assert queues.shortest_job_first(1e-9) == pytest.approx(1.0, abs=1e-6)
    assert queues.pollaczek_khinchine(LOAD, 1.0, 2.0) + 1 == pytest.approx(1 / (1 - LOAD))
    assert queues.in_turns(LOAD, 1) == pytest.approx(1 / (1 - LOAD))
    assert queues.shortest_remaining_first(LOAD) < queues.shortest_job_first(LOAD) < 1 / (1 - LOAD)
    assert queues.best_of_two(LOAD) < queues.in_turns(LOAD, 8) < 1 / (1 - LOAD)
    # P(T > t) = exp(-(1 - load) t) in services.
    assert queues.response_above(LOAD, 0.01) == pytest.approx(15.35, abs=0.01)


def plain_queue(num_jobs, rng):
    """Records of M/M/1, made by the recursion of Lindley alone."""
    at = end = 0.0
    for number in range(num_jobs):
        at += rng.expovariate(LOAD)
        size = max(1, round(rng.expovariate(1.0) * 1000))
        end = max(end, at) + size / 1000
        yield RequestRecord(
            id=RequestId(f"{number:06}"), tenant=TenantId("t"), priority=0, arrived_at=Instant(round(at * 1e6)),
            first_token_at=None, finished_at=Instant(round(end * 1e6)), num_prompt_tokens=size, num_output_tokens=1,
            status="finished", instance_id=InstanceId("i"),
        )  # fmt: skip


def test_intervals_of_95_percent_hold_the_truth_about_that_often():
    rng = random.Random(5)
    inside = 0
    for _ in range(40):
        records = list(plain_queue(12_000, rng))
        estimate = queues.mean_over_cycles(records, lambda r: (r.finished_at - r.arrived_at) / 1e6, 1e6 / LOAD, 1000)
        inside += abs(estimate.mean - 1 / (1 - LOAD)) < 1.96 * estimate.deviation
    assert 34 <= inside <= 40
