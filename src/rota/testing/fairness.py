"""How fairly an order policy serves tenants: the service that two of them get while both wait, measured."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from rota.base.config import parse_toml
from rota.base.errors import LawBroken
from rota.base.instant import Duration, Instant
from rota.base.journal import read_journal
from rota.base.random_streams import RandomStreams
from rota.base.replay import replay
from rota.serving.api import BatchShape, OrderPolicy, RequestId, TenantId
from rota.serving.engines.vllm.hosting import VLLM_CAPABILITIES
from rota.serving.engines.vllm.recorder import MACHINE
from rota.serving.engines.vllm.replay import ROW_TYPES, fresh_machine, stack_of
from rota.serving.model.events import SequenceArrived
from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import Request
from rota.serving.policies.batch.vllm_default import VllmDefault
from rota.serving.policies.memory.recompute_last import RecomputeLast
from rota.serving.stack import EnginePolicies, StackConfig, engine_policies
from rota.testing.worlds import Job, Workload, play

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0


@dataclass(frozen=True, slots=True)
class Service:
    """What counts as served: a prompt token, an output token, and whether prompt tokens found in the cache count."""

    per_prompt_token: float
    per_output_token: float
    is_cached_free: bool


SERVED = Service(PROMPT_WEIGHT, OUTPUT_WEIGHT, is_cached_free=False)
COMPUTED = Service(1.0, 1.0, is_cached_free=True)
"""What deficit longest prefix match charges."""


@dataclass(frozen=True, slots=True)
class Gap:
    """The widest that the services of two tenants drifted apart while both had requests waiting."""

    service: float
    """In charged tokens, by weight."""
    num_steps: int
    """Of the interval in which that was."""
    tenants: tuple[TenantId, TenantId] | None


def service_bound(workload: Workload) -> float:
    """What virtual token counters promise of two tenants with requests waiting all through an interval: twice the
    larger of what one admission charges and of what all that run may yet be charged (VTC, Sheng et al., OSDI 2024,
    theorem 4.4; the first output token is charged with the prompt here)."""
    return _bound(workload.limits, max(job.request.num_prompt_tokens for job in workload.jobs))


def _bound(limits: InstanceLimits, longest_prompt: int) -> float:
    num_slots = limits.num_blocks * limits.block_size
    return 2 * max(PROMPT_WEIGHT * longest_prompt + OUTPUT_WEIGHT, OUTPUT_WEIGHT * num_slots)


def credit_bound(workload: Workload, quantum_tokens: float) -> float:
    """What deficit longest prefix match promises of two tenants with requests waiting all through an interval. Each is
    given the same in it, has at most a quantum left at any time, and owes at most what was charged after its credit was
    spent: a prompt, and the output of those that run (2(U + Q) in Cao et al., 2025, U being the latter)."""
    longest = max(job.request.num_prompt_tokens for job in workload.jobs)
    return credit_bound_of(workload.limits, longest, quantum_tokens)


def credit_bound_of(
    limits: InstanceLimits, longest_prompt: int, quantum_tokens: float, *, least_weight: float = 1.0
) -> float:
    """`credit_bound` of an engine with these settings, for two tenants whose smaller weight is `least_weight`."""
    num_slots = limits.num_blocks * limits.block_size
    owed = COMPUTED.per_prompt_token * longest_prompt + COMPUTED.per_output_token * num_slots
    return 2 * (quantum_tokens + owed / least_weight)


def check_fair_prefix(factory: Callable[[], OrderPolicy], *, quantum_tokens: float, num_workloads: int = 60) -> float:
    """Prove on random overloads with shared prefixes that no two tenants drift further apart in what is computed for
    them than `credit_bound` of that quantum; raises `LawBroken` with the first workload in which they do. Returns the
    largest share of the bound that was seen."""
    largest = 0.0
    for seed in range(num_workloads):
        workload = overload_with_prefixes(seed)
        gap, bound = widest_gap(workload, factory(), service=COMPUTED), credit_bound(workload, quantum_tokens)
        largest = max(largest, _share(seed, gap, bound))
    return largest


def check_fair_service(factory: Callable[[], OrderPolicy], *, num_workloads: int = 60) -> float:
    """Prove on random overloads that no two tenants of one class drift further apart than `service_bound`; raises
    `LawBroken` with the first workload in which they do. Returns the largest share of the bound that was seen.

    What is served is counted here, from the grants of each step, and not asked of the policy.
    """
    largest = 0.0
    for seed in range(num_workloads):
        workload = overload(seed)
        gap, bound = widest_gap(workload, factory()), service_bound(workload)
        largest = max(largest, _share(seed, gap, bound))
    return largest


def _share(seed: int, gap: Gap, bound: float) -> float:
    if gap.service > bound:
        raise LawBroken(
            f"law 16: overload {seed}: {gap.tenants} drifted {gap.service:g} tokens apart in {gap.num_steps} "
            f"steps in which both waited, and at most {bound:g} were promised"
        )
    return gap.service / bound


def widest_gap(
    workload: Workload, order: OrderPolicy, weights: Mapping[str, float] | None = None, service: Service = SERVED
) -> Gap:
    """Play a workload, and measure over each longest interval in which two tenants of a class both had requests left in
    the queue after every step, by how much the difference of their services varied."""
    account = Account(weights or {}, service)
    play(workload, EnginePolicies(order, Counting(VllmDefault(), account), RecomputeLast()), steady=False)
    return account.widest()


def live_gap(journal_path: str | Path, *, quantum_tokens: float | None = None) -> tuple[Gap, float]:
    """The widest gap between two tenants of a live vLLM with our plug-in, and the bound for its blocks and prompts:
    that of `service_bound`, or, with a quantum, that of `credit_bound`, each for what is charged there.

    Its journal is fed into a fresh machine, which must order the very steps that the engine ran; raises `LawBroken` if
    it does not, `DataError` for a journal that is not of such an engine. What is counted is what each of these steps
    granted.
    """
    journal = read_journal(journal_path, ROW_TYPES)
    stack = parse_toml(stack_of(journal.header), StackConfig, f"{journal_path}: stack")
    policies = engine_policies(stack, VLLM_CAPABILITIES, "vLLM")
    account = Account({}, SERVED if quantum_tokens is None else COMPUTED)
    counted = EnginePolicies(policies.order, Counting(policies.batch, account), policies.memory)
    machine = fresh_machine(journal.header, counted, steady=False)
    rows = list(journal)
    difference = replay(rows, {MACHINE: machine})
    if difference is not None:
        raise LawBroken(f"law 10: {journal_path}: {difference}")
    longest = max(row.event.request.num_prompt_tokens for row in rows if isinstance(row.event, SequenceArrived))
    if quantum_tokens is None:
        return account.widest(), _bound(machine.limits, longest)
    return account.widest(), credit_bound_of(machine.limits, longest, quantum_tokens)


def overload(seed: int, *, num_tenants: int = 4, num_jobs: int = 120) -> Workload:
    """Tenants who send more than an engine can do, each in its own way: floods, bursts with pauses, a trickle; long
    prompts or long answers. Clients leave, and little room forces preemption."""
    stream = RandomStreams(seed).stream("testing.overload")
    limits = InstanceLimits(num_blocks=stream.integers(13, 28), block_size=4, max_num_seqs=6, max_num_batched_tokens=24)
    kinds = [
        (stream.integers(1, 25), stream.integers(1, 25), stream.integers(1, 20), 10 ** stream.integers(4, 8))
        for _ in range(num_tenants)
    ]
    at = [0] * num_tenants
    jobs = []
    for number in range(num_jobs):
        tenant = stream.integers(0, num_tenants)
        longest_prompt, longest_output, burst, pause = kinds[tenant]
        if number % burst == 0:
            at[tenant] += round(stream.exponential(pause))
        request = Request(
            RequestId(f"r{number:03}"),
            Instant(at[tenant]),
            stream.integers(1, longest_prompt + 1),
            max_tokens=longest_output + 3,
            tenant=TenantId(f"tenant-{tenant}"),
        )
        leaves_after = Duration(stream.integers(0, 60_000_000)) if stream.random() < 0.05 else None
        jobs.append(Job(request, stream.integers(1, longest_output + 1), leaves_after))
    return Workload(limits, tuple(sorted(jobs, key=lambda job: (job.request.arrived_at, job.request.id))))


def overload_with_prefixes(seed: int, *, share: float = 0.8, num_jobs: int = 120) -> Workload:
    """As `overload`; that `share` of each tenant's prompts begins like one of its two documents, as far as it goes."""
    workload = overload(seed, num_jobs=num_jobs)
    stream = RandomStreams(seed).stream("testing.prefixes")
    jobs = []
    for job in workload.jobs:
        request = job.request
        document = (request.tenant, stream.integers(0, 2) if stream.random() < share else request.id)
        num_blocks = request.num_prompt_tokens // workload.limits.block_size
        hashes = tuple((document, block) for block in range(num_blocks))
        jobs.append(replace(job, request=msgspec.structs.replace(request, block_hashes=hashes)))
    return replace(workload, jobs=tuple(jobs))


class Counting:
    """A batch policy that tells an account of every pass."""

    def __init__(self, inner: Any, account: "Account", place: int = 0) -> None:
        """`inner` is the batch policy that plans, `place` the number of the engine."""
        self._inner = inner
        self.requires = inner.requires
        self.shape: BatchShape | None = inner.shape
        self._account = account
        self._place = place

    def plan(self, draft: Any, order: OrderPolicy) -> None:
        self._inner.plan(draft, order)
        admitted = {sequence.id for sequence in draft.grants}
        left = [each for each in draft.view.waiting if each.id not in admitted]
        self._account.step(draft.grants, left, self._place)


class Account:
    """What each tenant was served, and since when each pair has been waiting."""

    def __init__(self, weights: Mapping[str, float], counted: Service, *, num_places: int = 1) -> None:
        """A tenant counts as waiting while it waits at no fewer than `num_places` engines."""
        self._weights = weights
        self._num_places = num_places
        self._waiting: dict[int, set[TenantId]] = {}
        """Who was left waiting at each engine after its last step."""
        self._counted = counted
        self._served: dict[TenantId, float] = {}
        self._num_outputs: dict[RequestId, int] = {}
        self._intervals: dict[tuple[TenantId, TenantId], tuple[float, float, int]] = {}
        """Of each pair that waits: the least and the largest difference so far, and the steps."""
        self._widest = Gap(0.0, 0, None)

    def step(self, grants: Sequence[Any], left: Sequence[Any], place: int = 0) -> None:
        self._waiting[place] = {each.tenant for each in left}
        places = Counter(tenant for tenants in self._waiting.values() for tenant in tenants)
        waiting = sorted(tenant for tenant, num_places in places.items() if num_places >= self._num_places)
        pairs = [(one, other) for index, one in enumerate(waiting) for other in waiting[index + 1 :]]
        for sequence in grants:
            self._serve(sequence)
        going_on = {}
        for pair in pairs:
            difference = self._difference(pair)
            # Of the step in which both are left waiting for the first time only what comes after it counts.
            least, most, num_steps = self._intervals.get(pair, (difference, difference, 0))
            least, most = min(least, difference), max(most, difference)
            going_on[pair] = (least, most, num_steps + 1)
            if most - least > self._widest.service:
                self._widest = Gap(most - least, num_steps + 1, pair)
        self._intervals = going_on

    def widest(self) -> Gap:
        return self._widest

    def _difference(self, pair: tuple[TenantId, TenantId]) -> float:
        return self._served.get(pair[0], 0.0) - self._served.get(pair[1], 0.0)

    def _serve(self, sequence: Any) -> None:
        service, counted = 0.0, self._counted
        if sequence.id not in self._num_outputs:
            self._num_outputs[sequence.id] = 0
            num_free = sequence.num_computed_tokens if counted.is_cached_free else 0
            service += counted.per_prompt_token * (sequence.num_prompt_tokens - num_free)
        num_outputs = sequence.num_tokens - sequence.num_prompt_tokens
        if sequence.num_computed_tokens + sequence.granted == sequence.num_tokens:
            num_outputs += 1
        service += counted.per_output_token * max(0, num_outputs - self._num_outputs[sequence.id])
        self._num_outputs[sequence.id] = max(num_outputs, self._num_outputs[sequence.id])
        weight = self._weights.get(sequence.tenant, 1.0)
        self._served[sequence.tenant] = self._served.get(sequence.tenant, 0.0) + service / weight
