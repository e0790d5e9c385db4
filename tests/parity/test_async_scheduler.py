"""The asynchronous scheduler, as GPU builds use it: two steps in flight, tokens known one step late."""

from collections.abc import Mapping
from typing import Any

import pytest
from tests.parity.workloads import STEP_NS, Workload, random_workload

from rota.serving.engines.vllm.virtual import StepFacts, VirtualVllm
from rota.serving.policies.batch.vllm_default import VllmDefault
from rota.serving.policies.memory.recompute_lowest import RecomputeLowest
from rota.serving.policies.order.fcfs import Fcfs
from rota.serving.policies.order.strict_priority import StrictPriority
from rota.serving.stack import EnginePolicies

pytestmark = pytest.mark.slow


def run(workload: Workload, policies: Any) -> tuple[list[StepFacts], dict[str, int]]:
    """Keep two steps in flight, as vLLM's batch queue does; returns the decisions and each request's number of
    tokens."""
    engine = VirtualVllm(workload.limits, policies, async_scheduling=True)
    lengths: Mapping[str, int] = {request.id: request.num_output_tokens for request in workload.requests}
    made: dict[str, int] = {}
    facts: list[StepFacts] = []
    due = list(workload.requests)
    step = 0
    num_in_flight = 0
    while due or engine.num_unfinished or num_in_flight:
        if not engine.num_unfinished and not num_in_flight:
            step = max(step, due[0].arrives_before_step)
        while due and due[0].arrives_before_step <= step:
            request = due.pop(0)
            engine.add_request(request.id, request.prompt, request.max_tokens, request.priority, step * STEP_NS)
        if engine.num_unfinished:
            facts.append(engine.schedule(step * STEP_NS))
            num_in_flight += 1
        if num_in_flight == 2 or not engine.num_unfinished:
            for request_id in lengths:
                if (count := engine.num_output_tokens(request_id)) is not None:
                    made[request_id] = count
            for request_id in engine.update_lengths(lengths):
                made[request_id] += 1
            num_in_flight -= 1
        step += 1
        assert step < 50_000
    return facts, made


def test_fcfs_decides_as_stock_vllm_does() -> None:
    num_preempted = 0
    for seed in range(40):
        workload = random_workload(seed)
        stock, _ = run(workload, None)
        ours, made = run(workload, EnginePolicies(Fcfs(), VllmDefault(), RecomputeLowest()))
        for step, (left, right) in enumerate(zip(stock, ours, strict=True)):
            assert left == right, f"seed {seed}, step {step}\n stock  {left}\n plugin {right}"
        assert made == {request.id: request.num_output_tokens for request in workload.requests}
        num_preempted += sum(len(facts.preempted) for facts in stock)
    assert num_preempted > 40


def test_displacing_loses_and_doubles_no_token() -> None:
    num_preempted = 0
    for seed in range(40):
        workload = random_workload(seed)
        facts, made = run(workload, EnginePolicies(StrictPriority(), VllmDefault(), RecomputeLowest()))
        assert made == {request.id: request.num_output_tokens for request in workload.requests}, f"seed {seed}"
        num_preempted += sum(len(step.preempted) for step in facts)
    assert num_preempted > 100
