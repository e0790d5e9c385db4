"""A live vLLM on this machine's CPU: calibrate on one load, predict others, twice each.

The calibration's load keeps so many requests in flight; the loads that are predicted come open loop, at a rate, with
lengths and burstiness of their own, and their simulation gets the instants at which requests were sent and the lengths
that the server counted. Rounds of calibration and unseen loads alternate, and the profile is fitted to all rounds'
calibration, so that a machine which others use meanwhile is measured in the state in which it is predicted.

Beside each error stands what the live figure is itself worth: the difference of its two runs. Where neighbours on the
same cores stand in the way, the rows in CPU time show what is left without them. They are the same runs on another
clock, one that stands still while the engine's step has no core: steps take their CPU time, and requests come and
tokens leave at that clock's instants. What the engine decides depends on the order of these alone, so it is the same.
The profile of these rows is fitted to CPU time. The way to the engine, which crowded cores make long, is not a part of
them, and has rows of its own.
"""

import asyncio
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from benchmarks.truth.row import TruthRow, compared, relative_error

from rota.base.errors import ConfigError, EngineError
from rota.base.instant import Duration
from rota.base.journal import read_journal
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
from rota.serving.engines.vllm.replay import ROW_TYPES
from rota.serving.engines.vllm.server import VllmServer
from rota.serving.model.events import SequenceArrived
from rota.serving.predictors.step_time.fitted import PhaseError
from rota.serving.predictors.step_time.profiles import Profile
from rota.serving.sim.run import SimulationConfig, simulate
from rota.serving.workload.arrivals import Arrival
from rota.serving.workload.formats.azure import AzureFormat
from rota.serving.workload.generator import Lengths

GROUP = "live"
STEP_BOUND = 0.08
LATENCY_BOUND = 0.15
QUIET = 0.05
"""Where neighbours take no more than this share of the steps' time, the bound stands on the wall clock."""
CROWDED = 0.10
"""Beyond this share CPU time itself grows with the neighbours, and no bound can be held: steps that are alike differed
among themselves by 8 % at 12 %, by 12 % at 20 %."""
GROSS = 0.75
"""What no state of the machine excuses, of rows in CPU time whose own bound cannot be held."""
NUM_ROUNDS = 2
CALIBRATION_SECONDS = 120.0
"""Of each round."""
START_SECONDS = 600.0
QUANTILES = (50, 99)
WALL, CPU = "unseen", "unseen, in the engine's CPU time"


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
    requests: list["Request"]
    steps: Steps


@dataclass(frozen=True, slots=True)
class Request:
    """What a client sent and saw. Instants in ns."""

    sent_at: int
    arrived_at: int
    """When the engine's front end took it up, by its own stamp."""
    first_at: int
    ended_at: int
    num_prompt_tokens: int
    num_output_tokens: int


def rows(*, scale: float = 1.0) -> Iterator[TruthRow]:
    """Everything that is measured live. Takes about twelve minutes; with `scale` below 1 the calibration and the loads
    are shorter by that factor, and the bounds wider: the profile is fitted to fewer steps, and p50 and p99 of fewer
    requests are themselves less certain. Raises `ConfigError` without vLLM or its model."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("vllm is not installed", hint="make install, or leave the group out")
    model = prepare_model()
    with tempfile.TemporaryDirectory(prefix="rota-live-") as folder:
        measured = asyncio.run(_measure(model, Path(folder), scale))
        drift = _drift(measured)
        is_steady = drift <= STEP_BOUND
        yield from _step_rows(measured, STEP_BOUND / scale, is_steady=is_steady)
        note = f"bounds stand up to {STEP_BOUND:.0%}: beyond, the machine of one run is not that of the other"
        yield _error_row("all", "by how much steps of one load took longer in one run", drift, None, note)
        for load in LOADS:
            runs = [run for run in measured.runs if run.load.name == load.name]
            yield from _front_end_rows(measured.profile, runs)
            clocks = [(measured.profile, runs, WALL)]
            if measured.cpu_profile is not None:
                clocks.append((measured.cpu_profile, [_in_cpu_time(run) for run in runs], CPU))
            for profile, on_clock, what in clocks:
                yield from _latency_rows(
                    profile, on_clock, Path(folder), what, LATENCY_BOUND / scale, is_steady=is_steady
                )


@dataclass(frozen=True, slots=True)
class Measured:
    """All that was measured, and what was fitted to it."""

    profile: Profile
    cpu_profile: Profile | None
    """Fitted to CPU time; None where that is not known."""
    held_out: Steps
    runs: list[Run]


# --- live -------------------------------------------------------------------------------------------------------------


async def _measure(model: Path, folder: Path, scale: float) -> Measured:
    server = VllmServer(
        model=model,
        port=free_port(),
        served_model_name=MODEL_NAME,
        facts=folder / "facts.jsonl",
        journal=folder / "journal",
        cores="0",
    )
    facts, journal = server.facts, server.journal
    assert facts is not None
    assert journal is not None
    stop = asyncio.Event()
    calibrating: list[StepRecord] = []
    probes: list[Sent] = []
    engine: EngineFacts | None = None
    runs: list[Run] = []
    async with running(server, folder / "log", stop, timeout=START_SECONDS) as url:
        for number in range(NUM_ROUNDS):
            collected = await collect(
                url, facts, seconds=scale * CALIBRATION_SECONDS, seed=100 + number, stop=stop, tokenizer=model
            )
            engine = collected.engine
            calibrating += collected.records
            probes += collected.sent
            for load in LOADS:
                load = replace(load, num_requests=round(scale * load.num_requests))
                runs.append(await _run(url, facts, model, load, number))
    steps = steps_of(calibrating, "calibration")
    origin = Origin("benchmarks/truth/live.py", time.strftime("%Y-%m-%d"), "this machine", "this machine's CPU")
    front_end = front_end_of(probes, steps)
    profile = calibrate(steps, calibrating, engine, origin, front_end=front_end)
    cpu_profile = None
    if not np.isnan(steps.cpu_ns).any():
        on_cpu = replace(steps, step_ns=steps.cpu_ns)
        # Its latencies begin when a request was taken up, so that the way in is not a part of them.
        way_out = None if front_end is None else msgspec.structs.replace(front_end, request_ms=0.0)
        cpu_profile = calibrate(on_cpu, calibrating, engine, origin, front_end=way_out)
    arrivals = _arrivals(journal)
    return Measured(profile, cpu_profile, steps.where(steps.held_out), [_arrived(run, arrivals) for run in runs])


async def _run(url: str, facts: Path, model: Path, load: Unseen, number: int) -> Run:
    began_at = clock()
    # The plan is the same in every round. Its texts are not, or the engine would know them from an earlier run.
    texts = number * len(LOADS) + [each.name for each in LOADS].index(load.name)
    prompts = Prompts(RandomStreams(1000 + texts), FileTokenizer(model))
    async with session() as client:
        target = Target(
            client, url, clock, model=MODEL_NAME, endpoint="completions", ignore_eos=True, timeout_seconds=600.0
        )
        sent = await send_load(
            _plan(load),
            target,
            lambda planned: prompts.text(10_000 * texts + planned.index, planned.num_prompt_tokens),
            clock,
            stop=asyncio.Event(),
        )
    failed = next((each for each in sent if each.outcome != "finished"), None)
    if failed is not None:
        raise EngineError(f"{load.name}: a request was not answered: {failed.error_kind}: {failed.detail}")
    await asyncio.sleep(1.5)  # by then an idle engine has written its last steps
    records = [record for record in records_of(facts) if record.at >= began_at]
    num_cached = sum(record.num_cached_tokens for record in records)
    if num_cached > 0.01 * sum(each.num_prompt_tokens or 0 for each in sent):
        raise EngineError(f"{load.name}: {num_cached} prompt tokens were known to the engine, and the trace has none")
    return Run(load, number, _requests(sent), steps_of(records, load.name))


def _requests(sent: Sequence[Sent]) -> list[Request]:
    return [
        Request(
            each.sent_at,
            each.sent_at,
            each.chunk_at[0],
            each.chunk_at[-1],
            each.num_prompt_tokens or each.planned.num_prompt_tokens,
            each.num_output_tokens,
        )
        for each in sorted(sent, key=lambda each: each.sent_at)
    ]


def _arrivals(journal: Path) -> list[tuple[int, int]]:
    """When the engine's front end took up each request, and how long its prompt was."""
    events = (row.event for row in read_journal(journal, ROW_TYPES))
    requests = [event.request for event in events if isinstance(event, SequenceArrived)]
    return [(request.arrived_at, request.num_prompt_tokens) for request in requests]


def _arrived(run: Run, arrivals: Sequence[tuple[int, int]]) -> Run:
    """The run, with each request's arrival: the first of its length after its sending that is nobody else's."""
    arrivals = sorted(arrivals)
    taken: set[int] = set()
    requests = []
    for each in run.requests:
        match = next(
            index
            for index, (at, num_prompt_tokens) in enumerate(arrivals)
            if at >= each.sent_at and num_prompt_tokens == each.num_prompt_tokens and index not in taken
        )
        taken.add(match)
        requests.append(replace(each, arrived_at=arrivals[match][0]))
    return replace(run, requests=requests)


def _plan(load: Unseen) -> list[Planned]:
    streams = RandomStreams(sum(load.name.encode()))
    mix = Mix([LoadClass()], [], streams)
    plan = at_rate(load.rate, load.burstiness, load.prompt, load.output, mix, streams)
    return list(bounded(plan, num_requests=load.num_requests, duration=None))


def _in_cpu_time(run: Run) -> Run:
    """The run from the moments on at which its requests were taken up, on a clock that goes as fast as the engine's
    workers compute while a step runs, and as time does else."""
    steps = run.steps
    begins, ends = steps.at.astype(np.float64), steps.at + steps.step_ns
    lost = np.concatenate(([0.0], np.cumsum(np.maximum(0.0, steps.step_ns - steps.cpu_ns))))
    # Time lost is known at both ends of each step, and grows evenly between them.
    at, by_then = np.stack((begins, ends), axis=1).ravel(), np.stack((lost[:-1], lost[1:]), axis=1).ravel()

    def instant(wall: int) -> int:
        return round(wall - float(np.interp(wall, at, by_then)))

    requests = [
        replace(
            each, sent_at=instant(each.arrived_at), first_at=instant(each.first_at), ended_at=instant(each.ended_at)
        )
        for each in run.requests
    ]
    return replace(run, requests=sorted(requests, key=lambda each: each.sent_at))


# --- simulated --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Latencies:
    """In ms, one a request."""

    ttft: Floats
    e2e: Floats


def _live(run: Run) -> Latencies:
    return Latencies(
        ttft=_ms([each.first_at - each.sent_at for each in run.requests]),
        e2e=_ms([each.ended_at - each.sent_at for each in run.requests]),
    )


def _simulated(profile: Profile, run: Run, folder: Path) -> Latencies:
    """The same requests, at the instants at which they left, through `rota simulate`."""
    began_at = run.requests[0].sent_at
    AzureFormat().write(
        folder / "trace.csv",
        [
            Arrival(Duration(each.sent_at - began_at), each.num_prompt_tokens, each.num_output_tokens)
            for each in run.requests
        ],
    )
    write_profile(profile, folder / "profile.toml")
    result = simulate(SimulationConfig(trace=folder / "trace.csv", profile=str(folder / "profile.toml")))
    return Latencies(
        ttft=_ms([(record.first_token_at or record.finished_at) - record.arrived_at for record in result.records]),
        e2e=_ms([record.finished_at - record.arrived_at for record in result.records]),
    )


# --- compared ---------------------------------------------------------------------------------------------------------


def _step_rows(measured: Measured, most: float, *, is_steady: bool) -> Iterator[TruthRow]:
    """The bound stands on the wall clock if the machine was quiet, else on CPU time."""
    calibration = measured.profile.calibration
    assert calibration is not None
    case, taken = "holdout of the calibration", _taken(measured.held_out)
    is_quiet = taken <= QUIET or calibration.cpu_mape is None
    is_crowded = taken > CROWDED
    alike = "" if calibration.noise is None else f"; alike steps differ by {calibration.noise:.1%}"
    for each in calibration.errors:
        is_all = each.phase == "all"
        note = f"{each.num_steps} steps, bias {each.bias:+.1%}{alike if is_all else ''}"
        bound = most if is_all and is_quiet and is_steady else None
        yield _error_row(case, f"step time, {each.phase}: MAPE", each.mape, bound, note)
    if calibration.cpu_mape is not None:
        note = f"neighbours took {taken:.1%} of the steps' time"
        bound = GROSS if is_crowded or not is_steady else None if is_quiet else most
        yield _error_row(case, "step time in CPU time: MAPE", calibration.cpu_mape, bound, note)
    for run in measured.runs:
        (error, *_) = _errors(measured, run)
        note = f"{error.num_steps} steps, bias {error.bias:+.1%}; neighbours took {_taken(run.steps):.1%}"
        yield _error_row(f"{run.load.name}, run {run.number + 1}", "step time: MAPE", error.mape, None, note)


def _errors(measured: Measured, run: Run) -> list[PhaseError]:
    """Of the profile's steps beside the run's; of all of them first."""
    return errors_of(predicted(measured.profile.step_time.parameters, run.steps), run.steps.step_ns, run.steps)


def _drift(measured: Measured) -> float:
    """By how much the steps of one load took longer in one run than in the other, beside what the one profile says of
    both: a change of the machine, which no profile foretells. The greatest over the loads, as a share."""
    biases = [[_errors(measured, run)[0].bias for run in measured.runs if run.load.name == load.name] for load in LOADS]
    return max((1 + max(of_load)) / (1 + min(of_load)) - 1 for of_load in biases if of_load)


def _front_end_rows(profile: Profile, runs: Sequence[Run]) -> Iterator[TruthRow]:
    """What the first part of the way in took under these loads. The profile has a constant for the whole way; on a
    machine whose other cores are crowded it is none."""
    front_end = None if profile.calibration is None else profile.calibration.front_end
    constant = "none" if front_end is None else f"{front_end.request_ms:.1f} ms"
    ways_in = [_ms([each.arrived_at - each.sent_at for each in run.requests]) for run in runs]
    for quantile in QUANTILES:
        yield TruthRow(
            GROUP, f"{runs[0].load.name}, {WALL}", f"from sending until taken up, p{quantile}", "ms",
            _quantile(ways_in, quantile), None, None, None, f"in TTFT and E2E; the profile's whole way in: {constant}",
        )  # fmt: skip


def _error_row(case: str, quantity: str, error: float, bound: float | None, note: str) -> TruthRow:
    return TruthRow(GROUP, case, quantity, "", None, None, error, bound, note)


def _taken(steps: Steps) -> float:
    """The share of the steps' time in which their processes had no core."""
    known = ~np.isnan(steps.cpu_ns)
    return float(1 - steps.cpu_ns[known].sum() / steps.step_ns[known].sum()) if known.any() else 0.0


def _latency_rows(
    profile: Profile, runs: Sequence[Run], folder: Path, what: str, most: float, *, is_steady: bool
) -> Iterator[TruthRow]:
    """The bound stands where the live figure itself keeps it: not where two live runs differ by more, where steps of
    the same load changed from one to the other, or neighbours took so much that CPU time itself is not what it was.
    There the wall clock has none, and CPU time that of gross errors."""
    is_crowded = max(_taken(run.steps) for run in runs) > CROWDED
    live = [_live(run) for run in runs]
    simulated = [_simulated(profile, run, folder) for run in runs]
    metrics: tuple[tuple[str, Callable[[Latencies], Floats]], ...] = (
        ("TTFT", lambda each: each.ttft),
        ("E2E", lambda each: each.e2e),
    )
    for name, of in metrics:
        for quantile in QUANTILES:
            single = [_quantile([of(each)], quantile) for each in live]
            guessed = [_quantile([of(each)], quantile) for each in simulated]
            truth = _quantile([of(each) for each in live], quantile)
            errors = ", ".join(f"{relative_error(rota, one):+.1%}" for rota, one in zip(guessed, single, strict=True))
            spread = (max(single) - min(single)) / truth
            is_kept = is_steady and not is_crowded and spread <= LATENCY_BOUND
            yield compared(
                GROUP, f"{runs[0].load.name}, {what}", f"{name} p{quantile}", "ms", truth=truth,
                rota=_quantile([of(each) for each in simulated], quantile),
                bound=most if is_kept else GROSS if what == CPU else None,
                note=f"single runs: {errors}; live they differ by {spread:.1%}",
            )  # fmt: skip


def _quantile(values: Sequence[Floats], quantile: int) -> float:
    return float(np.percentile(np.concatenate(values), quantile))


def _ms(durations: Sequence[int]) -> Floats:
    return np.asarray(durations, dtype=np.float64) / 1e6
