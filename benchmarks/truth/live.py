"""A live vLLM on this machine's CPU: calibrate on one load, predict others, twice each.

The calibration's load keeps so many requests in flight; the loads that are predicted come open loop, at a rate, with
lengths and burstiness of their own, and their simulation gets the instants at which requests were sent and the lengths
that the server counted. Rounds of calibration and unseen loads alternate, and the profile is fitted to all rounds'
calibration, so that a machine which others use meanwhile is measured in the state in which it is predicted.

Beside each error stands what the live figure is itself worth, the difference of its two runs; and what is left of the
error when the simulation is told how fast the machine was during that very run, which parts the machine from the model.
"""

import asyncio
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from benchmarks.truth.row import TruthRow, compared, relative_error

from rota.base.errors import ConfigError, EngineError
from rota.base.instant import Duration
from rota.base.random_streams import RandomStreams
from rota.serving.bench.client import Sent, Target
from rota.serving.bench.load import send_load
from rota.serving.bench.plan import LoadClass, Mix, Planned, at_rate, bounded
from rota.serving.bench.prompts import FileTokenizer, Prompts
from rota.serving.calibration.calibrate import Origin, calibrate
from rota.serving.calibration.collect import clock, collect, records_of, session
from rota.serving.calibration.engine import running
from rota.serving.calibration.errors import errors_of
from rota.serving.calibration.front_end import front_end_of
from rota.serving.calibration.profile_file import write_profile
from rota.serving.calibration.steps import Floats, Steps, steps_of
from rota.serving.calibration.terms import predicted
from rota.serving.engines.managed import free_port
from rota.serving.engines.model_package import MODEL_NAME, prepare_model
from rota.serving.engines.vllm.facts import EngineFacts, StepRecord
from rota.serving.engines.vllm.server import VllmServer
from rota.serving.predictors.step_time.profiles import Profile, StepTimeChoice
from rota.serving.sim.run import SimulationConfig, simulate
from rota.serving.workload.arrivals import Arrival
from rota.serving.workload.formats.azure import AzureFormat
from rota.serving.workload.generator import Lengths

GROUP = "live"
STEP_BOUND = 0.08
LATENCY_BOUND = 0.15
NUM_ROUNDS = 2
CALIBRATION_SECONDS = float(os.environ.get("ROTA_TRUTH_LIVE_SECONDS", "120"))
"""Of each round."""
START_SECONDS = 600.0
QUANTILES = (50, 99)


@dataclass(frozen=True, slots=True)
class Unseen:
    """A load that the calibration has not met."""

    name: str
    rate: float
    burstiness: float
    prompt: Lengths
    output: Lengths
    num_requests: int


LOADS = (
    Unseen("chat", 1.0, 1.0, Lengths({"0": 20, "0.5": 120, "1": 700}), Lengths({"0": 8, "0.5": 40, "1": 120}), 80),
    Unseen("bursts", 0.8, 0.4, Lengths({"0": 50, "0.5": 250, "1": 1300}), Lengths({"0": 2, "0.5": 20, "1": 80}), 80),
)


@dataclass(frozen=True, slots=True)
class Run:
    """One live run of an unseen load: what clients saw, and the engine's own steps."""

    load: Unseen
    number: int
    sent: list[Sent]
    steps: Steps


@dataclass(frozen=True, slots=True)
class Latencies:
    """In ms, one a request."""

    ttft: Floats
    e2e: Floats


def rows() -> Iterator[TruthRow]:
    """Everything that is measured live. Takes about twelve minutes. Raises `ConfigError` without vLLM or its model."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("vllm is not installed", hint="make install, or leave the group out")
    model = prepare_model()
    with tempfile.TemporaryDirectory(prefix="rota-live-") as folder:
        profile, held_out, runs = asyncio.run(_measure(model, Path(folder)))
        yield from _step_rows(profile, held_out, runs)
        for load in LOADS:
            yield from _latency_rows(profile, load, [run for run in runs if run.load == load], Path(folder))


# --- live -------------------------------------------------------------------------------------------------------------


async def _measure(model: Path, folder: Path) -> tuple[Profile, Steps, list[Run]]:
    server = VllmServer(
        model=model, port=free_port(), served_model_name=MODEL_NAME, facts=folder / "facts.jsonl", cores="0"
    )
    facts = server.facts
    assert facts is not None
    stop = asyncio.Event()
    calibrating: list[StepRecord] = []
    probes: list[Sent] = []
    engine: EngineFacts | None = None
    runs: list[Run] = []
    async with running(server, folder / "log", stop, timeout=START_SECONDS) as url:
        for number in range(NUM_ROUNDS):
            collected = await collect(
                url, facts, seconds=CALIBRATION_SECONDS, seed=100 + number, stop=stop, tokenizer=model
            )
            engine = collected.engine
            calibrating += collected.records
            probes += collected.sent
            for load in LOADS:
                runs.append(await _run(url, facts, model, load, number))
    steps = steps_of(calibrating, "calibration")
    origin = Origin("benchmarks/truth/live.py", time.strftime("%Y-%m-%d"), "this machine", "this machine's CPU")
    profile = calibrate(steps, calibrating, engine, origin, front_end=front_end_of(probes, steps))
    return profile, steps.where(steps.held_out), runs


async def _run(url: str, facts: Path, model: Path, load: Unseen, number: int) -> Run:
    began_at = clock()
    # The plan is the same in every round. Its texts are not, or the engine would know them from the round before.
    prompts = Prompts(RandomStreams(1000 + number), FileTokenizer(model))
    async with session() as client:
        target = Target(
            client, url, clock, model=MODEL_NAME, endpoint="completions", ignore_eos=True, timeout_seconds=600.0
        )
        sent = await send_load(
            _plan(load),
            target,
            lambda planned: prompts.text(10_000 * number + planned.index, planned.num_prompt_tokens),
            clock,
            stop=asyncio.Event(),
        )
    failed = next((each for each in sent if each.outcome != "finished"), None)
    if failed is not None:
        raise EngineError(f"{load.name}: a request was not answered: {failed.error_kind}: {failed.detail}")
    await asyncio.sleep(1.5)  # by then an idle engine has written its last steps
    steps = steps_of([record for record in records_of(facts) if record.at >= began_at], load.name)
    return Run(load, number, sorted(sent, key=lambda each: each.sent_at), steps)


def _plan(load: Unseen) -> list[Planned]:
    streams = RandomStreams(sum(load.name.encode()))
    mix = Mix([LoadClass()], [], streams)
    plan = at_rate(load.rate, load.burstiness, load.prompt, load.output, mix, streams)
    return list(bounded(plan, num_requests=load.num_requests, duration=None))


# --- simulated --------------------------------------------------------------------------------------------------------


def _simulated(profile: Profile, run: Run, folder: Path) -> Latencies:
    """The same requests, at the instants at which they left, through `rota simulate`."""
    began_at = run.sent[0].sent_at
    arrivals = [
        Arrival(
            at=Duration(each.sent_at - began_at),
            num_prompt_tokens=each.num_prompt_tokens or each.planned.num_prompt_tokens,
            num_output_tokens=each.num_output_tokens,
        )
        for each in run.sent
    ]
    AzureFormat().write(folder / "trace.csv", arrivals)
    write_profile(profile, folder / "profile.toml")
    result = simulate(SimulationConfig(trace=folder / "trace.csv", profile=str(folder / "profile.toml")))
    return Latencies(
        ttft=_ms([(record.first_token_at or record.finished_at) - record.arrived_at for record in result.records]),
        e2e=_ms([record.finished_at - record.arrived_at for record in result.records]),
    )


def _live(run: Run) -> Latencies:
    return Latencies(
        ttft=_ms([each.chunk_at[0] - each.sent_at for each in run.sent]),
        e2e=_ms([each.chunk_at[-1] - each.sent_at for each in run.sent]),
    )


def _predicted(profile: Profile, steps: Steps) -> Floats:
    """What the profile says of steps that ran."""
    return predicted(profile.step_time.parameters, steps)


def _at_speed_of(profile: Profile, run: Run) -> Profile:
    """The profile, with all of its times scaled by how much longer that run's steps took in sum than it says."""
    factor = float(run.steps.step_ns.sum() / _predicted(profile, run.steps).sum())
    scaled = {
        name: [[at, each * factor] for at, each in value] if isinstance(value, list) else value * factor
        for name, value in profile.step_time.parameters.items()
    }
    return msgspec.structs.replace(profile, step_time=StepTimeChoice(profile.step_time.name, scaled))


# --- compared ---------------------------------------------------------------------------------------------------------


def _step_rows(profile: Profile, held_out: Steps, runs: Sequence[Run]) -> Iterator[TruthRow]:
    calibration = profile.calibration
    assert calibration is not None
    alike = "" if calibration.noise is None else f"; alike steps differ by {calibration.noise:.1%}"
    for each in calibration.errors:
        is_all = each.phase == "all"
        note = f"{each.num_steps} steps, bias {each.bias:+.1%}{alike if is_all else ''}"
        bound = STEP_BOUND if is_all else None
        yield _error_row("holdout of the calibration", f"step time, {each.phase}: MAPE", each.mape, bound, note)
    if calibration.cpu_mape is not None:
        note = f"neighbours took {_taken(held_out):.1%} of the steps' time"
        yield _error_row("holdout of the calibration", "step time in CPU time: MAPE", calibration.cpu_mape, None, note)
    for run in runs:
        (error, *_) = errors_of(_predicted(profile, run.steps), run.steps.step_ns, run.steps)
        note = f"{error.num_steps} steps, bias {error.bias:+.1%}; neighbours took {_taken(run.steps):.1%}"
        yield _error_row(f"{run.load.name}, run {run.number + 1}", "step time: MAPE", error.mape, None, note)


def _error_row(case: str, quantity: str, error: float, bound: float | None, note: str) -> TruthRow:
    return TruthRow(GROUP, case, quantity, "", None, None, error, bound, note)


def _taken(steps: Steps) -> float:
    """The share of the steps' time in which their processes had no core."""
    known = ~np.isnan(steps.cpu_ns)
    return float(1 - steps.cpu_ns[known].sum() / steps.step_ns[known].sum()) if known.any() else 0.0


def _latency_rows(profile: Profile, load: Unseen, runs: Sequence[Run], folder: Path) -> Iterator[TruthRow]:
    live = [_live(run) for run in runs]
    simulated = [_simulated(profile, run, folder) for run in runs]
    informed = [_simulated(_at_speed_of(profile, run), run, folder) for run in runs]
    metrics: tuple[tuple[str, Callable[[Latencies], Floats]], ...] = (
        ("TTFT", lambda each: each.ttft),
        ("E2E", lambda each: each.e2e),
    )
    for name, of in metrics:
        for quantile in QUANTILES:

            def pooled(all_runs: Sequence[Latencies], of: Callable = of, quantile: int = quantile) -> float:
                return float(np.percentile(np.concatenate([of(each) for each in all_runs]), quantile))

            truth = pooled(live)
            single = [pooled([each]) for each in live]
            spread = (max(single) - min(single)) / truth
            left = relative_error(pooled(informed), truth)
            yield compared(
                GROUP, f"{load.name}, unseen", f"{name} p{quantile}", "ms", truth=truth, rota=pooled(simulated),
                bound=LATENCY_BOUND,
                note=f"live runs differ by {spread:.1%}; told the machine's speed, the error is {left:+.1%}",
            )  # fmt: skip


def _ms(durations: Sequence[int]) -> Floats:
    return np.asarray(durations, dtype=np.float64) / 1e6
