"""vLLM's real scheduler object under a virtual clock, with fabricated outputs: no model, no weights, no processes.

What a step takes, and which token is a request's last, is the caller's to say; everything that is decided, vLLM
decides, with its stock scheduler or with our plug-in inside it.
"""

import copy
import functools
import json
import tempfile
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rota.base.errors import EngineError
from rota.base.instant import NANOSECONDS_PER_SECOND
from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import DEFAULT_TENANT

FIRST_OUTPUT_TOKEN = 1 << 24
"""Fabricated token ids begin here: no two requests ever share one, so that blocks with generated tokens are shared by
nobody but the request itself when it resumes. Ids of prompts must be lower."""

_HIDDEN_SIZE = 64


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What vLLM decided in one step."""

    grants: tuple[tuple[str, int], ...]
    """(request id, tokens), in batch order."""
    preempted: tuple[str, ...]
    """In the order in which it happened, displaced ones first."""
    num_free_blocks: int
    """Blocks that can be had once this batch holds its own."""
    running: tuple[str, ...]
    """vLLM's running list after the pass."""
    waiting: tuple[str, ...]
    """The waiting queue after the pass, front first."""
    num_cached_tokens: int
    """Prefix-cache hits of those admitted in this step, in tokens."""
    finished: tuple[str, ...] = ()
    """Requests whose last token this step made; empty until the step was updated."""


class VirtualVllm:
    """One vLLM scheduler, driven by hand.

    `limits` are the engine's settings. `policies` (an object with `order`, `batch` and `memory`) puts our plug-in
    inside; without it the stock scheduler runs. `async_scheduling` takes vLLM's asynchronous scheduler: then up to two
    steps may be scheduled before the first is updated.

    Instants are integer ns and only told to policies; vLLM itself never looks at them.
    """

    def __init__(self, limits: InstanceLimits, policies: Any = None, *, async_scheduling: bool = False) -> None:
        self.limits = limits
        self.now = 0
        self.num_requests = 0
        self._preempted: list[str] = []
        self._indices: dict[str, int] = {}
        self._in_flight: deque[tuple[Any, list[str]]] = deque()
        self.scheduler = _build_scheduler(self, limits, policies, async_scheduling)
        self._hasher = _block_hasher(limits.block_size) if limits.enable_prefix_caching else None

    # --- requests ----------------------------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        max_tokens: int,
        priority: int = 0,
        arrival: int = 0,
        tenant: str = DEFAULT_TENANT,
    ) -> tuple[str, ...]:
        """A request arrives at `arrival` (ns; the clock moves there if it is behind). Returns the chained hashes of the
        prompt's full blocks, as vLLM computes them, in hex."""
        request = self._request(request_id, prompt_token_ids, max_tokens, priority, arrival, tenant)
        self.now = max(self.now, arrival)
        self._indices[request_id] = self.num_requests
        self.num_requests += 1
        hashes = tuple(block_hash.hex() for block_hash in request.block_hashes)
        self.scheduler.add_request(request)
        return hashes

    def abort(self, request_id: str) -> None:
        """The client left. Unknown ids are ignored."""
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    @property
    def num_unfinished(self) -> int:
        return int(self.scheduler.get_num_unfinished_requests())

    def num_output_tokens(self, request_id: str) -> int | None:
        """Tokens made so far by a request that has not ended."""
        request = self.scheduler.requests.get(request_id)
        return None if request is None else int(request.num_output_tokens)

    # --- steps -------------------------------------------------------------------------------------------------------

    def step(self, output_lengths: Mapping[str, int] | None = None, now: int | None = None) -> StepFacts:
        """Schedule and run one step. A request ends with its `output_lengths[id]`-th token, or at its `max_tokens`."""
        facts = self.schedule(now)
        return replace(facts, finished=self.update_lengths(output_lengths or {}))

    def schedule(self, now: int | None = None) -> StepFacts:
        """Decide the next step at `now`; its tokens come with `update`."""
        if now is not None:
            self.now = max(self.now, now)
        scheduler = self.scheduler
        output = scheduler.schedule()
        preempted, self._preempted[:] = tuple(self._preempted), []
        admitted = {data.req_id: data.num_computed_tokens for data in output.scheduled_new_reqs}
        resumed = output.scheduled_cached_reqs
        for request_id, num_computed in zip(resumed.req_ids, resumed.num_computed_tokens, strict=True):
            if request_id in resumed.resumed_req_ids:
                admitted[request_id] = num_computed
        facts = StepFacts(
            grants=tuple(output.num_scheduled_tokens.items()),
            preempted=preempted,
            num_free_blocks=scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
            running=tuple(request.request_id for request in scheduler.running),
            waiting=tuple(request.request_id for request in scheduler.waiting),
            num_cached_tokens=sum(admitted.values()),
        )
        # Whether a token comes is settled when the step is made; the request may move on before its update.
        producers = [r for r in output.num_scheduled_tokens if not scheduler.requests[r].is_prefill_chunk]
        self._in_flight.append((output, producers))
        return facts

    def update_lengths(self, output_lengths: Mapping[str, int]) -> tuple[str, ...]:
        """`update` with every request whose true length is reached by the oldest step in flight."""
        requests = self.scheduler.requests
        producers = self._in_flight[0][1] if self._in_flight else []
        return self.update(
            {
                r
                for r in producers
                if r in output_lengths and r in requests and requests[r].num_output_tokens + 1 >= output_lengths[r]
            }
        )

    def update(self, finished: Collection[str] = ()) -> tuple[str, ...]:
        """Give the oldest step in flight its tokens; the token of each of `finished` is its last. Returns all that
        ended, in batch order, among them those that reached `max_tokens`."""
        from vllm.v1.outputs import ModelRunnerOutput

        if not self._in_flight:
            raise EngineError("no step is in flight", hint="call schedule first")
        output, producers = self._in_flight.popleft()
        requests = self.scheduler.requests
        ids = list(output.num_scheduled_tokens)
        makes = set(producers)
        alive = [requests[r] for r in ids if r in requests]
        sampled: list[list[int]] = []
        for request_id in ids:
            request = requests.get(request_id)
            if request_id not in makes or request is None:
                sampled.append([])
            elif request_id in finished:
                sampled.append([_END_TOKEN])
            else:
                position = request.num_output_tokens
                index = self._indices[request_id]
                sampled.append([FIRST_OUTPUT_TOKEN + index * self.limits.max_model_len + position])
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
                sampled_token_ids=sampled,
                logprobs=None,
                prompt_logprobs_dict={},
                pooler_output=[None] * len(ids),
            ),
        )
        return tuple(request.request_id for request in alive if request.is_finished())

    def _request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        max_tokens: int,
        priority: int,
        arrival: int,
        tenant: str,
    ) -> Any:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        if any(token >= FIRST_OUTPUT_TOKEN for token in prompt_token_ids):
            raise EngineError(f"{request_id}: prompt tokens must be below {FIRST_OUTPUT_TOKEN}")
        return Request(
            request_id=request_id,
            prompt_token_ids=list(prompt_token_ids),
            sampling_params=SamplingParams(
                max_tokens=max_tokens, stop_token_ids=[_END_TOKEN], ignore_eos=True, extra_args={"tenant": tenant}
            ),
            pooling_params=None,
            arrival_time=arrival / NANOSECONDS_PER_SECOND,
            priority=priority,
            block_hasher=self._hasher,
        )


_END_TOKEN = FIRST_OUTPUT_TOKEN - 1


def _build_scheduler(host: VirtualVllm, limits: InstanceLimits, policies: Any, async_scheduling: bool) -> Any:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    config = _vllm_config(limits, async_scheduling)
    base: Any
    members: dict[str, Any]
    if policies is None:
        base = AsyncScheduler if async_scheduling else Scheduler
        members = {}
    else:
        from rota.serving.engines.vllm import plugin

        base = plugin.RotaAsyncScheduler if async_scheduling else plugin.RotaScheduler
        members = {
            "rota_policies": policies,
            "rota_clock": staticmethod(lambda: host.now),
            "rota_wall_clock": staticmethod(lambda: host.now),
        }

    def preempt(self: Any, request: Any, timestamp: float, drop_stale_output: bool = False) -> None:
        base._preempt_request(self, request, timestamp, drop_stale_output)
        host._preempted.append(request.request_id)

    members["_preempt_request"] = preempt
    spec = FullAttentionSpec(block_size=limits.block_size, num_kv_heads=1, head_size=1, dtype=_torch().float32)
    return type(f"Virtual{base.__name__}", (base,), members)(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            # vLLM keeps one block to stand for "none".
            num_blocks=limits.num_blocks + 1,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        structured_output_manager=_structured_output_manager(),
        block_size=limits.block_size,
        hash_block_size=limits.block_size,
        log_stats=False,
    )


def _vllm_config(limits: InstanceLimits, async_scheduling: bool) -> Any:
    """A config for these limits. The whole is built and validated once; what limits change is put into a copy."""
    from vllm.config import SchedulerConfig

    config = copy.copy(_base_config())
    config.model_config = copy.copy(config.model_config)
    config.model_config.max_model_len = limits.max_model_len
    config.cache_config = copy.copy(config.cache_config)
    config.cache_config.block_size = limits.block_size
    config.cache_config.enable_prefix_caching = limits.enable_prefix_caching
    config.cache_config.num_gpu_blocks = limits.num_blocks + 1
    config.scheduler_config = SchedulerConfig(
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=limits.max_model_len,
        is_encoder_decoder=False,
        enable_chunked_prefill=True,
        async_scheduling=async_scheduling,
        long_prefill_token_threshold=limits.long_prefill_token_threshold,
        watermark=(limits.watermark_blocks + 0.5) / (limits.num_blocks + 1) if limits.watermark_blocks else 0.0,
        scheduler_reserve_full_isl=limits.reserve_full_prompt,
    )
    return config


@functools.cache
def _base_config() -> Any:
    from vllm.config import CacheConfig, DeviceConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig

    with tempfile.TemporaryDirectory(prefix="rota-virtual-") as folder:
        Path(folder, "config.json").write_text(json.dumps(_MODEL))
        model = ModelConfig(model=folder, dtype="float32", skip_tokenizer_init=True, max_model_len=1 << 20)
    return VllmConfig(
        model_config=model,
        scheduler_config=SchedulerConfig(max_model_len=1 << 20, is_encoder_decoder=False, async_scheduling=False),
        cache_config=CacheConfig(block_size=16, enable_prefix_caching=True),
        parallel_config=ParallelConfig(),
        device_config=DeviceConfig("cpu"),
    )


_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": _HIDDEN_SIZE,
    "intermediate_size": _HIDDEN_SIZE,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 128,
    "max_position_embeddings": 1 << 20,
}
"""A model that is never loaded; vLLM wants one to derive settings from."""


@functools.cache
def _structured_output_manager() -> Any:
    from vllm.v1.structured_output import StructuredOutputManager

    return StructuredOutputManager(_base_config())


@functools.cache
def _block_hasher(block_size: int) -> Any:
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    init_none_hash(sha256)
    return get_request_block_hasher(block_size, sha256)


@functools.cache
def _torch() -> Any:
    import torch

    return torch
