"""Rota beside measured points: mean TTFT and TPOT of Llama-3.1-8B on one GPU at fixed concurrency, nothing calibrated.

    python -m benchmarks.truth.silicon          # medians, and the worst points with their cause
    python -m benchmarks.truth.silicon --all    # every point

A closed loop: whenever a request ends, its client sends the next. Step times are the tables that the package
aiconfigurator makes for the GPU, the engine and the precision (`tools/make_step_time_grids.py`), of newer engines than
those measured; no overhead between steps. What the points do not say is assumed, once for all of them:

* all clients start at once and send ten requests each, all of which count;
* answers are up to a tenth shorter or longer than stated. Were they all equal, clients that start together would stay
  together for ever, which no engine was seen to do.

What differs by engine is how it schedules: vLLM and TensorRT-LLM mix prefills into steps of 8192 tokens, SGLang runs
prefills first. The TensorRT-LLM points were taken with as many slots as the stated concurrency, and with one request
more than that under way: their TTFT grows by just one answer's time over the number of slots."""

import argparse
import csv
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from benchmarks.truth.__main__ import main as print_truth
from benchmarks.truth.row import TruthRow, compared, data, relative_error

from rota.base.errors import DataError
from rota.base.instant import NANOSECONDS_PER_MILLISECOND, Duration, Instant
from rota.base.random_streams import RandomStreams
from rota.serving.api import InstanceLimits
from rota.serving.assemble import SystemConfig
from rota.serving.model.instance import InstanceId, InstanceSpec
from rota.serving.model.request import Request, RequestId
from rota.serving.predictors.step_time.grid import GridStepTime
from rota.serving.predictors.step_time.memory import capacity_of
from rota.serving.sim.cluster import SimulatedCluster, WorldOptions
from rota.serving.stack import StackConfig

NUM_WAVES = 10
LENGTH_SPREAD = 0.1
TPOT_BOUND, TTFT_BOUND = 0.12, 0.25
NUM_WORST = 5
MODEL = "Llama-3.1-8B"


@dataclass(frozen=True, slots=True)
class Engine:
    """How one engine schedules, and the table of its steps."""

    table: str
    batch: str = "vllm_default"
    num_extra_clients: int = 0
    has_as_many_slots: bool = False
    """As the stated concurrency; else as vLLM has on such GPUs."""
    bytes_per_parameter: int = 1


ENGINES = {
    ("h100_sxm", "trtllm"): Engine(
        "llama-3.1-8b-h100-trtllm", num_extra_clients=1, has_as_many_slots=True, bytes_per_parameter=2
    ),
    ("h200_sxm", "vllm"): Engine("llama-3.1-8b-fp8-h200"),
    ("h200_sxm", "sglang"): Engine("llama-3.1-8b-fp8-h200-sglang", batch="prefill_first"),
}
"""By system and backend. All three take 8192 tokens a step by default on such GPUs."""


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement: means over its requests."""

    system: str
    backend: str
    num_prompt_tokens: int
    num_output_tokens: int
    concurrency: int
    ttft_ms: float
    tpot_ms: float

    @property
    def name(self) -> str:
        return f"{self.backend} {self.num_prompt_tokens}/{self.num_output_tokens} at {self.concurrency}"

    @property
    def requests_per_second(self) -> float:
        """What the means imply: in a closed loop, clients over the time of a request."""
        return 1000 * self.concurrency / (self.ttft_ms + (self.num_output_tokens - 1) * self.tpot_ms)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A point, and what Rota says about it."""

    point: Point
    ttft_ms: float
    tpot_ms: float
    static_tpot_ms: float
    """From the tables alone, without playing anything: see `static_tpot`."""
    prefill_share: float
    """Of the time, what the table needs for prefills at the throughput that was measured."""

    @property
    def ttft_error(self) -> float:
        return relative_error(self.ttft_ms, self.point.ttft_ms)

    @property
    def tpot_error(self) -> float:
        return relative_error(self.tpot_ms, self.point.tpot_ms)

    @property
    def static_error(self) -> float:
        return relative_error(self.static_tpot_ms, self.point.tpot_ms)


def points() -> list[Point]:
    """The measured points of Llama-3.1-8B on one GPU. Raises `DataError` naming the line of one that is no point."""
    path = data("truth", "silicon", "silicon_llama31.csv")
    found = []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            try:
                if "Llama-3.1-8B" not in row["model_path"] or row["tp_size"] != "1":
                    continue
                counts = (int(row[name]) for name in ("isl", "osl", "batch_size"))
                times = (float(row[name]) for name in ("silicon_ttft_ms", "silicon_tpot_ms"))
                found.append(Point(row["system"], row["backend"], *counts, *times))
            except (KeyError, ValueError) as error:
                raise DataError(f"{path}:{reader.line_num}: {error}") from None
    return found


def limits_of(engine: Engine, point: Point) -> InstanceLimits:
    """What bounds the steps of the measured engine."""
    capacity = capacity_of(MODEL, point.system, bytes_per_parameter=engine.bytes_per_parameter)
    return InstanceLimits(
        num_blocks=capacity.num_blocks,
        max_num_seqs=point.concurrency if engine.has_as_many_slots else 1024,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
    )


def play(point: Point, *, num_waves: int = NUM_WAVES) -> Outcome:
    """Play the closed loop of one point."""
    engine = ENGINES[point.system, point.backend]
    table = GridStepTime(table=engine.table)
    clients = _Clients(point, point.concurrency + engine.num_extra_clients, num_waves)
    cluster = SimulatedCluster(
        SystemConfig(
            stack=StackConfig(batch=engine.batch),
            instances=(InstanceSpec(id=InstanceId("i0"), limits=limits_of(engine, point)),),
        ),
        clients.first(),
        table,
        WorldOptions(report_interval=Duration(0)),
        followers=clients.ended,
    )
    cluster.run()
    ttft, tpot = [], []
    for record in cluster.records:
        if record.first_token_at is None or record.status != "finished":
            raise DataError(f"{point.name}: {record.id} {record.status}: {record.reason}")
        ttft.append(record.first_token_at - record.arrived_at)
        tpot.append((record.finished_at - record.first_token_at) / (record.num_output_tokens - 1))
    prefill_ms = _prefill_ms(table, point)
    return Outcome(
        point,
        statistics.fmean(ttft) / NANOSECONDS_PER_MILLISECOND,
        statistics.fmean(tpot) / NANOSECONDS_PER_MILLISECOND,
        static_tpot(table, point),
        point.requests_per_second * prefill_ms / 1000,
    )


def static_tpot(table: GridStepTime, point: Point) -> float:
    """TPOT from the table alone, in milliseconds: a decode step of all clients half way through their answers, and the
    prefills of the others, each of which falls once between two tokens of every answer."""
    context = point.num_prompt_tokens + point.num_output_tokens // 2
    step = table.step_time(prefills=(), num_decodes=point.concurrency, decode_kv_tokens=point.concurrency * context)
    others = (point.concurrency - 1) / point.num_output_tokens
    return step / NANOSECONDS_PER_MILLISECOND + others * _prefill_ms(table, point)


def _prefill_ms(table: GridStepTime, point: Point) -> float:
    """What one prompt adds to a step, in milliseconds, where several share it."""
    num = max(1, 8192 // point.num_prompt_tokens)
    prefills = [(point.num_prompt_tokens, 0)] * num
    return table.step_time(prefills=prefills, num_decodes=0, decode_kv_tokens=0) / num / NANOSECONDS_PER_MILLISECOND


class _Clients:
    """So many clients, each of which sends its next request when its last has ended."""

    def __init__(self, point: Point, num_clients: int, num_waves: int) -> None:
        self._point = point
        self._num_clients = num_clients
        self._num_left = num_waves * point.concurrency
        self._lengths = RandomStreams(0).stream("silicon.lengths")

    def first(self) -> list[tuple[Request, int]]:
        return [self._next(Instant(0)) for _ in range(self._num_clients)]

    def ended(self, request_id: RequestId, at: Instant) -> list[tuple[Request, int]]:
        return [self._next(at)] if self._num_left > 0 else []

    def _next(self, at: Instant) -> tuple[Request, int]:
        self._num_left -= 1
        stated = self._point.num_output_tokens
        spread = round(LENGTH_SPREAD * stated)
        num_output_tokens = max(2, stated + self._lengths.integers(-spread, spread + 1))
        request = Request(
            id=RequestId(f"r-{self._num_left}"),
            arrived_at=at,
            num_prompt_tokens=self._point.num_prompt_tokens,
            max_tokens=num_output_tokens,
        )
        return request, num_output_tokens


@cache
def outcomes() -> tuple[Outcome, ...]:
    """Every point, played."""
    return tuple(play(point) for point in points())


def rows() -> Iterator[TruthRow]:
    """The two medians with their bounds; then medians by engine, and the worst points with their cause."""
    found = outcomes()
    yield _median("tpot", [one.tpot_error for one in found], TPOT_BOUND, f"{len(found)} points")
    yield _median("ttft", [one.ttft_error for one in found], TTFT_BOUND, f"{len(found)} points")
    for system, backend in ENGINES:
        own = [one for one in found if one.point.backend == backend]
        case = f"{backend} on {system}, {len(own)} points"
        yield _median("tpot", [one.tpot_error for one in own], None, _bias([one.tpot_error for one in own]), case)
        static = [one.static_error for one in own]
        yield _median("tpot of the table alone", static, None, f"{_bias(static)}; nothing played", case)
        yield _median("ttft", [one.ttft_error for one in own], None, _bias([one.ttft_error for one in own]), case)
    short = [play(one.point, num_waves=4) for one in found if one.point.backend == "sglang"]
    yield _median(
        "ttft, four requests a client", [one.ttft_error for one in short], None,
        "how many were measured is not stated, and the rush at the start weighs by it", f"sglang, {len(short)} points",
    )  # fmt: skip
    for one in sorted(found, key=lambda one: -abs(one.tpot_error))[:NUM_WORST]:
        yield _compared(one, "tpot")
    for one in sorted(found, key=lambda one: -abs(one.ttft_error))[:NUM_WORST]:
        yield _compared(one, "ttft")


def every_row() -> Iterator[TruthRow]:
    """Every point."""
    for one in outcomes():
        yield from (_compared(one, quantity) for quantity in ("tpot", "ttft"))


def _median(
    quantity: str, errors: Sequence[float], bound: float | None, note: str, case: str = "all engines"
) -> TruthRow:
    middle = statistics.median(abs(error) for error in errors)
    return TruthRow("silicon", case, f"median error of {quantity}", "", None, None, middle, bound, note)


def _bias(errors: Sequence[float]) -> str:
    return f"median of signed errors {statistics.median(errors):+.0%}"


def _compared(one: Outcome, quantity: str) -> TruthRow:
    truth, rota = getattr(one.point, f"{quantity}_ms"), getattr(one, f"{quantity}_ms")
    return compared(
        "silicon", one.point.name, f"mean {quantity}", "ms", truth=truth, rota=rota, note=cause(one, quantity)
    )


def cause(one: Outcome, quantity: str) -> str:
    """What stands behind a large error of `tpot` or `ttft`, as far as the points themselves show it."""
    point = one.point
    is_tpot_off, is_ttft_off = abs(one.tpot_error) > TPOT_BOUND, abs(one.ttft_error) > TTFT_BOUND
    if one.prefill_share > 0.6 and one.tpot_error > TPOT_BOUND:
        tokens = point.requests_per_second * point.num_prompt_tokens
        return (
            f"the means imply {tokens:,.0f} prompt tokens/s, {one.prefill_share:.0%} of the time by the table, beside "
            "the decodes: kernels were faster, or prompts shared prefixes"
        )
    if quantity == "tpot":
        return f"the table alone is {one.static_error:+.0%} off" if is_tpot_off else ""
    if not is_ttft_off:
        return ""
    if point.backend == "vllm":
        return "the rush at the start is not in the measured mean"
    if point.backend == "sglang":
        return "the rush at the start weighs by the number of requests measured, which is not stated"
    if one.ttft_error > 0:
        return "alone among its neighbours nobody waited for a slot here"
    return "rush at the start: in which order so many prompts were admitted is not stated"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every point")
    options, rest = parser.parse_known_args(arguments)
    if options.all:
        for row in every_row():
            print(f"{row.case:32} {row.quantity}  {row.truth:9.2f}  {row.rota:9.2f}  {row.error:+8.1%}  {row.note}")
        return 0
    return print_truth(["--only", "silicon", *rest])


if __name__ == "__main__":
    sys.exit(main())
