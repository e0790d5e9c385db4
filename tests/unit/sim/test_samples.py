"""Samples stay within their bound however long a run is, and go on to its end (law 12)."""

from itertools import pairwise

from rota.base.instant import Instant
from rota.serving.instance.machine import InstanceMachine
from rota.serving.model.instance import InstanceId, InstanceLimits
from rota.serving.policies.batch.vllm_default import VllmDefault
from rota.serving.policies.memory.recompute_lowest import RecomputeLowest
from rota.serving.policies.order.fcfs import Fcfs
from rota.serving.sim.samples import NUM_POINTS_MAX, Sampler

ID = InstanceId("i0")


def test_a_long_run_is_thinned_evenly():
    machine = InstanceMachine(
        InstanceLimits(num_blocks=10), order=Fcfs(), batch=VllmDefault(), memory=RecomputeLowest()
    )
    sampler = Sampler([ID])
    num_steps = 20 * NUM_POINTS_MAX
    for step in range(num_steps):
        sampler.on_step(ID, Instant(step * 1_000), machine)
        assert len(sampler.series[ID].at) <= NUM_POINTS_MAX
    at = sampler.series[ID].at
    assert len(at) == len(sampler.series[ID].waiting) == len(sampler.series[ID].free_blocks)
    assert list(at) == sorted(set(at))
    assert at[-1] > 0.99 * (num_steps - 1) * 1_000
    gaps = [later - earlier for earlier, later in pairwise(at)]
    assert max(gaps) < 5 * num_steps * 1_000 / len(at)


def test_a_short_run_is_kept_whole():
    machine = InstanceMachine(
        InstanceLimits(num_blocks=10), order=Fcfs(), batch=VllmDefault(), memory=RecomputeLowest()
    )
    sampler = Sampler([ID])
    for step in range(100):
        sampler.on_step(ID, Instant(step), machine)
    assert sampler.series[ID].at == list(range(100))
    assert set(sampler.series[ID].free_blocks) == {10}
