"""Leaping over equal steps equals taking them one by one: to the nanosecond, for every stack, with faults and
reports."""

from itertools import product

import pytest

from rota.base.instant import Duration, milliseconds
from rota.base.journal import Journal
from rota.base.random_streams import RandomStreams
from rota.serving.assemble import SystemConfig, header_of
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.sim.cluster import SimulatedCluster, WorldOptions
from rota.serving.sim.instance import SimulatedInstance
from rota.serving.stack import Parameters, StackConfig
from rota.testing.faults import cluster_faults
from rota.testing.worlds import Pace, seeded_arrivals

LIMITS = InstanceLimits(num_blocks=30, block_size=4, max_num_seqs=5, max_num_batched_tokens=32)
NUM_REQUESTS = 40
AGEING = {"ageing_seconds": 0.01}
ORDERS = {
    "fcfs": ("fcfs", {}),
    "strict_priority": ("strict_priority", {}),
    "ageing": ("strict_priority", AGEING),
}
BATCHES = ("vllm_default", "stall_free_chunks", "prefill_first")
MEMORIES = ("recompute_last", "recompute_lowest")
WORLDS = {
    "reports": WorldOptions(report_interval=milliseconds(7), report_delay=milliseconds(2)),
    "overhead, no reports": WorldOptions(report_interval=Duration(0), step_overhead=Duration(123_457)),
}


def play(stack, seed, options, *, is_leaping):
    instance_ids = [InstanceId("i0"), InstanceId("i1")]
    config = SystemConfig(
        stack=stack,
        instances=tuple(InstanceSpec(instance_id, LIMITS) for instance_id in instance_ids),
        is_leaping=is_leaping,
    )
    # Gaps so long that batches of decodes alone form between bursts, and bursts so large that they preempt.
    gap = milliseconds(12)
    arrivals = seeded_arrivals(seed, NUM_REQUESTS, gap)
    faults = cluster_faults(
        RandomStreams(seed).stream("faults"),
        instance_ids,
        [request.id for request, _ in arrivals],
        Duration(NUM_REQUESTS * gap),
    )
    journal = Journal(header_of(config), keep_rows=True)
    cluster = SimulatedCluster(config, arrivals, Pace(), options, journal=journal, faults=faults)
    cluster.run()
    return cluster, journal


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("order", "batch", "memory"), list(product(ORDERS, BATCHES, MEMORIES)))
def test_a_leap_is_as_good_as_its_steps(order, batch, memory, world):
    name, parameters = ORDERS[order]
    stack = StackConfig(order=name, batch=batch, memory=memory, parameters=Parameters(order=parameters))
    num_preempted = num_saved = 0
    for seed in range(3):
        leaping, few = play(stack, seed, WORLDS[world], is_leaping=True)
        stepping, many = play(stack, seed, WORLDS[world], is_leaping=False)
        assert leaping.records == stepping.records
        statistics = [machine.statistics() for machine in leaping.machines()]
        assert statistics == [machine.statistics() for machine in stepping.machines()]
        num_preempted += sum(each.num_preemptions for each in statistics)
        num_saved += many.num_rows - few.num_rows
    assert num_preempted > 10, "no congestion, no proof"
    # Ageing is asked for every step, so that there is nothing to leap over.
    assert (num_saved > 100) == (order != "ageing")


def num_differing(stack):
    worlds = []
    for seed in range(4):
        leaping, _ = play(stack, seed, WORLDS["reports"], is_leaping=True)
        stepping, _ = play(stack, seed, WORLDS["reports"], is_leaping=False)
        worlds.append(leaping.records != stepping.records)
    return sum(worlds)


def test_the_gate_catches_a_policy_that_counts_its_steps():
    assert num_differing(StackConfig(order="tests.gates.leaks:CountsWhatItGrants")) == 4


def test_the_gate_catches_an_engine_that_times_a_run_by_its_first_step(monkeypatch):
    def all_alike(step_time, num_decodes, decode_kv_tokens, num_steps):
        return [
            step_time.step_time(prefills=(), num_decodes=num_decodes, decode_kv_tokens=decode_kv_tokens)
        ] * num_steps

    monkeypatch.setattr("rota.serving.sim.instance.decode_run", all_alike)
    assert num_differing(StackConfig()) == 4


def test_the_gate_catches_an_engine_that_forgets_when_its_step_began(monkeypatch):
    start = SimulatedInstance._start

    def begin_again(self, command, now):
        self._resume_at = now if self._resume_at is not None else None
        start(self, command, now)

    monkeypatch.setattr(SimulatedInstance, "_start", begin_again)
    assert num_differing(StackConfig()) == 4
