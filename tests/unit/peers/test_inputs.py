"""Every simulator of the comparison is given the same requests at the same instants."""

import json
from pathlib import Path

import pytest
from benchmarks.peers.__main__ import _summary
from benchmarks.peers.inputs import NUM_REQUESTS, cases, endless_azure

from rota.serving.sim.run import SimulationConfig, arrivals_of


def as_rota_has_them(options):
    config = SimulationConfig(trace=Path(options["trace"]), num_requests=options["num_requests"], rate=options["rate"])
    return [(each.at / 1e6, each.num_prompt_tokens, each.num_output_tokens) for each in arrivals_of(config)]


@pytest.fixture(scope="module")
def by_name(tmp_path_factory):
    return {case.name: case.options for case in cases(tmp_path_factory.mktemp("inputs"))}


@pytest.mark.parametrize("name", ["W1", "W8"])
def test_dynosim_reads_the_same_requests(by_name, name):
    own = as_rota_has_them(by_name[name]["rota"])
    lines = Path(by_name[name]["dynosim"]["trace"]).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    theirs = [(row["timestamp"], row["input_length"], row["output_length"]) for row in rows]
    assert theirs == [(int(at), prompt, output) for at, prompt, output in own]
    assert len(theirs) == NUM_REQUESTS
    ids = [one for row in rows for one in row["hash_ids"]]
    assert len(set(ids)) == len(ids), "prompts of this trace share nothing"


def test_sched_sim_reads_the_same_requests(by_name):
    own = as_rota_has_them(by_name["W1"]["rota"])
    rows = json.loads(Path(by_name["W1"]["sched-sim"]["trace"]).read_text(encoding="utf-8"))
    theirs = [(row["timestamp"] * 1e3, row["prompt_tokens"], row["output_tokens"]) for row in rows]
    assert theirs == [(pytest.approx(at), prompt, output) for at, prompt, output in own]


def test_the_rates_are_those_that_are_named(by_name):
    for name, rate in (("W1", 6.0), ("W8", 48.0)):
        last = as_rota_has_them(by_name[name]["rota"])[-1][0] / 1e3
        assert NUM_REQUESTS / last == pytest.approx(rate, rel=0.04)


def test_the_endless_trace_begins_anew(tmp_path):
    options = endless_azure(19_400, tmp_path / "endless.csv")
    arrivals = list(arrivals_of(SimulationConfig(trace=Path(options["trace"]), rate=options["rate"])))
    lengths = [(each.num_prompt_tokens, each.num_output_tokens) for each in arrivals]
    assert len(lengths) == 19_400
    assert lengths[19_366:] == lengths[:34]


def test_runs_that_differ_are_counted_and_shown():
    def run(ttft):
        return {"cpu_seconds": 2.0, "peak_rss_mb": 1.0, "num_steps": 10, "outcome": {"mean_ttft_ms": ttft, "n": 1}}

    same, other = _summary([run(1.0)] * 3), _summary([run(1.0), run(1.5), run(1.0)])
    assert (same["num_different_outcomes"], same["differing"]) == (1, {})
    assert (other["num_different_outcomes"], other["differing"]) == (2, {"mean_ttft_ms": [1.0, 1.5, 1.0]})
    assert other["steps_per_cpu_second"] == 5.0
