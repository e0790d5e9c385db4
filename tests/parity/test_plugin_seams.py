"""The plug-in on vLLM's real scheduler, where vLLM or a policy does something out of the ordinary."""

from typing import Any

import pytest
from tests.parity.hosts import VllmHost
from tests.parity.test_equal_decisions import compare
from tests.parity.workloads import random_workload

from rota.base.errors import CapabilityError, ConfigError, PolicyError
from rota.serving.api import EngineView, OnRefusal, Pool, Refusal, SequenceView
from rota.serving.engines.vllm import seams
from rota.serving.engines.vllm.plugin import read_config
from rota.serving.engines.vllm.virtual import VirtualVllm
from rota.serving.model.instance import InstanceLimits
from rota.serving.policies.batch.prefill_first import PrefillFirst
from rota.serving.policies.batch.vllm_default import VllmDefault
from rota.serving.policies.memory.recompute_lowest import RecomputeLowest
from rota.serving.policies.order.fcfs import Fcfs, InOrder
from rota.serving.policies.order.strict_priority import StrictPriority
from rota.serving.stack import EnginePolicies

LIMITS = InstanceLimits(num_blocks=8, block_size=16, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=256)


def engine(order: Any, limits: InstanceLimits = LIMITS) -> VirtualVllm:
    return VirtualVllm(limits, EnginePolicies(order, VllmDefault(), RecomputeLowest()))


def block_some(host: VllmHost) -> VllmHost:
    """Have vLLM find some waiting requests not ready, as while a grammar compiles, by id and step."""
    scheduler = host.engine.scheduler
    original = scheduler._handle_blocked_waiting_request

    def is_ready(request: Any) -> bool:
        blocked = scheduler.running and (int(request.request_id[1:]) * 7 + scheduler.current_step) % 3 == 0
        return not blocked and original(request)

    scheduler._handle_blocked_waiting_request = is_ready
    return host


@pytest.mark.slow
def test_requests_that_vllm_is_not_ready_for_are_passed_over_as_in_stock_vllm() -> None:
    for seed in range(30):
        workload = random_workload(seed)
        policies = EnginePolicies(Fcfs(), VllmDefault(), RecomputeLowest())
        decisions = compare(
            workload,
            stock=block_some(VllmHost(workload.limits)),
            plugin=block_some(VllmHost(workload.limits, policies)),
        )
        assert decisions


def test_a_waiting_request_of_a_higher_class_displaces_a_lower_one_and_never_an_equal() -> None:
    host = engine(StrictPriority(), InstanceLimits(num_blocks=40, max_num_seqs=2, max_num_batched_tokens=64))
    for name, priority in (("low-1", 2), ("low-2", 2)):
        host.add_request(name, range(20), 50, priority)
    host.step()
    host.add_request("equal", range(20), 50, 2)
    assert host.step().preempted == ()
    host.add_request("high", range(100, 120), 3, 0)
    facts = host.step()
    assert facts.preempted == ("low-2",)
    assert "high" in dict(facts.grants)
    assert facts.waiting == ("low-2", "equal")


class Skips(InOrder):
    def refused(self, sequence: SequenceView, why: Refusal) -> OnRefusal:
        return OnRefusal.SKIP


class GoesOn(Fcfs):
    """Wants what vLLM cannot do, and did not say so."""

    def open(self, view: EngineView, pool: Pool) -> InOrder:
        return Skips(iter(view.running if pool is Pool.RUNNING else view.waiting))


class Twice(Fcfs):
    def open(self, view: EngineView, pool: Pool) -> InOrder:
        return InOrder(iter(list(view.running if pool is Pool.RUNNING else view.waiting) * 2))


def test_a_policy_that_would_go_on_past_a_refusal_is_caught() -> None:
    host = engine(GoesOn())
    host.add_request("fits", range(60), 10)
    host.add_request("does-not", range(100, 190), 10)
    with pytest.raises(PolicyError, match="does-not"):
        host.step()
        host.step()


def test_a_walk_that_gives_a_sequence_twice_is_caught() -> None:
    host = engine(Twice())
    host.add_request("a", range(20), 10)
    with pytest.raises(PolicyError, match="does not wait here"):
        host.step()


def test_a_stack_that_vllm_cannot_host_is_refused_when_the_engine_starts() -> None:
    with pytest.raises(CapabilityError, match="PrefillFirst"):
        VirtualVllm(LIMITS, EnginePolicies(Fcfs(), PrefillFirst(), RecomputeLowest()))


def test_the_installed_vllm_has_every_seam() -> None:
    seams.check_seams.__wrapped__()


@pytest.mark.parametrize("name", ["_preempt_request", "_reserve_prefill_lookahead", "finish_requests"])
def test_a_vllm_with_another_signature_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    monkeypatch.setattr(Scheduler, name, lambda self, other: None)
    with pytest.raises(CapabilityError, match=name):
        seams.check_seams.__wrapped__()


def test_a_vllm_whose_pass_was_rewritten_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    def schedule(self: Any, throttle_prefills: bool = False) -> None: ...

    monkeypatch.setattr(Scheduler, "schedule", schedule)
    with pytest.raises(CapabilityError, match="max_num_scheduled_tokens"):
        seams.check_seams.__wrapped__()


def test_another_version_is_refused_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    with pytest.raises(CapabilityError, match=r"0\.33\.1"):
        seams.check_seams.__wrapped__()


@pytest.mark.parametrize("config", [{"stak": "x"}, {"stack": 7}, {"facts": ["a"]}])
def test_the_plugins_config_is_checked(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="rota"):
        read_config({"rota": config})
