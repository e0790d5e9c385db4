"""What vLLM can be told exactly is hosted; everything else is refused, and the message says why."""

from pathlib import Path

import pytest

from rota.base.errors import CapabilityError, ConfigError
from rota.serving.api import BatchShape, Capability, InstanceLimits
from rota.serving.engines.vllm.hosting import VLLM_CAPABILITIES, check_hostable
from rota.serving.engines.vllm.seams import check_version
from rota.serving.engines.vllm.server import VllmServer
from rota.serving.policies.batch.prefill_first import PrefillFirst
from rota.serving.policies.batch.stall_free_chunks import StallFreeChunks
from rota.serving.policies.batch.vllm_default import VllmDefault
from rota.serving.policies.memory.recompute_cheapest import RecomputeCheapest
from rota.serving.policies.memory.recompute_last import RecomputeLast
from rota.serving.policies.memory.recompute_lowest import RecomputeLowest
from rota.serving.policies.order.fcfs import Fcfs
from rota.serving.policies.order.strict_priority import StrictPriority

LIMITS = InstanceLimits(num_blocks=100)
CHUNKED = InstanceLimits(num_blocks=100, long_prefill_token_threshold=64)


class Skipping(Fcfs):
    requires = frozenset({Capability.SKIP_REFUSED})


class Free(VllmDefault):
    shape = None  # type: ignore[assignment]


class Empty(VllmDefault):
    shape = BatchShape(token_budget=0)


@pytest.mark.parametrize("order", [Fcfs(), StrictPriority(), StrictPriority(ageing_seconds=1.0)])
@pytest.mark.parametrize("batch", [VllmDefault(), StallFreeChunks(chunk_size=64)])
@pytest.mark.parametrize("limits", [LIMITS, CHUNKED])
def test_hosts_every_order_and_budget_with_the_victim_at_the_end_of_the_line(order, batch, limits) -> None:
    assert check_hostable(order, batch, RecomputeLowest(), limits) == batch.shape


def test_hosts_victims_that_are_chosen_ahead_of_its_pass() -> None:
    assert check_hostable(StrictPriority(), VllmDefault(), RecomputeCheapest(), CHUNKED) == VllmDefault.shape


def test_hosts_the_last_admitted_as_victim_where_it_is_the_end_of_the_line() -> None:
    check_hostable(Fcfs(), VllmDefault(), RecomputeLast(), CHUNKED)
    check_hostable(Fcfs(), StallFreeChunks(), RecomputeLast(), LIMITS)


@pytest.mark.parametrize(
    ("order", "batch", "memory", "limits", "words"),
    [
        (Fcfs(), PrefillFirst(), RecomputeLowest(), LIMITS, ("PrefillFirst", "admit_before_running")),
        (Skipping(), VllmDefault(), RecomputeLowest(), LIMITS, ("Skipping", "skip_refused")),
        (Fcfs(), Free(), RecomputeLowest(), LIMITS, ("Free", "composes batches freely")),
        (Fcfs(), Empty(), RecomputeLowest(), LIMITS, ("Empty", "0 tokens")),
        (StrictPriority(), VllmDefault(), RecomputeLast(), LIMITS, ("RecomputeLast", "StrictPriority")),
        (Fcfs(), StallFreeChunks(), RecomputeLast(), CHUNKED, ("RecomputeLast", "long_prefill_token_threshold")),
    ],
)
def test_refuses_what_it_could_only_approximate(order, batch, memory, limits, words) -> None:
    with pytest.raises(CapabilityError) as caught:
        check_hostable(order, batch, memory, limits)
    for word in words:
        assert word in caught.value.message
    assert caught.value.hint


def test_capabilities_leave_out_what_its_pass_decides_itself() -> None:
    assert not VLLM_CAPABILITIES & {
        Capability.SKIP_REFUSED,
        Capability.FREE_BATCH,
        Capability.ADMIT_BEFORE_RUNNING,
    }


@pytest.mark.parametrize("version", ["0.32.0", "0.32.7", "0.32.1rc1"])
def test_knows_its_minor(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.320.0", "1.0", "dev"])
def test_refuses_any_other_version_and_names_what_it_knows(version: str) -> None:
    with pytest.raises(CapabilityError, match=version) as caught:
        check_version(version)
    assert caught.value.hint is not None
    assert "0.32" in caught.value.hint


def test_a_server_is_said_in_full(tmp_path) -> None:
    server = VllmServer(model=tmp_path, port=8100, served_model_name="m", stack=tmp_path / "s.toml", cores="1")
    command = server.command()
    assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert command[command.index("--scheduler-cls") + 1] == "rota.serving.engines.vllm.plugin.RotaScheduler"
    assert str(tmp_path / "s.toml") in command[command.index("--additional-config") + 1]
    assert server.environment()["HF_HUB_OFFLINE"] == "1"
    assert server.environment()["VLLM_CPU_OMP_THREADS_BIND"] == "1"
    stock = VllmServer(model=tmp_path, port=8100, served_model_name="m", plugin=False, scheduling_policy="priority")
    assert "--scheduler-cls" not in stock.command()


def test_blocks_are_handed_over_only_where_both_ways_in_are_open(tmp_path) -> None:
    def server(**settings) -> VllmServer:
        return VllmServer(model=tmp_path, port=8100, served_model_name="m", cores="0", **settings)

    control = tmp_path / "c"
    whole = server(control=control, nixl_port=8200)
    assert Capability.HAND_OVER_KV in whole.capabilities
    assert Capability.HAND_OVER_KV not in server(control=control).capabilities
    assert Capability.HAND_OVER_KV not in server(nixl_port=8200).capabilities
    assert Capability.RESUME_FROM_TOKENS in server().capabilities
    assert server(plugin=False).capabilities == frozenset()
    command = whole.command()
    assert "recompute" in command[command.index("--kv-transfer-config") + 1]
    assert str(control) in command[command.index("--additional-config") + 1]
    assert whole.environment()["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "8200"
    assert "--kv-transfer-config" not in server(control=control).command()


@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 16},
        {"scheduling_policy": "priority"},
        {"plugin": False, "stack": "s.toml"},
        {"plugin": False, "facts": "f"},
        {"plugin": False, "control": Path("c")},
        {"control": Path("c" * 120)},
        {"nixl_port": 8200},
    ],
)
def test_a_server_that_cannot_work_is_refused(tmp_path, settings) -> None:
    with pytest.raises(ConfigError):
        VllmServer(model=tmp_path, port=8100, served_model_name="m", **settings)
