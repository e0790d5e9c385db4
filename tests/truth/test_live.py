"""The clock on which neighbours take nothing, and who is who in the engine's journal."""

from dataclasses import replace

import msgspec
import pytest
from benchmarks.truth.live import (
    LOADS,
    Measured,
    Request,
    Run,
    _arrived,
    _drift,
    _in_cpu_time,
    _live,
    _plan,
    _taken,
)
from tests.unit.calibration.fabricated import ENGINE, facts, straight

from rota.serving.calibration.calibrate import Origin, calibrate
from rota.serving.calibration.steps import NUM_STEPS_MIN, steps_of

MS = 1_000_000
ORIGIN = Origin("a test", "2026-01-01", "here", "none")
STEP_NS, GAP_NS = 100 * MS, 10 * MS


def a_run(requests: list[Request], *, cpu_share: float) -> Run:
    """Steps of 100 ms, 10 ms apart, the first at 0, each with a core for `cpu_share` of its time."""
    like = facts(straight, num_stretches=1, num_steps=1)[0]
    records = [
        msgspec.structs.replace(
            like, at=number * (STEP_NS + GAP_NS), step_ns=STEP_NS, cpu_ns=round(STEP_NS * cpu_share), num_admitted=0
        )
        for number in range(NUM_STEPS_MIN)
    ]
    return Run(LOADS[0], 0, requests, steps_of(records, "steps"))


def test_time_without_a_core_is_left_out() -> None:
    # Comes half way through the first step, of which half is lost; its token is there as the next step ends.
    request = Request(10 * MS, 50 * MS, 210 * MS, 540 * MS, 9, 4)
    (warped,) = _in_cpu_time(a_run([request], cpu_share=0.5)).requests
    assert warped.sent_at == 25 * MS
    assert warped.first_at == (50 + 10 + 50) * MS
    assert warped.ended_at == (5 * 60 - 10) * MS
    assert _live(a_run([request], cpu_share=0.5)).ttft.tolist() == [200.0]


def test_without_neighbours_both_clocks_agree() -> None:
    request = Request(50 * MS, 50 * MS, 210 * MS, 540 * MS, 9, 4)
    run = a_run([request], cpu_share=1.0)
    assert _in_cpu_time(run).requests == [request]
    assert _taken(run.steps) == 0.0
    assert _taken(a_run([request], cpu_share=0.5).steps) == 0.5


def test_a_machine_that_slowed_down_is_told_from_a_profile_that_is_off() -> None:
    def measured(seed: int, *, slower: float) -> Measured:
        first, second = (steps_of(facts(straight, num_stretches=3, seed=seed + at), "steps") for at in (0, 1))
        runs = [Run(LOADS[0], 0, [], first), Run(LOADS[0], 1, [], replace(second, step_ns=second.step_ns * slower))]
        return Measured(
            calibrate(first, facts(straight, num_stretches=3, seed=seed), ENGINE, ORIGIN), None, first, runs
        )

    assert _drift(measured(3, slower=1.0)) < 0.02
    assert _drift(measured(3, slower=1.2)) == pytest.approx(0.2, abs=0.03)


def test_a_request_is_the_first_of_its_length_that_nobody_else_is() -> None:
    sent = [Request(at * MS, at * MS, 900 * MS, 950 * MS, length, 4) for at, length in ((10, 7), (20, 7), (30, 8))]
    arrivals = [(5 * MS, 7), (32 * MS, 8), (33 * MS, 7), (21 * MS, 7)]
    run = _arrived(a_run(sent, cpu_share=1.0), arrivals)
    assert [each.arrived_at for each in run.requests] == [21 * MS, 33 * MS, 32 * MS]


def test_the_unseen_loads_are_as_they_say() -> None:
    for load in LOADS:
        plan = _plan(load)
        assert plan == _plan(load)
        assert len(plan) == load.num_requests
        assert all(each.num_prompt_tokens + each.max_tokens <= 2048 for each in plan)
