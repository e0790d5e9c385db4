"""`rota compare`: a stack beside itself, beside its equal, beside a different one; and what it refuses."""

import dataclasses
import json
from pathlib import Path

import pytest
from tests.command_line import rota

from rota.serving.sim.run import SimulationConfig
from rota.serving.stack import StackConfig
from rota.serving.studies.compare import compare
from rota.serving.studies.runner import LocalRunner
from rota.serving.studies.statistics import share_interval

WORKLOAD = """
num_requests = {count}
[arrivals]
rate = 28.0
[prompt]
quantiles = {{"0" = 16, "0.5" = 400, "1" = 2048}}
[output]
quantiles = {{"0" = 1, "0.5" = 60, "1" = 200}}
"""
POWER_OF_TWO = StackConfig(dispatch="power_of_two")
ITS_EQUAL = StackConfig(dispatch="tests.unit.studies.stacks:OtherDraws")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "workload.toml"
    path.write_text(WORKLOAD.format(count=200))
    return path


def test_a_stack_under_two_names_is_the_same_in_every_request(trace: Path) -> None:
    ran = rota("compare", "default", "default", "--trace", trace, "--repeats", 3, "--jobs", 1, "--json")
    answer = json.loads(ran.stdout)
    assert ran.code == 0
    assert [stack["name"] for stack in answer["stacks"]] == ["default", "default#2"]
    assert {one["verdict"] for one in answer["differences"]} == {"identical"}


def test_a_stack_that_differs_is_told_apart_and_the_page_says_so(trace: Path, tmp_path: Path) -> None:
    stack = tmp_path / "small_chunks.toml"
    stack.write_text('batch = "stall_free_chunks"\n[parameters.batch]\nchunk_size = 64\n')
    report = tmp_path / "report.html"
    words = ("default", stack, "--trace", trace, "--repeats", 6, "--slo", "ttft=1s,tpot=50ms", "--jobs", 1)
    ran = rota("compare", *words, "--report", report, "--json")
    answer = json.loads(ran.stdout)
    mean = next(one for one in answer["differences"] if one["quantity"] == "ttft_mean_ms")
    assert (mean["group"], mean["verdict"]) == ("all", "worse")
    assert mean["value"] - mean["baseline_value"] == pytest.approx(mean["difference"])
    assert answer["design"] == "drawn" and answer["num_repeats"] == 6
    page = report.read_text()
    assert "slower by" in page and "small_chunks beside default" in page
    again = rota("compare", *words, "--json")
    assert json.loads(again.stdout)["differences"] == answer["differences"], "the same seed gives the same answer"
    table = rota("compare", *words).stdout
    assert "slower by" in table and "than default" in table


def test_the_same_arrivals_meet_every_stack_and_others_in_every_repeat(trace: Path) -> None:
    common = SimulationConfig(trace=trace, num_instances=4)
    stacks = {"a": POWER_OF_TWO, "b": ITS_EQUAL}
    _, observed = compare(stacks, common, LocalRunner(1), num_repeats=2)
    assert observed["a"].columns.arrived_at.tolist() == observed["b"].columns.arrived_at.tolist()
    assert observed["a"].columns.ttft.tolist() != observed["b"].columns.ttft.tolist(), "the control has no noise"


@pytest.mark.slow
@pytest.mark.parametrize(("num_repeats", "num_studies"), [(1, 60), (5, 20)])
def test_equal_stacks_with_other_draws_are_called_different_no_more_often_than_stated(
    tmp_path: Path, num_repeats: int, num_studies: int
) -> None:
    """Chance alone tells these two apart: the same rule, drawing other numbers."""
    path = tmp_path / "workload.toml"
    path.write_text(WORKLOAD.format(count=240))
    common = SimulationConfig(trace=path, num_instances=4)
    num_alarms = 0
    for seed in range(num_studies):
        one = dataclasses.replace(common, seed=seed)
        answer, _ = compare({"a": POWER_OF_TWO, "b": ITS_EQUAL}, one, LocalRunner(1), num_repeats=num_repeats)
        num_alarms += any(each.verdict in ("better", "worse") for each in answer.differences)
    low, _ = share_interval(num_alarms, num_studies, 0.998)
    assert low <= 0.05, f"{num_alarms} of {num_studies} studies called equal stacks different"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["default"], "STACKS: two at least are needed"),
        (["default", "default", "--confidence", "1.5"], "--confidence: must be from 0.5 to 0.9999, not 1.5"),
        (["default", "nowhere.toml"], "nowhere.toml: no such file"),
        (["default", "default", "--slo", "ttft=5m"], "--slo: ttft must be a number of milliseconds"),
        (["default", "default", "--repeats", "0"], "--repeats: must be at least 1"),
    ],
)
def test_what_is_wrong_is_named(trace: Path, words: list[str], said: str) -> None:
    ran = rota("compare", *words, "--trace", trace)
    assert ran.code == 2
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_stack_that_cannot_be_built_is_refused_before_anything_runs(trace: Path, tmp_path: Path) -> None:
    stack = tmp_path / "bad.toml"
    stack.write_text('order = "fcsf"\n')
    ran = rota("compare", "default", stack, "--trace", trace)
    assert ran.code == 2 and "bad: stack: order: unknown order 'fcsf'" in ran.stderr


def test_too_short_a_workload_is_refused(trace: Path) -> None:
    ran = rota("compare", "default", "default", "--trace", trace, "--num-requests", 20, "--repeats", 1)
    assert ran.code == 2 and "too few to tell a difference" in ran.stderr
