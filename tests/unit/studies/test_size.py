"""`rota size`: the smallest fleet, found, checked, and told honestly where it is not sure."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tests.command_line import rota

from rota.base.instant import milliseconds
from rota.serving.metrics.columns import columns_of
from rota.serving.metrics.load import load_over_time
from rota.serving.metrics.summary import RunFacts, summarize
from rota.serving.model.request import SLO
from rota.serving.sim.run import SimulationConfig
from rota.serving.studies.observe import Observation
from rota.serving.studies.runner import LocalRunner
from rota.serving.studies.size import Fleet, SizeOptions, Sizing, size

WORKLOAD = """
num_requests = 150
[arrivals]
rate = 20.0
[prompt]
quantiles = {"0" = 16, "0.5" = 400, "1" = 2048}
[output]
quantiles = {"0" = 1, "0.5" = 60, "1" = 200}
"""
FACTS = RunFacts(
    num_steps=0,
    num_preemptions=0,
    num_cached_tokens=0,
    num_queried_tokens=0,
    cpu_seconds=0.0,
    peak_rss_mb=0.0,
    seed=0,
    config_hash="",
    journal_digest=None,
    version="",
)
PROMISE = SLO(ttft=milliseconds(500))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "workload.toml"
    path.write_text(WORKLOAD)
    return path


class Told:
    """A runner that simulates nothing: the attainment of a run is a function of its configuration."""

    def __init__(self, attainment: Callable[[SimulationConfig], float]) -> None:
        self._attainment = attainment
        self.asked: list[SimulationConfig] = []

    def map(
        self, function: object, items: Sequence[SimulationConfig], on_tick: object = None
    ) -> Iterator[tuple[int, Observation]]:
        empty = columns_of([])
        for index, config in enumerate(items):
            self.asked.append(config)
            told = msgspec.structs.replace(summarize([], FACTS), slo_attainment=self._attainment(config))
            yield index, Observation(told, empty, load_over_time({}, {}))


def sized(trace: Path, attainment: Callable[[SimulationConfig], float], **options: int) -> tuple[Fleet, Sizing, Told]:
    told = Told(attainment)
    common = SimulationConfig(trace=trace, slo=PROMISE)
    sizing, _ = size(common, ["llama-3.1-8b-a100"], {}, SizeOptions(**options), told)
    return sizing.fleets[0], sizing, told


@pytest.mark.parametrize("needed", range(1, 40))
def test_the_search_finds_the_smallest_without_trying_all(trace: Path, needed: int) -> None:
    fleet, _, told = sized(trace, lambda config: float(config.num_instances >= needed))
    assert fleet.num_instances == needed
    assert fleet.is_monotone and fleet.is_sure
    assert fleet.check_of_smaller is None or fleet.check_of_smaller.num_met == 0
    assert len({config.num_instances for config in told.asked if config.seed == 0}) <= 16


def test_a_fleet_beyond_the_largest_is_not_promised(trace: Path) -> None:
    fleet, sizing, _ = sized(trace, lambda config: float(config.num_instances >= 9), max_instances=8)
    assert fleet.num_instances is None and fleet.check is None
    assert sizing.best is None and sizing.knee is None


def test_where_larger_is_not_always_better_every_smaller_size_is_tried(trace: Path) -> None:
    fleet, _, _ = sized(trace, lambda config: float(config.num_instances in (6, 10) or config.num_instances >= 16))
    assert fleet.num_instances == 6
    assert not fleet.is_monotone
    assert {trial.num_instances for trial in fleet.trials} >= set(range(1, 11))


def test_a_size_that_search_seeds_do_not_bear_out_is_not_the_answer(trace: Path) -> None:
    fleet, _, _ = sized(trace, lambda config: float(config.num_instances >= (3 if config.seed == 0 else 5)))
    assert fleet.num_instances == 5 and fleet.is_sure


def test_fresh_seeds_that_miss_are_answered_with_a_larger_fleet_and_then_told(trace: Path) -> None:
    seen: set[int] = set()

    def attainment(config: SimulationConfig) -> float:
        seen.add(config.seed)
        return float(config.num_instances >= (4 if len(seen) <= 6 else 5))

    fleet, _, _ = sized(trace, attainment)
    assert (fleet.num_instances, fleet.num_raised, fleet.is_sure) == (5, 1, True)
    seen.clear()

    def only_what_the_search_saw(config: SimulationConfig) -> float:
        seen.add(config.seed)
        return float(config.num_instances >= 4 and len(seen) <= 6)

    fleet, _, _ = sized(trace, only_what_the_search_saw)
    assert (fleet.num_instances, fleet.num_raised, fleet.is_sure) == (6, 2, False)
    assert fleet.check is not None and (fleet.check.num_met, fleet.check.low) == (0, 0.0)


def test_the_knee_is_where_the_promise_ends(trace: Path) -> None:
    _, sizing, _ = sized(trace, lambda config: float(config.speedup <= 1.37))
    assert sizing.knee is not None and sizing.knee.load is not None
    assert 1.33 <= sizing.knee.load <= 1.37


def test_a_workload_is_sized_and_the_answer_repeats(trace: Path, tmp_path: Path) -> None:
    report = tmp_path / "fleet.html"
    words = ("--slo", "ttft=300ms,tpot=40ms,attainment=95%", "--price", "llama-3.1-8b-a100=2.5", "--jobs", 1)
    words += ("--search-seeds", 1, "--check-seeds", 3)
    ran = rota("size", "--trace", trace, *words, "--report", report, "--json")
    answer = json.loads(ran.stdout)
    fleet = answer["fleets"][0]
    assert fleet["cost_per_hour"] == 2.5 * fleet["num_instances"]
    assert ran.code == (0 if fleet["check"]["num_met"] == 3 else 1)
    assert answer["targets_ms"] == {"ttft": 300.0, "tpot": 40.0}
    assert answer["knee"]["points"][0]["is_met"]
    page = report.read_text()
    assert "Goodput against rate" in page and "How latencies spread" in page
    again = rota("size", "--trace", trace, *words)
    assert f"take {fleet['num_instances']} × llama-3.1-8b-a100, " in again.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--slo", "attainment=99%"], "--slo: promises nothing"),
        (["--slo", "ttft=1s,attainment=150%"], "--slo: attainment must be a share"),
        (["--slo", "ttft=1s,attainment=9%,attainment=8%"], "--slo: attainment is given twice"),
        (["--slo", "ttft=1s", "--price", "x=1"], "--price: 'x' is none of the profiles"),
        (["--slo", "ttft=1s", "--price", "llama-3.1-8b-a100=-1"], "--price: must be a number above 0"),
        (["--slo", "ttft=1s", "--price", "llama-3.1-8b-a100"], "--price: 'llama-3.1-8b-a100' is not of the form"),
        (["--slo", "ttft=1s", "--profile", "llama-9"], "unknown profile 'llama-9'"),
        (["--slo", "ttft=1s", "--max-instances", "0"], "--max-instances: must be at least 1"),
    ],
)
def test_what_is_wrong_is_named(trace: Path, words: list[str], said: str) -> None:
    ran = rota("size", "--trace", trace, *words)
    assert ran.code == 2 and said in ran.stderr and "Traceback" not in ran.stderr


def test_a_promise_that_nothing_keeps_is_exit_code_1(trace: Path) -> None:
    ran = rota("size", "--trace", trace, "--slo", "ttft=0.01ms", "--max-instances", 2, "--jobs", 1)
    assert ran.code == 1
    assert "no fleet of the sizes that were tried keeps the promise" in ran.stdout


@pytest.mark.slow
def test_the_azure_conversation_trace_gets_a_fleet_that_fresh_seeds_bear_out() -> None:
    """The answer survives ten fresh seeds; a fleet one smaller misses the SLO."""
    data = Path(os.environ.get("ROTA_DATA", Path(__file__).resolve().parents[4] / "shared"))
    trace = data / "traces" / "azure2023" / "AzureLLMInferenceTrace_conv.csv"
    assert trace.exists(), f"{trace} is absent; set ROTA_DATA"
    common = SimulationConfig(trace=trace, slo=SLO(ttft=milliseconds(500), tpot=milliseconds(50)))
    with LocalRunner() as runner:
        sizing, observed = size(common, ["llama-3.1-8b-a100"], {}, SizeOptions(num_search_seeds=3), runner)
    fleet = sizing.fleets[0]
    assert fleet.num_instances is not None and fleet.check is not None and fleet.check_of_smaller is not None
    assert (fleet.check.num_met, fleet.check.num_seeds) == (10, 10)
    assert fleet.check_of_smaller.num_met == 0
    assert max(fleet.check_of_smaller.attainments) < sizing.attainment <= min(fleet.check.attainments)
    assert np.isfinite(observed[fleet.num_instances].columns.ttft).all()
