"""What policies see inside vLLM: thin windows onto vLLM's own requests and lists. Nothing is copied but facts."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rota.base.instant import NANOSECONDS_PER_SECOND, Instant
from rota.serving.api import SequenceView
from rota.serving.engines.vllm.arguments import read_arguments
from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import Request, RequestId, TenantId

if TYPE_CHECKING:
    from rota.serving.engines.vllm.queue import PolicyQueue


class VllmSequence:
    """A `SequenceView` over one vLLM request. Kept from arrival to end, so that `is` works between steps."""

    __slots__ = (
        "admitted_seq",
        "arrived_at",
        "id",
        "is_queued",
        "priority",
        "queue_position",
        "request",
        "tenant",
        "vllm",
    )

    def __init__(self, vllm_request: Any, fact: Request) -> None:
        self.vllm = vllm_request
        self.request = fact
        self.id: RequestId = fact.id
        self.priority = fact.priority
        self.tenant: TenantId = fact.tenant
        self.arrived_at: Instant = fact.arrived_at
        self.admitted_seq = -1
        self.queue_position = 0
        self.is_queued = False

    def __repr__(self) -> str:
        return f"VllmSequence({self.id!r}, {self.num_computed_tokens}/{self.num_tokens} tokens)"

    @property
    def num_tokens(self) -> int:
        # Under asynchronous scheduling tokens in flight are computed before they are known; they count as known here.
        request = self.vllm
        num_tokens: int = request.num_tokens + request.num_output_placeholders
        return num_tokens

    @property
    def num_prompt_tokens(self) -> int:
        num_prompt_tokens: int = self.vllm.num_prompt_tokens
        return num_prompt_tokens

    @property
    def num_computed_tokens(self) -> int:
        num_computed_tokens: int = self.vllm.num_computed_tokens
        return num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        request = self.vllm
        num_pending_tokens: int = request.num_tokens + request.num_output_placeholders - request.num_computed_tokens
        return num_pending_tokens

    @property
    def num_preemptions(self) -> int:
        num_preemptions: int = self.vllm.num_preemptions
        return num_preemptions


class VllmEngineView:
    """An `EngineView` over a vLLM scheduler at the start of a step; displacement, which comes before the pass, shows.

    vLLM advances computed tokens only after its pass, so that within the pass policies see what was true when it began.
    """

    __slots__ = ("_running", "_scheduler", "_sequences", "limits", "now", "waiting")

    def __init__(
        self, scheduler: Any, sequences: dict[str, VllmSequence], waiting: "PolicyQueue", limits: InstanceLimits
    ) -> None:
        self._scheduler = scheduler
        self._sequences = sequences
        self._running: list[VllmSequence] = []
        self.waiting = waiting.view
        self.limits = limits
        self.now = Instant(0)

    def refresh(self, now: Instant) -> None:
        """Look again at who runs: at the start of a step, and after displacement."""
        self.now = now
        sequences = self._sequences
        running = [sequences[request.request_id] for request in self._scheduler.running]
        # vLLM's list is the line that it serves; the plug-in may have put it into another order than that of admission.
        last = -1
        for sequence in running:
            if sequence.admitted_seq < last:
                running.sort(key=_admitted_seq)
                break
            last = sequence.admitted_seq
        self._running = running

    @property
    def running(self) -> Sequence[VllmSequence]:
        return self._running

    @property
    def num_free_blocks(self) -> int:
        return int(self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def num_blocks_freed(self, leaving: Sequence[SequenceView]) -> int:
        if len(leaving) == 1:
            groups = self._scheduler.kv_cache_manager.get_blocks(leaving[0].id).blocks
            return sum(block.ref_cnt == 1 for group in groups for block in group)
        return len(self.held_by_these_alone(leaving))

    def held_by_these_alone(self, running: Sequence[SequenceView]) -> set[int]:
        """The blocks that nobody but these requests holds, by id."""
        counts: Counter[int] = Counter()
        references: dict[int, int] = {}
        for sequence in running:
            for group in self._scheduler.kv_cache_manager.get_blocks(sequence.id).blocks:
                for block in group:
                    counts[block.block_id] += 1
                    references[block.block_id] = block.ref_cnt
        return {block_id for block_id, count in counts.items() if references[block_id] == count}

    def num_cached_tokens(self, sequence: SequenceView) -> int:
        _, num_cached, _ = self._scheduler.kv_cache_manager.get_computed_blocks(self._sequences[sequence.id].vllm)
        return int(num_cached)


def _admitted_seq(sequence: VllmSequence) -> int:
    return sequence.admitted_seq


def limits_of(scheduler: Any) -> InstanceLimits:
    """vLLM's own settings as ours. Its null block is not counted."""
    blocks = scheduler.kv_cache_manager
    return InstanceLimits(
        num_blocks=blocks.block_pool.num_gpu_blocks - 1,
        block_size=scheduler.block_size,
        max_num_seqs=scheduler.max_num_active_reqs,
        max_num_batched_tokens=scheduler.max_num_scheduled_tokens,
        max_model_len=scheduler.max_model_len,
        enable_prefix_caching=bool(blocks.enable_caching),
        watermark_blocks=blocks.watermark_blocks,
        long_prefill_token_threshold=scheduler.scheduler_config.long_prefill_token_threshold,
        reserve_full_prompt=bool(scheduler.scheduler_reserve_full_isl),
    )


def fact_of(request: Any, now: Instant, wall: int) -> Request:
    """The frozen fact of a vLLM request that has just arrived at the scheduler.

    `now` is the engine's clock and `wall` the wall clock, both at this moment, in ns: vLLM stamps arrival with the API
    server's wall clock, and the router's wait is put before it. The id is vLLM's own. Tenant and targets come from
    `vllm_xargs` of the request body.
    """
    age = max(0, wall - round(request.arrival_time * NANOSECONDS_PER_SECOND))
    parameters = request.sampling_params
    told = read_arguments(getattr(parameters, "extra_args", None))
    return Request(
        id=RequestId(request.request_id),
        arrived_at=Instant(now - age - told.waited),
        num_prompt_tokens=request.num_prompt_tokens,
        max_tokens=request.max_tokens,
        priority=request.priority,
        tenant=told.tenant,
        session=request.session_id,
        slo=told.slo,
        block_hashes=tuple(block_hash.hex() for block_hash in request.block_hashes),
        text_counts=told.text_counts,
    )
