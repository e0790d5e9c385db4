"""Rota beside two real runs of vLLM 0.19: the same 300 requests, token for token, on two cards.

    python -m benchmarks.truth.real_runs                    # the table
    python -m benchmarks.truth.real_runs --html FILE        # and queue length and KV use over time, ours and theirs

Step times come from the cards' layer tables, limits from the engine's own settings, and nothing is fitted: no overhead,
no constant of any card. What stands behind the differences that remain is in docs/step-times.md.
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
from benchmarks.truth.__main__ import main as print_truth
from benchmarks.truth.row import TruthRow, compared, data

from rota.base.errors import DataError
from rota.base.instant import NANOSECONDS_PER_SECOND, Duration, Instant, milliseconds
from rota.serving.api import InstanceLimits, StepTimePredictor
from rota.serving.assemble import SystemConfig
from rota.serving.metrics.definitions import RequestRecord, Samples
from rota.serving.model.instance import InstanceId, InstanceSpec
from rota.serving.model.request import Request, RequestId
from rota.serving.predictors.step_time.engine_settings import EngineSettings, read_engine_settings
from rota.serving.predictors.step_time.grid import GridStepTime
from rota.serving.predictors.step_time.layerwise import LayerwiseStepTime
from rota.serving.predictors.step_time.memory import capacity_of
from rota.serving.sim.cluster import SimulatedCluster, WorldOptions
from rota.serving.stack import StackConfig

CARDS = ("RTX4090", "RTXPRO6000")
MODEL = "Llama-3.1-8B"
BOUNDS = {"e2e": 0.02, "tpot": 0.02, "ttft": 0.05}
"""Of the means; of p99, ten per cent each."""
P99_BOUND = 0.10

_ONE = InstanceId("i0")


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of every request in order of arrival, in milliseconds."""

    ttft: np.ndarray
    tpot: np.ndarray
    e2e: np.ndarray


@dataclass(frozen=True, slots=True)
class Series:
    """One engine over time, in seconds since the first arrival. KV use is a fraction of the blocks."""

    at: np.ndarray
    running: np.ndarray
    waiting: np.ndarray
    kv_use: np.ndarray


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of the workload on our engine."""

    latencies: Latencies
    series: Series
    num_preemptions: int
    num_cached_tokens: int
    limits: InstanceLimits
    is_capacity_derived: bool


class _Prompt(msgspec.Struct):
    """A row of workload.jsonl."""

    input_toks: int
    output_toks: int
    arrival_time_ns: int
    input_tok_ids: list[int]


class _Timed(msgspec.Struct):
    """A row of requests.jsonl. `arrival_time` is of another clock than the rest."""

    arrival_time: float
    queued_ts: float
    first_token_ts: float
    last_token_ts: float
    output_toks: int


def folder(card: str) -> Path:
    """Where the real run of a card lies."""
    return data("truth", "vllm-0.19", f"{card}-{MODEL}")


def _lines(path: Path, type_: type) -> list:
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            rows.append(msgspec.json.decode(line, type=type_))
        except msgspec.MsgspecError as error:
            raise DataError(f"{path}:{number}: {error}") from None
    return rows


@cache
def workload(block_size: int) -> tuple[tuple[Request, int], ...]:
    """The requests with their true output lengths. Blocks are the same where all tokens up to their end are."""
    names: dict[tuple[int, tuple[int, ...]], int] = {}
    arrivals = []
    for number, row in enumerate(_lines(data("truth", "vllm-0.19", "workload.jsonl"), _Prompt)):
        hashes = []
        name = 0
        for end in range(block_size, len(row.input_tok_ids) + 1, block_size):
            block = (name, tuple(row.input_tok_ids[end - block_size : end]))
            name = names.setdefault(block, len(names) + 1)
            hashes.append(name)
        request = Request(
            id=RequestId(f"r-{number:03d}"),
            arrived_at=Instant(row.arrival_time_ns),
            num_prompt_tokens=row.input_toks,
            # The run pinned every answer's length, and told the engine so.
            max_tokens=row.output_toks,
            block_hashes=tuple(hashes),
        )
        arrivals.append((request, row.output_toks))
    return tuple(arrivals)


def settings(card: str) -> EngineSettings:
    """What the engine of the run noted about itself."""
    return read_engine_settings(folder(card) / "meta.json")


def limits_of(card: str) -> tuple[InstanceLimits, bool]:
    """The limits of the run's engine, and whether its KV capacity is derived, for lack of a note."""
    noted = settings(card)
    if noted.num_gpu_blocks is not None:
        return noted.limits(InstanceLimits(num_blocks=1)), False
    capacity = capacity_of(MODEL, card, block_size=noted.block_size or 16)
    return noted.limits(InstanceLimits(num_blocks=capacity.num_blocks)), True


@cache
def replay(card: str, *, skew: bool | None = None, leap: bool = True) -> Replay:
    """Play the workload through our model of the engine with vLLM's own policies and the run's own settings."""
    step_time = LayerwiseStepTime(tables=str(data("profiles", "layerwise", card)), skew=skew)
    return play(card, step_time, leap=leap)


def play(
    card: str, step_time: StepTimePredictor, *, leap: bool = True, step_overhead: Duration = Duration(0)
) -> Replay:
    """The same, with other step times."""
    limits, is_derived = limits_of(card)
    cluster = SimulatedCluster(
        SystemConfig(stack=StackConfig(), instances=(InstanceSpec(id=_ONE, limits=limits),)),
        workload(limits.block_size),
        step_time,
        WorldOptions(report_interval=Duration(0), step_overhead=step_overhead, leap=leap),
    )
    cluster.run()
    (machine,) = cluster.machines()
    statistics = machine.statistics()
    return Replay(
        _ours(cluster.records),
        _our_series(cluster.sampler.series[_ONE], limits.num_blocks),
        statistics.num_preemptions,
        statistics.num_cached_tokens,
        limits,
        is_derived,
    )


def _ours(records: Sequence[RequestRecord]) -> Latencies:
    rows = []
    for record in sorted(records, key=lambda one: one.id):
        if record.first_token_at is None or record.status != "finished":
            raise DataError(f"{record.id} {record.status}: {record.reason}")
        first, last = record.first_token_at - record.arrived_at, record.finished_at - record.arrived_at
        rows.append((first, (last - first) / max(1, record.num_output_tokens - 1), last))
    ttft, tpot, e2e = np.array(rows).T / 1e6
    return Latencies(ttft, tpot, e2e)


def truth(card: str) -> Latencies:
    """Of the real run, counted from each request's arrival.

    Arrivals were noted on the wall clock, all else on a monotonic one. The two are an unknown, fixed way apart: the
    least time that any request took from its arrival into the engine's queue is taken to be none at all."""
    rows: list[_Timed] = _lines(folder(card) / "requests.jsonl", _Timed)
    apart = min(row.queued_ts - row.arrival_time for row in rows)
    times = []
    for row in rows:
        first, last = row.first_token_ts - row.arrival_time - apart, row.last_token_ts - row.arrival_time - apart
        times.append((first, (last - first) / max(1, row.output_toks - 1), last))
    ttft, tpot, e2e = np.array(times).T * 1e3
    return Latencies(ttft, tpot, e2e)


def _our_series(samples: Samples, num_blocks: int) -> Series:
    return Series(
        np.array(samples.at) / NANOSECONDS_PER_SECOND,
        np.array(samples.running),
        np.array(samples.waiting),
        1 - np.array(samples.free_blocks) / num_blocks,
    )


def real_series(card: str) -> Series:
    """What the engine noted at the end of each second. Its KV use is all zeros where the recorder read the wrong
    field."""
    path = folder(card) / "timeseries.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [np.array([float(row[name]) for row in rows]) for name in ("t", "running", "waiting", "kv_cache_pct")]
    at, running, waiting, percent = columns
    return Series(at, running, waiting, percent / 100)


def rows() -> Iterator[TruthRow]:
    """Means and p99 of E2E, TPOT and TTFT with their bounds, and what explains them, without."""
    for card in CARDS:
        ours, real = replay(card), truth(card)
        capacity = f"KV capacity {'derived' if ours.is_capacity_derived else 'as noted by the engine'}"
        for name, bound in BOUNDS.items():
            mine, theirs = getattr(ours.latencies, name), getattr(real, name)
            yield _row(card, f"mean {name}", float(theirs.mean()), float(mine.mean()), bound, capacity)
            for percentile, limit in ((50, None), (99, P99_BOUND)):
                pair = (float(np.percentile(values, percentile)) for values in (theirs, mine))
                yield _row(card, f"p{percentile} {name}", *pair, limit, "")
        yield from _shown(card, ours, real)
    yield from _from_kernels()


def _shown(card: str, ours: Replay, real: Latencies) -> Iterator[TruthRow]:
    """Rows that promise nothing: the course of the run, and what the tables would say about unlike decodes."""
    theirs = real_series(card)
    mine = at_times(ours.series, theirs.at)
    for name in ("running", "waiting", "kv_use"):
        measured, simulated = getattr(theirs, name), getattr(mine, name)
        if not measured.any():
            continue
        unit = "" if name == "kv_use" else "requests"
        apart = float(np.abs(simulated - measured).mean())
        note = f"mean distance over time {apart:.2g}"
        yield compared(
            "real_runs",
            card,
            f"mean {name}",
            unit,
            truth=float(measured.mean()),
            rota=float(simulated.mean()),
            note=note,
        )
    other = replay(card, skew=True).latencies
    yield _row(
        card, "mean e2e, skew.csv used", float(real.e2e.mean()), float(other.e2e.mean()), None,
        "as the folder's meta.yaml asks" if np.array_equal(other.e2e, ours.latencies.e2e) else
        "meta.yaml turns it off: decode steps of these tables are 3 % slower than the run's, which hides skew",
    )  # fmt: skip


def _from_kernels() -> Iterator[TruthRow]:
    """The same run with step times of the kind that is shipped: from kernels, not measured on an engine."""
    card, name = "RTXPRO6000", "Meta-Llama-3.1-8B_rtx_pro_6000_server_vllm_tp1.csv"
    table = GridStepTime(table=str(data("profiles", "aiconfigurator", name)))
    for overhead_ms in (0, 2):
        ours = play(card, table, step_overhead=milliseconds(overhead_ms)).latencies
        note = (
            f"aiconfigurator's table, {overhead_ms} ms between steps: what a profile without measured layers is worth"
        )
        for quantity in BOUNDS:
            truth_ms, rota_ms = (float(getattr(one, quantity).mean()) for one in (truth(card), ours))
            yield _row(card, f"mean {quantity}, from kernels + {overhead_ms} ms", truth_ms, rota_ms, None, note)


def _row(card: str, quantity: str, real: float, ours: float, bound: float | None, note: str) -> TruthRow:
    return compared("real_runs", card, quantity, "ms", truth=real, rota=ours, bound=bound, note=note)


def at_times(series: Series, at: np.ndarray) -> Series:
    """The series as it stood at those instants; after its end, empty."""
    index = np.searchsorted(series.at, at, side="right") - 1
    stood = index.clip(min=0)
    is_within = (index >= 0) & (at <= series.at[-1])
    picked = (np.where(is_within, values[stood], 0) for values in (series.running, series.waiting, series.kv_use))
    return Series(at, *picked)


def write_html(path: Path) -> None:
    """Queue length and KV use over time, ours beside the real ones, in one file that opens offline."""
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    panels = {"waiting": "requests waiting", "running": "requests running", "kv_use": "KV use"}
    titles = [
        f"{card}: {title}" + ("" if getattr(real_series(card), name).any() else " (not recorded by the engine)")
        for name, title in panels.items()
        for card in CARDS
    ]
    figure = make_subplots(
        rows=len(panels), cols=len(CARDS), shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.07
    )
    for column, card in enumerate(CARDS, 1):
        sources = (("vLLM 0.19", real_series(card), "#888"), ("Rota", replay(card).series, "#d62728"))
        for label, series, colour in sources:
            for row, name in enumerate(panels, 1):
                values = getattr(series, name)
                if not values.any():
                    continue
                line = graph_objects.Scatter(
                    x=series.at, y=values, name=label, legendgroup=label, showlegend=(row, column) == (1, 1),
                    line={"color": colour, "width": 1.5},
                )  # fmt: skip
                figure.add_trace(line, row=row, col=column)
    figure.update_xaxes(title_text="seconds", row=len(panels))
    figure.update_layout(title="The same 300 requests on the engine and in the simulator", height=900, template="none")
    figure.write_html(path, include_plotlyjs=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--html", type=Path, help="write the course of both runs beside ours")
    options, rest = parser.parse_known_args(arguments)
    status = print_truth(["--only", "real_runs", *rest])
    if options.html is not None:
        write_html(options.html)
        sys.stderr.write(f"course of both runs: {options.html}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
