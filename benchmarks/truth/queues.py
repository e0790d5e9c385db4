"""The simulator as the queues of the textbooks, the textbooks' formulas, and what a finite run can tell of a mean."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log, sqrt

import numpy as np

from rota.base.instant import Duration, Instant
from rota.base.random_streams import RandomStreams, Stream
from rota.serving.assemble import SystemConfig
from rota.serving.metrics.definitions import RequestRecord
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.model.request import Request, RequestId
from rota.serving.sim.cluster import SimulatedCluster, WorldOptions
from rota.serving.stack import StackConfig

UNIT = 10_000
"""Nanoseconds of service for one token, wherever a job is measured in tokens."""

Size = Callable[[Stream], int]
"""Draws a job's size, in tokens, at least 1."""


# --- servers ----------------------------------------------------------------------------------------------------------


class WorkInPrompt:
    """A step takes as long as it has tokens: with one sequence at a time, service is the length of the prompt."""

    def __init__(self, slowness: float = 1.0) -> None:
        self._unit = round(UNIT * slowness)

    def step_time(
        self, *, prefills: Sequence[tuple[int, int]], num_decodes: int, decode_kv_tokens: int, now: Instant = Instant(0)
    ) -> int:
        return self._unit * (num_decodes + sum(new_tokens for new_tokens, _ in prefills))


class Shared:
    """A step takes as long as it has sequences: each gets its share of the server, which is never faster for it."""

    def __init__(self, slowness: float = 1.0) -> None:
        self._unit = round(UNIT * slowness)

    def step_time(
        self, *, prefills: Sequence[tuple[int, int]], num_decodes: int, decode_kv_tokens: int, now: Instant = Instant(0)
    ) -> int:
        return self._unit * (num_decodes + len(prefills))


def one_at_a_time(order: str = "fcfs", num_instances: int = 1, dispatch: str = "round_robin") -> SystemConfig:
    """Engines that serve one request at a time, in one step however long its prompt."""
    limits = InstanceLimits(
        num_blocks=1 << 10, block_size=1 << 20, max_num_seqs=1, max_num_batched_tokens=1 << 20, max_model_len=1 << 21
    )
    return _system(StackConfig(order=order, dispatch=dispatch), limits, num_instances)


def all_at_once() -> SystemConfig:
    """An engine that serves whoever is there, one token each a step."""
    limits = InstanceLimits(
        num_blocks=1 << 14, block_size=1 << 20, max_num_seqs=1 << 14, max_num_batched_tokens=1 << 14,
        max_model_len=1 << 21, enable_prefix_caching=False,
    )  # fmt: skip
    return _system(StackConfig(dispatch="round_robin"), limits, 1)


def _system(stack: StackConfig, limits: InstanceLimits, num_instances: int) -> SystemConfig:
    specs = tuple(InstanceSpec(InstanceId(f"i{number:02}"), limits) for number in range(num_instances))
    return SystemConfig(stack, specs)


# --- arrivals and sizes -----------------------------------------------------------------------------------------------


def exponential(mean: int) -> Size:
    """Exponential but for being whole tokens."""
    return lambda stream: max(1, round(stream.exponential(mean)))


def constant(mean: int) -> Size:
    return lambda stream: mean


def either(short: int, long: int, chance_of_short: float) -> Size:
    """One of two sizes."""
    return lambda stream: short if stream.random() < chance_of_short else long


def draw(size: Size, num_jobs: int, seed: int, gap: float) -> Iterator[tuple[int, int]]:
    """(arrival in ns, size in tokens) of jobs that come as a Poisson process with a mean gap of `gap` ns."""
    streams = RandomStreams(seed)
    gaps, sizes = streams.stream("theory.arrivals"), streams.stream("theory.sizes")
    at = 0.0
    for _ in range(num_jobs):
        at += gaps.exponential(gap)
        yield round(at), size(sizes)


def as_prompts(jobs: Iterable[tuple[int, int]]) -> Iterator[tuple[Request, int]]:
    """Jobs whose size is the prompt's; each takes one step."""
    for number, (at, size) in enumerate(jobs):
        yield Request(RequestId(f"r{number:07}"), Instant(at), size, max_tokens=1), 1


def as_outputs(jobs: Iterable[tuple[int, int]]) -> Iterator[tuple[Request, int]]:
    """Jobs whose size is the output's; each takes as many steps. What they declare is the truth."""
    for number, (at, size) in enumerate(jobs):
        yield Request(RequestId(f"r{number:07}"), Instant(at), 1, max_tokens=size), size


def play(
    config: SystemConfig, arrivals: Iterable[tuple[Request, int]], step_time: WorkInPrompt | Shared
) -> list[RequestRecord]:
    """The records in order of arrival."""
    cluster = SimulatedCluster(config, arrivals, step_time, WorldOptions(report_interval=Duration(0)))
    cluster.run()
    return sorted(cluster.records, key=lambda record: record.id)


# --- what a run tells -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, and the standard deviation of its error."""

    mean: float
    deviation: float
    num_cycles: int


Value = Callable[[RequestRecord], float | None]


def mean_over_cycles(records: Sequence[RequestRecord], value: Value, mean_gap: float, mean_size: float) -> Estimate:
    """The mean of `value` over requests of each instance, told from cycles: one begins whenever somebody comes to an
    empty instance.

    Cycles are independent and alike, so that the ratio of their sums has an error of a known size and no bias from an
    empty start (the regenerative method, Crane and Iglehart 1975). What the gaps and sizes drawn in a cycle sum up to
    is known in the mean (`mean_gap` in ns between the arrivals at one instance, `mean_size` in tokens), so the part of
    the error that goes along with theirs is taken out (control variates). Records are in order of arrival; those of
    which `value` is None do not count. Each instance's last cycle, which the end of the run cut off, is left out.
    """
    cycles: list[list[float]] = []
    for own in _by_instance(records):
        cycles += _cycles(own, value, mean_gap, mean_size)
    total, count, *controls = np.array(cycles).T
    rest = total - total.sum() / count.sum() * count
    known = np.array(controls).T
    weights = np.linalg.lstsq(known, rest, rcond=None)[0]
    left = rest - known @ weights
    mean = (total.sum() - (known @ weights).sum()) / count.sum()
    return Estimate(float(mean), sqrt(float(left @ left)) / float(count.sum()), len(cycles))


def _by_instance(records: Sequence[RequestRecord]) -> list[list[RequestRecord]]:
    by_instance: dict[InstanceId | None, list[RequestRecord]] = {}
    for record in records:
        by_instance.setdefault(record.instance_id, []).append(record)
    return list(by_instance.values())


def _cycles(records: Sequence[RequestRecord], value: Value, mean_gap: float, mean_size: float) -> list[list[float]]:
    """For each cycle but the last: sum of values, how many, and how far its gaps and sizes are off their means."""
    cycles: list[list[float]] = []
    busy_until = -1
    for record, following in pairwise(records):
        if record.arrived_at >= busy_until:
            cycles.append([0.0, 0.0, 0.0, 0.0])
        busy_until = max(busy_until, record.finished_at)
        cycle = cycles[-1]
        one = value(record)
        if one is not None:
            cycle[0] += one
            cycle[1] += 1
        # A cycle owns the gaps after its arrivals: the last of them, which ends it, too.
        cycle[2] += (following.arrived_at - record.arrived_at) / mean_gap - 1
        cycle[3] += max(record.num_prompt_tokens, record.num_output_tokens) / mean_size - 1
    return cycles[:-1]


# --- what theory says -------------------------------------------------------------------------------------------------


def pollaczek_khinchine(load: float, mean: float, second_moment: float) -> float:
    """Mean wait of M/G/1, first come first served: λ E[S²] / (2 (1 − ρ))."""
    return load / mean * second_moment / (2 * (1 - load))


def shortest_job_first(load: float) -> float:
    """Mean response of M/M/1 in services, the shortest waiting job next, none displaced (Phipps 1956): a job of size x
    waits λ E[S²] / (2 (1 − ρ(x))²), ρ(x) being the load of jobs up to x."""
    x, density = _exponential_grid()
    below = load * _up_to(x, x * density)
    return 1.0 + _integral(x, load * 2.0 / (2 * (1 - below) ** 2) * density)


def shortest_remaining_first(load: float) -> float:
    """Mean response of M/M/1 in services, the job nearest to its end next (Schrage and Miller 1966): a job of size x
    takes λ (∫₀ˣ t² f(t) dt + x² (1 − F(x))) / (2 (1 − ρ(x))²) + ∫₀ˣ dt / (1 − ρ(t))."""
    x, density = _exponential_grid()
    below = load * _up_to(x, x * density)
    wait = load * (_up_to(x, x * x * density) + x * x * np.exp(-x)) / (2 * (1 - below) ** 2)
    return _integral(x, (wait + _up_to(x, 1 / (1 - below))) * density)


def response_above(load: float, chance: float) -> float:
    """The response time of M/M/1, in services, that is exceeded with this chance: exponential with mean 1 / (1 − ρ)."""
    return -log(chance) / (1 - load)


def in_turns(load: float, num_instances: int) -> float:
    """Mean response in services where a Poisson process is dealt out in turn and services are exponential: at each
    instance E_k/M/1, in which 1 / (1 − σ) is the mean and σ solves σ = (kρ / (kρ + 1 − σ))ᵏ (GI/M/1, Kendall 1953)."""
    rate, sigma = num_instances * load, 0.0
    for _ in range(10_000):
        sigma = (rate / (rate + 1 - sigma)) ** num_instances
    return 1 / (1 - sigma)


def best_of_two(load: float) -> float:
    """Mean response in services where each job takes the shorter of two queues drawn at random, of infinitely many:
    Σ ρ^(2ⁱ − 2) over i ≥ 1 (Mitzenmacher 2001)."""
    return sum(load ** (2**i - 2) for i in range(1, 40))


def _exponential_grid() -> tuple[np.ndarray, np.ndarray]:
    x = np.linspace(0.0, 60.0, 600_001)
    return x, np.exp(-x)


def _up_to(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """∫ from 0 to each x, by trapezes."""
    return np.concatenate(([0.0], np.cumsum((values[1:] + values[:-1]) / 2 * np.diff(x))))


def _integral(x: np.ndarray, values: np.ndarray) -> float:
    return float(_up_to(x, values)[-1])
