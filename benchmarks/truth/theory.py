"""Against queueing theory, where the answer is known: the simulator is set up as the queue of a theorem and must give
the theorem's number within what a run of that length can tell, or exactly where the theorem holds path by path."""

from collections.abc import Callable, Iterator, Sequence

from benchmarks.truth.counting import littles_law
from benchmarks.truth.queues import (
    UNIT,
    Estimate,
    Shared,
    Size,
    Value,
    WorkInPrompt,
    all_at_once,
    as_outputs,
    as_prompts,
    best_of_two,
    constant,
    draw,
    either,
    exponential,
    in_turns,
    mean_over_cycles,
    one_at_a_time,
    play,
    pollaczek_khinchine,
    response_above,
    shortest_job_first,
    shortest_remaining_first,
)
from benchmarks.truth.row import TruthRow, compared

from rota.serving.metrics.definitions import RequestRecord

GROUP = "theory"
NUM_DEVIATIONS = 3.3
"""Of the error of a mean: a right simulator misses such a bound once in a thousand rows."""
LOAD = 0.7
WHOLE = 10_000
"""Mean size in tokens of jobs that take one step, however long; fine enough to be continuous."""
SHARED = 1_000
"""Mean size in steps of jobs that share the server."""
STEPS = 40
"""Mean size in steps of jobs that may be displaced between two steps."""
DISCIPLINES = "benchmarks.truth.disciplines"
OTHER_ORDERS = (
    "fcfs",
    f"{DISCIPLINES}:LastComeFirst",
    f"{DISCIPLINES}:ShortestJobDisplaces",
    f"{DISCIPLINES}:LeastAttainedFirst",
)


def rows(scale: float = 1.0, slowness: float = 1.0) -> Iterator[TruthRow]:
    """All rows. `scale` multiplies the numbers of jobs; `slowness` the time of every step, a planted error that the
    tests of this table look for."""
    study = _Study(scale, slowness)
    yield from study.first_come_first_served()
    yield from study.by_size()
    yield from study.processor_sharing()
    yield from study.displacing()
    yield from study.several_servers()
    yield from littles_law(GROUP)


class _Study:
    def __init__(self, scale: float, slowness: float) -> None:
        self._scale = scale
        self._whole, self._shared = WorkInPrompt(slowness), Shared(slowness)

    def first_come_first_served(self) -> Iterator[TruthRow]:
        sizes: list[tuple[str, Size, float]] = [
            ("M/M/1", exponential(WHOLE), 2.0),
            ("M/D/1", constant(WHOLE), 1.0),
            ("M/G/1, few long jobs", either(WHOLE // 2, WHOLE * 11 // 2, 0.9), 3.25),
        ]
        for case, size, second_moment in sizes:
            records = self._whole_jobs("fcfs", size)
            wait = pollaczek_khinchine(LOAD, 1.0, second_moment)
            estimate = _estimate(records, _response_in(WHOLE), WHOLE)
            yield _row(case, "mean response", "services", wait + 1, estimate)
            if case == "M/M/1":
                above = _estimate(records, _is_above(response_above(LOAD, 0.1)), WHOLE)
                yield _row(case, "share that takes longer than the p90", "", 0.1, above)
            num_equal = sum(record.finished_at == end for record, end in zip(records, _lindley(records), strict=True))
            yield compared(
                GROUP, case, "ends equal to Lindley's recursion", "requests", truth=len(records), rota=num_equal,
                bound=0.0, note="to the nanosecond",
            )  # fmt: skip

    def by_size(self) -> Iterator[TruthRow]:
        records = self._whole_jobs(f"{DISCIPLINES}:ShortestPromptFirst", exponential(WHOLE))
        estimate = _estimate(records, _response_in(WHOLE), WHOLE)
        yield _row("M/M/1, shortest job first", "mean response", "services", shortest_job_first(LOAD), estimate)

    def processor_sharing(self) -> Iterator[TruthRow]:
        """The mean response depends on the mean of service only, and a job's own on its own size only."""
        short, long = SHARED // 2, SHARED * 11 // 2
        truth = 1 / (1 - LOAD)
        for case, size in (
            ("M/D/1, shared", constant(SHARED)),
            ("M/M/1, shared", exponential(SHARED)),
            ("M/G/1, shared, few long jobs", either(short, long, 0.9)),
        ):
            jobs = draw(size, self._num(60_000), 0, SHARED * UNIT / LOAD)
            records = play(all_at_once(), as_outputs(jobs), self._shared)
            estimate = _estimate(records, _response_in(SHARED), SHARED)
            yield _row(case, "mean response", "services", truth, estimate, slack=1 / SHARED)
            if "few" in case:
                for name, own in (("short", short), ("long", long)):
                    stretch = _estimate(records, _stretch_of(own), SHARED)
                    yield _row(case, f"stretch of the {name}", "", truth, stretch, slack=1 / own / truth)

    def displacing(self) -> Iterator[TruthRow]:
        jobs = list(draw(exponential(STEPS), self._num(40_000), 0, STEPS * UNIT / LOAD))
        case = "M/M/1, shortest remaining first"
        best = play(one_at_a_time(f"{DISCIPLINES}:ShortestRemainingFirst"), as_outputs(jobs), self._shared)
        estimate = _estimate(best, _response_in(STEPS), STEPS)
        truth = shortest_remaining_first(LOAD)
        yield _row(case, "mean response", "services", truth, estimate, slack=1 / STEPS / truth)
        few = jobs[: len(jobs) // 4]
        total = _total(play(one_at_a_time(f"{DISCIPLINES}:ShortestRemainingFirst"), as_outputs(few), self._shared))
        others = {
            order.rpartition(":")[2]: _total(play(one_at_a_time(order), as_outputs(few), self._shared)) / total - 1
            for order in OTHER_ORDERS
        }
        yield compared(
            GROUP, case, "orders that do better on the same arrivals", "orders", truth=0,
            rota=sum(excess < 0 for excess in others.values()), bound=0.0,
            note=", ".join(f"{name} {excess:+.0%}" for name, excess in others.items()),
        )  # fmt: skip

    def several_servers(self) -> Iterator[TruthRow]:
        num = 8
        for dispatch, truth in (("round_robin", in_turns(LOAD, num)), (f"{DISCIPLINES}:AtRandom", 1 / (1 - LOAD))):
            jobs = draw(exponential(WHOLE), self._num(150_000), 0, WHOLE * UNIT / LOAD / num)
            records = play(one_at_a_time("fcfs", num, dispatch), as_prompts(jobs), self._whole)
            estimate = _estimate(records, _response_in(WHOLE), WHOLE)
            case = f"{num} × M/M/1, " + ("in turn" if dispatch == "round_robin" else "at random")
            yield _row(case, "mean response", "services", truth, estimate)
        jobs = draw(exponential(STEPS // 2), self._num(30_000), 0, STEPS // 2 * UNIT / LOAD / num)
        records = play(one_at_a_time("fcfs", num, "power_of_two"), as_outputs(jobs), self._shared)
        mean = sum(map(_response_in(STEPS // 2), records)) / len(records)
        yield compared(
            GROUP, f"{num} × M/M/1, the shorter of two", "mean response", "services",
            truth=best_of_two(LOAD), rota=mean,
            note=f"the formula is the limit of many servers; in turn it would be {in_turns(LOAD, num):.3g}, at random "
            f"{1 / (1 - LOAD):.3g}",
        )  # fmt: skip

    def _whole_jobs(self, order: str, size: Size) -> list[RequestRecord]:
        jobs = draw(size, self._num(150_000), 0, WHOLE * UNIT / LOAD)
        return play(one_at_a_time(order), as_prompts(jobs), self._whole)

    def _num(self, num_jobs: int) -> int:
        return round(num_jobs * self._scale)


def _row(case: str, quantity: str, unit: str, truth: float, estimate: Estimate, slack: float = 0.0) -> TruthRow:
    """`slack` is the part of the truth that the theorem's continuous time leaves to steps that are not interrupted."""
    bound = NUM_DEVIATIONS * estimate.deviation / truth + slack
    interval = 1.96 * estimate.deviation
    return compared(
        GROUP, case, quantity, unit, truth=truth, rota=estimate.mean, bound=bound,
        note=f"95 % of ± {interval:.2g}, {estimate.num_cycles:,} busy periods",
    )  # fmt: skip


def _estimate(records: Sequence[RequestRecord], value: Value, mean_size: int) -> Estimate:
    return mean_over_cycles(records, value, mean_size * UNIT / LOAD, mean_size)


def _response_in(mean_size: int) -> Callable[[RequestRecord], float]:
    return lambda record: (record.finished_at - record.arrived_at) / (mean_size * UNIT)


def _is_above(response: float) -> Value:
    return lambda record: float(_response_in(WHOLE)(record) > response)


def _stretch_of(size: int) -> Value:
    return lambda record: (
        (record.finished_at - record.arrived_at) / (size * UNIT) if record.num_output_tokens == size else None
    )


def _total(records: Sequence[RequestRecord]) -> int:
    return sum(record.finished_at - record.arrived_at for record in records)


def _lindley(records: Sequence[RequestRecord]) -> Iterator[int]:
    """Who comes first is served first: a job ends its size after its arrival or after the end of the one before it."""
    end = 0
    for record in records:
        end = max(end, record.arrived_at) + record.num_prompt_tokens * UNIT
        yield end
