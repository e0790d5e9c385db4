"""Random workloads for one engine, and a world that plays them while every word of the machine is checked.

What the machine says is held against a second account of every sequence, kept here from its commands alone; so a
token that is lost or counted twice is seen at the step in which it happens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from hypothesis import strategies as st
from msgspec import UNSET

from rota.base.errors import LawBroken
from rota.base.instant import Duration, Instant, after, seconds
from rota.base.journal import Row
from rota.base.random_streams import RandomStreams
from rota.runtime.simulation import SimulationLoop
from rota.serving.api import Capability, EngineView, StepTimePredictor
from rota.serving.instance.host_memory import HostMemory
from rota.serving.instance.machine import InstanceStatistics
from rota.serving.model.commands import InstanceCommand, RunStep
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.model.request import Request, RequestId, TenantId
from rota.serving.model.swapping import SwapRules
from rota.serving.sim.ground_truth import GroundTruth
from rota.serving.sim.instance import RANK_ARRIVAL, SequenceState, SimulatedInstance
from rota.serving.sim.swap import with_swap
from rota.serving.stack import EnginePolicies, StackConfig
from rota.testing.audited import AuditedInstance

RANK_CLIENT_LEAVES = 2
SHIFT = Instant(seconds(987_654))

_CHUNK_MIN = 8
"""Tokens of a prefill in a step, where the budget allows: each output token may cost a prefill anew, but no more,
before a workload counts as going round in circles."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request, its true output length, and after how long its client leaves, if it does."""

    request: Request
    num_output_tokens: int
    leaves_after: Duration | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """An engine's settings and what comes its way, in order of arrival."""

    limits: InstanceLimits
    jobs: tuple[Job, ...]


@dataclass(frozen=True, slots=True)
class End:
    """How and when a request ended (counted from the start of the world), with the tokens that the commands gave it."""

    how: str
    at: Instant
    num_output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Played:
    """What came of a workload."""

    ends: dict[RequestId, End]
    first_token_at: dict[RequestId, Instant]
    rows: list[Row]
    statistics: InstanceStatistics
    """When all was over."""

    def steps(self) -> list[RunStep]:
        """The steps that were ordered, in order."""
        return [command for row in self.rows for command in row.commands if isinstance(command, RunStep)]


class Pace:
    """A step takes 1 ms, 20 µs a token and 3 ns a token of context: whole nanoseconds, so that times compare."""

    def step_time(
        self, *, prefills: Sequence[tuple[int, int]], num_decodes: int, decode_kv_tokens: int, now: Instant = Instant(0)
    ) -> int:
        num_tokens = num_decodes + sum(new_tokens for new_tokens, _ in prefills)
        return 1_000_000 + 20_000 * num_tokens + 3 * (decode_kv_tokens + sum(context for _, context in prefills))


# --- random workloads -------------------------------------------------------------------------------------------------


@st.composite
def workloads(draw: Callable[..., Any], *, num_jobs_max: int = 10) -> Workload:
    """Bursts and silences, shared prefixes, three classes and clients who leave, on an engine with little room."""
    block_size = draw(st.sampled_from([1, 4, 4, 16]))
    limits = InstanceLimits(
        num_blocks=draw(st.integers(4, 24)),
        block_size=block_size,
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.sampled_from([3, 8, 16, 64])),
        enable_prefix_caching=draw(st.sampled_from([True, True, False])),
        watermark_blocks=draw(st.sampled_from([0, 0, 1, 3])),
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 5])),
        reserve_full_prompt=draw(st.sampled_from([True, True, False])),
    )
    longest = limits.num_blocks * block_size
    job = st.tuples(
        st.sampled_from([0, 0, 1_000, 1_030_000, 4_000_000, 60_000_000]),  # after the one before
        st.integers(1, max(1, longest * 2 // 3)),  # prompt
        st.integers(1, max(1, longest // 2)),  # output
        st.sampled_from([0, 0, 7]),  # what the client allows beyond the output
        st.integers(0, 2),  # class
        st.integers(0, 2),  # family, whose prompts begin alike
        st.sampled_from([None] * 9 + [0, 1_500_000, 20_000_000]),
    )
    drawn = draw(st.lists(job, min_size=2, max_size=num_jobs_max))
    jobs = []
    at = 0
    for number, (gap, num_prompt, num_output, slack, priority, family, leaves_after) in enumerate(drawn):
        at += gap
        jobs.append(_job(number, at, num_prompt, num_output, slack, priority, family, leaves_after, block_size))
    return Workload(limits, tuple(jobs))


def seeded_workload(seed: int, *, num_jobs: int = 40, load: float = 1.5) -> Workload:
    """A long workload from a seed, on an engine that `load` times its capacity or so comes upon."""
    stream = RandomStreams(seed).stream("testing.workload")
    limits = InstanceLimits(num_blocks=24, block_size=4, max_num_seqs=6, max_num_batched_tokens=24)
    jobs = []
    at = 0
    for number in range(num_jobs):
        at += round(stream.exponential(8_000_000 / load))
        num_prompt, num_output = stream.integers(1, 40), stream.integers(1, 40)
        leaves_after = stream.integers(0, 60_000_000) if stream.random() < 0.1 else None
        jobs.append(
            _job(number, at, num_prompt, num_output, 5, stream.integers(0, 3), stream.integers(0, 3), leaves_after, 4)
        )
    return Workload(limits, tuple(jobs))


def _job(
    number: int,
    at: int,
    num_prompt: int,
    num_output: int,
    slack: int,
    priority: int,
    family: int,
    leaves_after: int | None,
    block_size: int,
) -> Job:
    request = Request(
        RequestId(f"r{number:02}"),
        Instant(at),
        num_prompt,
        max_tokens=num_output + slack,
        priority=priority,
        # Prompts of family 0 share nothing; of the others they agree as far as they go.
        block_hashes=tuple((family, block) for block in range(num_prompt // block_size)) if family else (),
    )
    return Job(request, num_output, None if leaves_after is None else Duration(leaves_after))


# --- playing ----------------------------------------------------------------------------------------------------------


def play(
    workload: Workload,
    policies: EnginePolicies,
    *,
    leap: bool = True,
    steady: bool = True,
    step_time: StepTimePredictor | None = None,
    start: Instant = Instant(0),
    swap: SwapRules | None = None,
) -> Played:
    """Play a workload, which begins at `start`, to its end through the instance machine with these policies.

    `leap` False takes every step by itself, `steady` False has the batch policy compose every step; the rows are the
    same. With `swap` whoever is preempted is swapped to host memory.
    Raises `LawBroken` at the first row after which a law of the machine does not hold, at the end if a request did not
    end exactly once with its true length or a block is still held, and when the policies go round in circles;
    `StarvationError` when nobody would ever be served again.
    """
    host = HostMemory(swap.host_blocks, reuse=swap.reuse) if swap else None
    machine = AuditedInstance(workload.limits, policies, steady=steady, host=host)
    watch = _Watch(machine, start, _num_rows_max(workload))
    loop = SimulationLoop(start, observers=[watch])
    truth = GroundTruth()
    spec = InstanceSpec(InstanceId("i0"), workload.limits)
    stack = StackConfig(swap=swap or UNSET)
    journeys, thinking = with_swap(stack, loop, machine, spec, _AtHome(), None)
    instance = SimulatedInstance(
        loop, spec, machine, step_time or Pace(), truth, watch, leap=leap, journeys=journeys, thinking=thinking
    )
    for job in workload.jobs:
        _schedule(loop, instance, truth, watch, job, start)
    loop.run()
    machine.check()
    for job in workload.jobs:
        _check_end(job, watch.ends.get(job.request.id), machine)
    statistics = machine.statistics()
    if statistics.num_free_blocks != workload.limits.num_blocks:
        num_held = workload.limits.num_blocks - statistics.num_free_blocks
        raise LawBroken(f"law 3: {num_held} blocks are held when everything has ended")
    return Played(watch.ends, watch.first_token_at, watch.rows, statistics)


class _AtHome:
    """Nobody moves to another instance."""

    def on_answer(self, instance: SimulatedInstance, command: InstanceCommand, now: Instant) -> None: ...
    def on_returned(self, instance_id: InstanceId, request_id: RequestId, at: Instant) -> None: ...


def check_same_again(workload: Workload, policies: Callable[[], EnginePolicies]) -> Played:
    """Play a workload step by step, with fresh policies again, and at another time; raise `LawBroken` where two
    part. Returns the first run."""
    played = play(workload, policies(), steady=False)
    check_same_rows(played, play(workload, policies(), steady=False))
    check_same_commands(played, play(workload, policies(), steady=False, start=SHIFT), "law 8: at another time")
    return played


def check_same_leaping(played: Played, workload: Workload, policies: Callable[[], EnginePolicies]) -> None:
    """Raise `LawBroken` where a run that asks only about changes, or also leaps, parts from the one of every step."""
    check_same_rows(played, play(workload, policies(), leap=False), "law 15: a run that asks only about changes")
    check_same_rows(played, play(workload, policies()), "law 15: a run that leaps over equal steps")


def check_same_rows(one: Played, other: Played, what: str = "law 8: a second run with fresh policies") -> None:
    """Raise `LawBroken` at the first thing that the machine was told or decided differently in two runs."""
    for left, right in zip(one.rows, other.rows, strict=False):
        if left != right:
            raise LawBroken(f"{what} parts from the first: {left} became {right}")
    if len(one.rows) != len(other.rows):
        raise LawBroken(f"{what} took {len(other.rows)} rows, not {len(one.rows)}")


def check_same_commands(one: Played, other: Played, what: str) -> None:
    """Raise `LawBroken` unless the machine gave the same commands in the same order in both."""
    for left, right in zip(one.rows, other.rows, strict=False):
        if left.commands != right.commands:
            raise LawBroken(f"{what}: {left} became {right}")


def check_requires(policy: Any) -> None:
    """Raise `LawBroken` unless `requires` is a frozenset of `Capability` values."""
    requires = policy.requires
    if not isinstance(requires, frozenset) or not all(isinstance(needed, Capability) for needed in requires):
        raise LawBroken(f"requires must be a frozenset of Capability values, not {requires!r}")


_facts = attrgetter(
    "id",
    "request",
    "priority",
    "tenant",
    "arrived_at",
    "admitted_seq",
    "queue_position",
    "num_tokens",
    "num_prompt_tokens",
    "num_computed_tokens",
    "num_preemptions",
)


def picture(view: EngineView) -> tuple[Any, ...]:
    """All that a policy can see, as a value: two pictures are equal unless something was written between them."""
    return (
        view.now,
        view.limits,
        view.num_free_blocks,
        [_facts(sequence) for sequence in view.running],
        [_facts(sequence) for sequence in view.waiting],
    )


def refuse_writing(before: tuple[Any, ...], view: EngineView, where: str) -> None:
    """Raise `LawBroken` (law 13) if what the view shows is no longer what it showed."""
    if picture(view) != before:
        raise LawBroken(f"law 13: {where} wrote to its view")


class _Watch:
    """The clients' side: hears first tokens and ends, and keeps the rows."""

    def __init__(self, machine: AuditedInstance, start: Instant, num_rows_max: int) -> None:
        self.rows: list[Row] = []
        self.ends: dict[RequestId, End] = {}
        self.first_token_at: dict[RequestId, Instant] = {}
        self._machine = machine
        self._start = start
        self._num_rows_max = num_rows_max

    def on_row(self, row: Row) -> None:
        self.rows.append(row)
        if len(self.rows) > self._num_rows_max:
            raise LawBroken(
                f"law 6: {len(self.rows)} rows and no end: {', '.join(self._machine.unfinished())} go round in circles"
            )

    def on_first_token(self, instance_id: InstanceId, request_id: RequestId, at: Instant) -> None:
        # A sequence that is preempted before its first token was never here before; after it, this is not called.
        if request_id in self.first_token_at:
            raise LawBroken(f"law 2: {request_id} got its first token twice")
        self.first_token_at[request_id] = Instant(at - self._start)

    def on_finished(
        self, instance_id: InstanceId, at: Instant, sequence: SequenceState, num_output_tokens: int
    ) -> None:
        self.end(sequence.request.id, "finished", at, num_output_tokens)

    def on_rejected(self, instance_id: InstanceId, request_id: RequestId, at: Instant, reason: str) -> None:
        if not reason:
            raise LawBroken(f"law 11: {request_id} was rejected without a reason")
        self.end(request_id, "rejected", at)

    def on_step(self, instance_id: InstanceId, at: Instant) -> None:
        pass

    def end(self, request_id: RequestId, how: str, at: Instant, num_output_tokens: int = 0) -> None:
        end = End(how, Instant(at - self._start), num_output_tokens)
        if request_id in self.ends:
            raise LawBroken(f"law 1: {request_id} ended as {self.ends[request_id]} and again as {end}")
        self.ends[request_id] = end


def _schedule(
    loop: SimulationLoop, instance: SimulatedInstance, truth: GroundTruth, watch: _Watch, job: Job, start: Instant
) -> None:
    request = job.request
    arrives_at = after(request.arrived_at, Duration(start))
    if start:
        request = _moved(request, arrives_at)

    def arrive(now: Instant) -> None:
        truth.add(request, job.num_output_tokens)
        instance.submit(request)

    def leave(now: Instant) -> None:
        if request.id not in watch.ends:
            watch.end(request.id, "aborted", now)
            instance.abort(request.id)

    loop.call_at(arrives_at, arrive, RANK_ARRIVAL)
    if job.leaves_after is not None:
        loop.call_at(after(arrives_at, job.leaves_after), leave, RANK_CLIENT_LEAVES)


def _moved(request: Request, arrived_at: Instant) -> Request:
    facts = {name: getattr(request, name) for name in request.__struct_fields__}
    return Request(**{**facts, "arrived_at": arrived_at})


def _num_rows_max(workload: Workload) -> int:
    num_output_tokens = sum(job.num_output_tokens for job in workload.jobs)
    longest = max(job.request.num_prompt_tokens + job.num_output_tokens for job in workload.jobs)
    return 100 + num_output_tokens * (2 + 2 * longest // min(workload.limits.max_num_batched_tokens, _CHUNK_MIN))


def _check_end(job: Job, end: End | None, machine: AuditedInstance) -> None:
    request, limits = job.request, machine.limits
    if end is None:
        raise LawBroken(f"law 1: {request.id} never ended")
    if end.how == "finished":
        longest = min(limits.max_model_len, limits.num_blocks * limits.block_size)
        owed = min(job.num_output_tokens, request.max_tokens, longest - request.num_prompt_tokens)
        given = machine.num_output_tokens[request.id]
        if not owed == given == end.num_output_tokens:
            raise LawBroken(f"law 2: {request.id} got {given} tokens by the commands, {end} in all; it has {owed}")


# --- clusters ---------------------------------------------------------------------------------------------------------


def seeded_arrivals(
    seed: int, num_requests: int, mean_gap: Duration, *, start: Instant = Instant(0), block_size: int = 4
) -> list[tuple[Request, int]]:
    """Requests with their true output lengths: bursts, three classes, two tenants, and prompts of three families that
    begin alike."""
    stream = RandomStreams(seed).stream("testing.arrivals")
    arrivals = []
    at = int(start)
    for number in range(num_requests):
        at += 0 if stream.random() < 0.3 else round(stream.exponential(mean_gap))
        num_prompt, num_output, family = stream.integers(1, 48), stream.integers(1, 40), stream.integers(0, 3)
        request = Request(
            RequestId(f"r{number:03}"),
            Instant(at),
            num_prompt,
            max_tokens=num_output + stream.integers(0, 10),
            priority=stream.integers(0, 3),
            tenant=TenantId(stream.choice(["a", "b"])),
            block_hashes=tuple((family, block) for block in range(num_prompt // block_size)) if family else (),
        )
        arrivals.append((request, num_output))
    return arrivals
