"""Leaping over equal steps equals taking them one by one: to the nanosecond, for every stack, with faults and
reports, and row by row where a journal is kept."""

from dataclasses import replace
from itertools import product

import pytest

from rota.base.instant import Duration, milliseconds
from rota.base.journal import Journal
from rota.base.random_streams import RandomStreams
from rota.serving.assemble import SystemConfig, header_of
from rota.serving.instance.decodes import DecodeGroup
from rota.serving.instance.machine import InstanceMachine
from rota.serving.instance.steady import SteadyPass
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


def play(stack, seed, options, *, leap, keeps_journal=True):
    instance_ids = [InstanceId("i0"), InstanceId("i1")]
    config = SystemConfig(
        stack=stack,
        instances=tuple(InstanceSpec(instance_id, LIMITS) for instance_id in instance_ids),
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
    journal = Journal(header_of(config), keep_rows=True) if keeps_journal else None
    options = replace(options, leap=leap)
    cluster = SimulatedCluster(config, arrivals, Pace(), options, journal=journal, faults=faults)
    cluster.run()
    return cluster, journal


@pytest.fixture
def leaps(monkeypatch):
    """The lengths of all leaps that are taken."""
    taken = []
    leap = InstanceMachine.leap

    def counted(self, num_steps, now):
        taken.append(num_steps)
        return leap(self, num_steps, now)

    monkeypatch.setattr(InstanceMachine, "leap", counted)
    return taken


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("order", "batch", "memory"), list(product(ORDERS, BATCHES, MEMORIES)))
def test_a_leap_is_as_good_as_its_steps(order, batch, memory, world, leaps):
    name, parameters = ORDERS[order]
    stack = StackConfig(order=name, batch=batch, memory=memory, parameters=Parameters(order=parameters))
    num_preempted = 0
    for seed in range(3):
        leaping, journal = play(stack, seed, WORLDS[world], leap=True)
        silent, _ = play(stack, seed, WORLDS[world], leap=True, keeps_journal=False)
        num_leaps = len(leaps)
        stepping, other = play(stack, seed, WORLDS[world], leap=False)
        assert len(leaps) == num_leaps
        for left, right in zip(journal.rows, other.rows, strict=False):
            assert left == right
        assert journal.digest == other.digest
        assert leaping.records == stepping.records == silent.records
        statistics = [machine.statistics() for machine in leaping.machines()]
        assert statistics == [machine.statistics() for machine in stepping.machines()]
        assert statistics == [machine.statistics() for machine in silent.machines()]
        num_preempted += sum(each.num_preemptions for each in statistics)
    assert num_preempted > 10, "no congestion, no proof"
    # Ageing is asked for every step, so that there is nothing to leap over.
    assert (sum(leaps) > 100) == (order != "ageing")


def num_differing(stack):
    worlds = []
    for seed in range(4):
        _, leaping = play(stack, seed, WORLDS["reports"], leap=True)
        _, stepping = play(stack, seed, WORLDS["reports"], leap=False)
        worlds.append(leaping.digest != stepping.digest)
    return sum(worlds)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("order", ORDERS)
def test_the_steady_pass_plans_what_the_policy_would_compose(order, batch, monkeypatch):
    name, parameters = ORDERS[order]
    stack = StackConfig(order=name, batch=batch, parameters=Parameters(order=parameters))
    for seed in range(3):
        _, steady = play(stack, seed, WORLDS["reports"], leap=True)
        with monkeypatch.context() as patch:
            patch.setattr(SteadyPass, "of", lambda *arguments: None)
            _, composed = play(stack, seed, WORLDS["reports"], leap=True)
        for left, right in zip(steady.rows, composed.rows, strict=True):
            assert left == right


def test_the_gate_catches_a_policy_that_counts_its_steps(monkeypatch):
    stack = StackConfig(order="tests.gates.leaks:CountsWhatItGrants")
    _, steady = play(stack, 0, WORLDS["reports"], leap=True)
    monkeypatch.setattr(SteadyPass, "of", lambda *arguments: None)
    _, composed = play(stack, 0, WORLDS["reports"], leap=True)
    assert steady.digest != composed.digest


def test_the_gate_catches_an_engine_that_times_a_run_by_its_first_step(monkeypatch):
    def all_alike(step_time, num_decodes, decode_kv_tokens, num_steps):
        return [
            step_time.step_time(prefills=(), num_decodes=num_decodes, decode_kv_tokens=decode_kv_tokens)
        ] * num_steps

    monkeypatch.setattr("rota.serving.sim.instance.decode_run", all_alike)
    assert num_differing(StackConfig()) == 4


def test_the_gate_catches_an_engine_that_forgets_what_was_leapt_over(monkeypatch):
    leap = SimulatedInstance._leap

    def one_short(self, flight, num_ended):
        leap(self, flight, max(num_ended - 1, flight.num_ended))

    monkeypatch.setattr(SimulatedInstance, "_leap", one_short)
    assert num_differing(StackConfig()) == 4


def test_the_gate_catches_a_machine_that_leaps_over_a_block(monkeypatch):
    leap = DecodeGroup.leap
    monkeypatch.setattr(DecodeGroup, "leap", lambda self, num_steps: leap(self, num_steps) and 0)
    assert num_differing(StackConfig()) == 4
