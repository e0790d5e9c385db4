"""Facts about engine instances."""

from enum import StrEnum
from typing import NewType

import msgspec

from rota.base.instant import Instant
from rota.serving.model.capabilities import EVERYTHING, EngineCapabilities
from rota.serving.model.request import RequestId

InstanceId = NewType("InstanceId", str)


class Role(StrEnum):
    """Which phase an instance serves."""

    MIXED = "mixed"
    PREFILL = "prefill"
    DECODE = "decode"


class InstanceLimits(msgspec.Struct, frozen=True):
    """The engine's own settings that bound a step. Names follow vLLM's."""

    num_blocks: int
    """KV blocks that requests can use. vLLM's `num_gpu_blocks` counts one null block more."""
    block_size: int = 16
    """Token slots per block."""
    max_num_seqs: int = 256
    """Sequences that may run at once."""
    max_num_batched_tokens: int = 2048
    """Token budget of a step."""
    max_model_len: int = 131_072
    """Prompt plus output tokens of one sequence, at most."""
    enable_prefix_caching: bool = True
    watermark_blocks: int = 0
    """Blocks kept free when a waiting sequence is admitted beside running ones (`int(watermark * num_gpu_blocks)`)."""
    long_prefill_token_threshold: int = 0
    """Cap on the tokens of one prefill chunk while others are present; 0 is none."""
    reserve_full_prompt: bool = True
    """Admit a waiting sequence only if all its known tokens fit (vLLM's `scheduler_reserve_full_isl`)."""


class InstanceSpec(msgspec.Struct, frozen=True):
    """One instance as the cluster knows it from the start."""

    id: InstanceId
    limits: InstanceLimits
    role: Role = Role.MIXED
    capabilities: EngineCapabilities = EVERYTHING


class SequenceReport(msgspec.Struct, frozen=True, gc=False):
    """One request at an instance, as the instance says it is."""

    request_id: RequestId
    num_tokens: int
    """Known tokens: prompt and what was generated so far."""
    num_blocks: int
    """KV blocks that it holds; 0 for one that waits."""
    priority: int = 0


WAITING_REPORTED_MAX = 16
"""A report tells of so many of those who wait, the head of the queue first."""


class InstanceReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an instance said about itself, and when. Reports arrive late, live as in the simulator."""

    instance_id: InstanceId
    observed_at: Instant
    """When it was true, at the instance."""
    num_running: int
    num_waiting: int
    num_free_blocks: int
    """Blocks that can be had: free plus cached and unreferenced."""
    num_blocks: int
    num_preemptions: int = 0
    """Since the instance started."""
    running: tuple[SequenceReport, ...] = ()
    """Those who run, in order of admission, where the instance tells of them."""
    waiting: tuple[SequenceReport, ...] = ()
    """The first `WAITING_REPORTED_MAX` of those who wait, in queue order, where the instance tells of them."""
