"""Equal decisions: vLLM's stock scheduler, the same with our plug-in, and our own machine, step for step.

vLLM is the real object of the installed package under a virtual clock; nothing of it is imitated here.
"""

from collections.abc import Callable
from itertools import zip_longest

import pytest
from tests.parity.hosts import MachineHost, VllmHost
from tests.parity.workloads import Decision, Host, Workload, drive, random_workload

from rota.serving.api import BatchPolicy, OrderPolicy
from rota.serving.policies.batch.stall_free_chunks import StallFreeChunks
from rota.serving.policies.batch.vllm_default import VllmDefault
from rota.serving.policies.memory.recompute_cheapest import RecomputeCheapest
from rota.serving.policies.memory.recompute_last import RecomputeLast
from rota.serving.policies.memory.recompute_lowest import RecomputeLowest
from rota.serving.policies.order.earliest_deadline import EarliestDeadline
from rota.serving.policies.order.fair_prefix import FairPrefix
from rota.serving.policies.order.fair_tokens import FairTokens
from rota.serving.policies.order.fcfs import Fcfs
from rota.serving.policies.order.highest_response_ratio import HighestResponseRatio
from rota.serving.policies.order.least_attained_service import LeastAttainedService
from rota.serving.policies.order.shortest_predicted_first import ShortestPredictedFirst
from rota.serving.policies.order.skip_join_mlfq import SkipJoinMlfq
from rota.serving.policies.order.skip_predict import SkipPredict
from rota.serving.policies.order.strict_priority import StrictPriority
from rota.serving.predictors.length.declared import Declared
from rota.serving.predictors.length.history import History
from rota.serving.stack import EnginePolicies

pytestmark = pytest.mark.slow

NUM_SEEDS = 300
CHUNK = 50


def compare(workload: Workload, **hosts: Host) -> list[Decision]:
    """Drive all hosts through a workload side by side; fails at the first decision in which two differ."""
    names = list(hosts)
    decisions = []
    for step, row in enumerate(zip_longest(*(drive(workload, host) for host in hosts.values()))):
        for name, decision in zip(names[1:], row[1:], strict=True):
            if decision != row[0]:
                pytest.fail(
                    f"seed {workload.seed}, decision {step}, {workload.limits}\n"
                    f"  {names[0]}: {row[0]}\n  {name}: {decision}\n  before: {decisions[-1:]}"
                )
        decisions.append(row[0])
    return decisions


def seeds_of(chunk: int) -> range:
    return range(chunk * CHUNK, (chunk + 1) * CHUNK)


@pytest.mark.parametrize("chunk", range(NUM_SEEDS // CHUNK))
def test_fcfs_decides_as_stock_vllm_does(chunk: int) -> None:
    num_preempted = num_cached_tokens = num_queued = 0
    for seed in seeds_of(chunk):
        workload = random_workload(seed)
        stock = VllmHost(workload.limits)
        # `recompute_last` and `recompute_lowest` are two names for the same victim when the order is that of admission.
        memory = RecomputeLast if seed % 2 else RecomputeLowest
        decisions = compare(
            workload,
            stock=stock,
            plugin=VllmHost(workload.limits, EnginePolicies(Fcfs(), VllmDefault(), memory())),
            machine=MachineHost(workload.limits, EnginePolicies(Fcfs(), VllmDefault(), memory())),
        )
        num_preempted += sum(len(decision.preempted) for decision in decisions)
        num_cached_tokens += stock.num_cached_tokens
        num_queued += stock.num_waiting_max > 0
    # A pass without congestion would prove nothing.
    assert num_preempted > CHUNK
    assert num_cached_tokens > 1000 * CHUNK
    assert num_queued > 0.9 * CHUNK


STACKS: dict[str, Callable[[], EnginePolicies]] = {
    "fair_tokens": lambda: EnginePolicies(FairTokens(weights={"tenant-1": 2.0}), VllmDefault(), RecomputeLowest()),
    "fair_prefix": lambda: EnginePolicies(
        FairPrefix(quantum_tokens=200, weights={"tenant-1": 2.0}), VllmDefault(), RecomputeLowest()
    ),
    "earliest_deadline": lambda: EnginePolicies(EarliestDeadline(displace=True), VllmDefault(), RecomputeLowest()),
    "highest_response_ratio": lambda: EnginePolicies(
        HighestResponseRatio(lengths=History(num_least=2)), VllmDefault(), RecomputeLowest()
    ),
    "least_attained_service": lambda: EnginePolicies(
        LeastAttainedService(quantum_tokens=16), VllmDefault(), RecomputeLowest()
    ),
    "shortest_predicted_first": lambda: EnginePolicies(
        ShortestPredictedFirst(lengths=History(num_least=2), starvation_steps=40), VllmDefault(), RecomputeLowest()
    ),
    "skip_join_mlfq": lambda: EnginePolicies(
        SkipJoinMlfq(sweep_steps=20, starvation_seconds=0.5), VllmDefault(), RecomputeLowest()
    ),
    "skip_predict": lambda: EnginePolicies(
        SkipPredict(lengths=History(num_least=2), quick_lengths=Declared()), VllmDefault(), RecomputeLowest()
    ),
    "strict_priority": lambda: EnginePolicies(StrictPriority(), VllmDefault(), RecomputeLowest()),
    "strict_priority, ageing": lambda: EnginePolicies(
        StrictPriority(ageing_seconds=0.3), VllmDefault(), RecomputeLowest()
    ),
    "strict_priority, stall_free_chunks": lambda: EnginePolicies(
        StrictPriority(), StallFreeChunks(chunk_size=48), RecomputeLowest()
    ),
    "fcfs, stall_free_chunks": lambda: EnginePolicies(Fcfs(), StallFreeChunks(chunk_size=32), RecomputeLowest()),
}


@pytest.mark.parametrize("stack", STACKS)
def test_the_plugin_decides_as_the_machine_does(stack: str) -> None:
    num_preempted = num_differing = 0
    seeds = seeds_of(0)[: None if stack.startswith(("fair", "fcfs", "strict")) else 8]
    for seed in seeds:
        workload = random_workload(seed)
        decisions = compare(
            workload,
            plugin=VllmHost(workload.limits, STACKS[stack]()),
            machine=MachineHost(workload.limits, STACKS[stack]()),
        )
        num_preempted += sum(len(decision.preempted) for decision in decisions)
        num_differing += decisions != list(drive(workload, VllmHost(workload.limits)))
    assert num_preempted > len(seeds)
    # The policy made a difference, so that agreeing says something.
    assert num_differing > len(seeds) // 2


@pytest.mark.parametrize(
    ("order", "batch"), [(Fcfs, VllmDefault), (StrictPriority, lambda: StallFreeChunks(chunk_size=48))]
)
def test_victims_are_chosen_alike(order: Callable[[], OrderPolicy], batch: Callable[[], BatchPolicy]) -> None:
    """The plug-in chooses ahead of vLLM's pass, which must then preempt nobody by itself."""
    num_differing = 0
    for seed in range(8):
        workload = random_workload(seed)
        chosen = [EnginePolicies(order(), batch(), RecomputeCheapest(preempted_at_most=2)) for _ in range(2)]
        decisions = compare(
            workload,
            plugin=VllmHost(workload.limits, chosen[0]),
            machine=MachineHost(workload.limits, chosen[1]),
        )
        at_the_end = VllmHost(workload.limits, EnginePolicies(order(), batch(), RecomputeLowest()))
        num_differing += decisions != list(drive(workload, at_the_end))
    assert num_differing >= 2
