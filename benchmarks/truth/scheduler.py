"""Against vLLM's real scheduler, in decisions, at the scale of traces: the simulated world runs on our machines, and
stock vLLM is led through the same events. Both must decide every step alike. The same world without a follower, which
leaps over runs of equal steps, must come to the same end."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from benchmarks.truth.following import StockVllm
from benchmarks.truth.row import TruthRow, compared, data

from rota.serving.assemble import header_of
from rota.serving.predictors.step_time.profiles import load_profile
from rota.serving.sim.cluster import SimulatedCluster
from rota.serving.sim.run import SimulationConfig, arrival_flow, system_config
from rota.serving.stack import StackConfig

GROUP = "scheduler"
NUM_REQUESTS = 2_000
PROFILE = "llama-3.1-8b-a100"


@dataclass(frozen=True, slots=True)
class Case:
    """A trace, at a rate that fills the engines, with as many blocks as the card has or with fewer."""

    name: str
    trace: tuple[str, ...]
    num_blocks: int | None = None
    num_instances: int = 1
    rate: float | None = None
    speedup: float = 1.0


CASES = (
    Case("Azure, one engine", ("azure2023", "AzureLLMInferenceTrace_conv.csv"), rate=16.0),
    Case("Azure, few blocks", ("azure2023", "AzureLLMInferenceTrace_conv.csv"), num_blocks=2_600, rate=8.0),
    Case("Mooncake, four by prefix", ("mooncake", "conversation_trace.jsonl"), num_instances=4),
    Case("Mooncake, few blocks", ("mooncake", "conversation_trace.jsonl"), num_blocks=8_300, num_instances=4),
    Case("agents, few blocks", ("agents", "agent_calls.csv"), num_blocks=3_000, rate=1.0),
)


def rows(num_requests: int = NUM_REQUESTS) -> Iterator[TruthRow]:
    """All rows, of the first `num_requests` of each trace."""
    for case in CASES:
        yield from compare(case, num_requests)


def compare(case: Case, num_requests: int) -> Iterator[TruthRow]:
    """The rows of one case. Raises `DataError` if its trace is absent."""
    began = time.process_time()
    config = _config(case, num_requests)
    system = system_config(config)
    stock = StockVllm(header_of(system), system.instances)
    cluster = _played(config, stock)
    statistics = [machine.statistics() for machine in cluster.machines()]
    num_prompt_tokens = sum(one.num_prompt_tokens for one in statistics)
    hit_rate = sum(one.num_cached_tokens for one in statistics) / num_prompt_tokens
    yield compared(
        GROUP, case.name, "decided as stock vLLM does", "steps",
        truth=sum(one.num_steps for one in statistics), rota=stock.num_equal_steps, bound=0.0,
        note=stock.first_difference or f"{len(cluster.records):,} requests, up to {stock.num_waiting_max} waiting, "
        f"{hit_rate:.0%} of prompt tokens cached, at least {stock.num_free_blocks_min} blocks free, "
        f"{time.process_time() - began:.0f} CPU s",
    )  # fmt: skip
    yield compared(
        GROUP, case.name, "preemptions", "", truth=stock.num_preemptions,
        rota=sum(one.num_preemptions for one in statistics), bound=0.0,
    )  # fmt: skip
    leaping = {record.id: record for record in _played(config, None).records}
    num_equal = sum(leaping[record.id] == record for record in cluster.records)
    yield compared(
        GROUP, case.name, "alike where runs of steps are leapt over", "requests", truth=len(cluster.records),
        rota=num_equal, bound=0.0, note="nobody follows, so no step is told apart",
    )  # fmt: skip


def _played(config: SimulationConfig, stock: StockVllm | None) -> SimulatedCluster:
    flow = arrival_flow(config)
    predictor = load_profile(PROFILE).predictor()
    cluster = SimulatedCluster(system_config(config), flow, predictor, journal=stock, followers=flow.ended)
    cluster.run()
    return cluster


def _config(case: Case, num_requests: int) -> SimulationConfig:
    limits = load_profile(PROFILE).instance_limits()
    if case.num_blocks is not None:
        limits = msgspec.structs.replace(limits, num_blocks=case.num_blocks)
    return SimulationConfig(
        trace=Path(data("traces", *case.trace)),
        num_instances=case.num_instances,
        profile=PROFILE,
        stack=StackConfig(dispatch="prefix_then_load"),
        num_requests=num_requests,
        rate=case.rate,
        speedup=case.speedup,
        limits=limits,
    )
