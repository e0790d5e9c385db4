"""vLLM's real scheduler as an instance machine, so that the simulated world can run on the engine's own decisions."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from rota.base.errors import LawBroken
from rota.base.instant import Instant
from rota.serving.engines.vllm.virtual import VirtualVllm
from rota.serving.instance.composition import StepComposition
from rota.serving.instance.machine import InstanceStatistics
from rota.serving.model.commands import Grant, InstanceCommand, RejectSequence, RunStep
from rota.serving.model.events import InstanceEvent, SequenceAborted, SequenceArrived, StepFinished
from rota.serving.model.instance import WAITING_REPORTED_MAX, InstanceLimits, SequenceReport
from rota.serving.model.request import Request, RequestId
from rota.serving.stack import EnginePolicies

_FIRST_PRIVATE_TOKEN = 1 << 22
"""Fabricated token ids: shared blocks take the ids below, one for each hash, and private prompt tokens those from here
up to vLLM's fabricated outputs, one for each request in turn."""
_NUM_PRIVATE_TOKENS = (1 << 24) - _FIRST_PRIVATE_TOKEN - 1


class VllmMachine:
    """The `InstanceMachine` of host 3b: the same events and commands, decided by vLLM 0.32's scheduler with our plug-in
    in it. Every step is a command of its own, so it costs about a millisecond of CPU where ours costs a tenth.

    In its statistics cache hits of resumed sequences count too. Prompts are fabricated: equal block hashes give equal
    tokens, everything else is unlike anything else."""

    def __init__(self, limits: InstanceLimits, policies: EnginePolicies | None) -> None:
        """`policies` None runs vLLM's stock scheduler."""
        self.limits = limits
        self._vllm = VirtualVllm(limits, policies)
        self._requests: dict[RequestId, Request] = {}
        self._in_flight: int | None = None
        self.composition = StepComposition()
        self._step_id = 0
        self._num_steps = 0
        self._num_preemptions = 0
        self._num_cached_tokens = 0
        self._num_prompt_tokens = 0
        self._token_of: dict[Any, int] = {}

    # --- what the world reads ----------------------------------------------------------------------------------------

    @property
    def running(self) -> Sequence[Any]:
        return self._vllm.scheduler.running

    @property
    def waiting(self) -> Sequence[Any]:
        return self._vllm.scheduler.waiting

    @property
    def num_free_blocks(self) -> int:
        return int(self._vllm.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def sequence(self, request_id: RequestId) -> "_Sequence | None":
        request = self._vllm.scheduler.requests.get(request_id)
        return None if request is None else _Sequence(self._requests[request_id], request)

    def reported(self) -> tuple[tuple[SequenceReport, ...], tuple[SequenceReport, ...]]:
        return (
            tuple([self._report(request) for request in self.running]),
            tuple([self._report(request) for request in islice(self.waiting, WAITING_REPORTED_MAX)]),
        )

    def _report(self, request: Any) -> SequenceReport:
        num_blocks = -(-request.num_computed_tokens // self.limits.block_size)
        return SequenceReport(request.request_id, request.num_tokens, num_blocks, request.priority)

    def num_repeats(self) -> int:
        """0: vLLM is asked for every step."""
        return 0

    def leap(self, num_steps: int, now: Instant) -> RunStep:
        raise LawBroken("vLLM's scheduler cannot leap")

    def statistics(self) -> InstanceStatistics:
        return InstanceStatistics(
            num_steps=self._num_steps,
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_preemptions=self._num_preemptions,
            num_free_blocks=self.num_free_blocks,
            num_cached_tokens=self._num_cached_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
        )

    # --- the Machine -------------------------------------------------------------------------------------------------

    def handle(self, event: InstanceEvent, now: Instant) -> Sequence[InstanceCommand]:
        if isinstance(event, SequenceArrived):
            return self._arrive(event.request, now)
        if isinstance(event, SequenceAborted):
            if self._requests.pop(event.request_id, None) is not None:
                self._vllm.abort(event.request_id)
            return ()
        if not isinstance(event, StepFinished) or event.step_id != self._in_flight:
            raise LawBroken(f"{event} does not end step {self._in_flight}")
        self._in_flight = None
        self._num_steps += 1
        for request_id in self._vllm.update(event.finished):
            self._requests.pop(RequestId(request_id), None)
        return self._plan(now)

    def next_deadline(self) -> Instant | None:
        return None

    def expire(self, now: Instant) -> Sequence[InstanceCommand]:
        return ()

    def unfinished(self) -> Sequence[str]:
        return list(self._requests)

    def check(self) -> None:
        """vLLM audits itself; what we keep must agree on who is here."""
        if set(self._requests) != set(self._vllm.scheduler.requests):
            raise LawBroken(f"law 1: {set(self._requests) ^ set(self._vllm.scheduler.requests)} known to one side only")

    # --- inside ------------------------------------------------------------------------------------------------------

    def _arrive(self, request: Request, now: Instant) -> Sequence[InstanceCommand]:
        longest = min(self.limits.max_model_len, self.limits.num_blocks * self.limits.block_size)
        if request.num_prompt_tokens >= longest:
            return [RejectSequence(request.id, f"the prompt has {request.num_prompt_tokens} tokens, of {longest - 1}")]
        self._requests[request.id] = request
        self._num_prompt_tokens += request.num_prompt_tokens
        max_tokens = min(request.max_tokens, longest - request.num_prompt_tokens)
        self._vllm.add_request(
            request.id,
            list(self._prompt(request)),
            max_tokens,
            request.priority,
            request.arrived_at,
            request.tenant,
        )
        return self._plan(now) if self._in_flight is None else ()

    def _prompt(self, request: Request) -> Iterator[int]:
        per_hash = request.hash_block_tokens or self.limits.block_size
        left = request.num_prompt_tokens
        for block_hash in request.block_hashes:
            token = self._token_of.setdefault(block_hash, len(self._token_of) % _FIRST_PRIVATE_TOKEN)
            yield from (token,) * min(per_hash, left)
            left -= min(per_hash, left)
        private = _FIRST_PRIVATE_TOKEN + self._vllm.num_requests % _NUM_PRIVATE_TOKENS
        yield from (private,) * left

    def _plan(self, now: Instant) -> Sequence[InstanceCommand]:
        if not self._requests:
            return ()
        facts = self._vllm.schedule(now)
        preempted = facts.preempted
        num_cached = facts.num_cached_tokens
        while not facts.grants:
            # A pass that only preempted: vLLM's engine would run an empty step and try again.
            if not facts.preempted:
                raise LawBroken(f"law 6: vLLM granted nothing, though {len(self._requests)} requests are unfinished")
            self._vllm.update()
            facts = self._vllm.schedule(now)
            preempted += facts.preempted
            num_cached += facts.num_cached_tokens
        self._num_preemptions += len(preempted)
        self._num_cached_tokens += num_cached
        self._step_id += 1
        self._in_flight = self._step_id
        self.composition = StepComposition()
        for request_id, num_tokens in facts.grants:
            sequence = self.sequence(RequestId(request_id))
            assert sequence is not None
            self.composition.add(sequence, num_tokens)
        return [
            RunStep(
                step_id=self._step_id,
                grants=tuple(Grant(RequestId(request_id), num_tokens) for request_id, num_tokens in facts.grants),
                preempted=tuple(RequestId(request_id) for request_id in preempted),
                num_free_blocks=facts.num_free_blocks,
            )
        ]


class _Sequence:
    """What the world reads of a sequence that vLLM keeps."""

    __slots__ = ("_vllm", "request")

    def __init__(self, request: Request, vllm_request: Any) -> None:
        self.request = request
        self._vllm = vllm_request

    @property
    def id(self) -> RequestId:
        return self.request.id

    @property
    def state(self) -> str:
        return "running" if self._vllm.status.name == "RUNNING" else "waiting"

    @property
    def num_computed_tokens(self) -> int:
        return int(self._vllm.num_computed_tokens)

    @property
    def num_tokens(self) -> int:
        return int(self._vllm.num_tokens)

    @property
    def num_prompt_tokens(self) -> int:
        return self.request.num_prompt_tokens

    @property
    def num_cached_tokens(self) -> int:
        return 0  # vLLM gives this number away with the first token; `statistics` has the sum

    @property
    def num_preemptions(self) -> int:
        return int(self._vllm.num_preemptions)
