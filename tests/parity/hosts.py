"""The hosts that parity compares, behind one face."""

from collections.abc import Mapping
from typing import Any

from tests.parity.workloads import Decision, WorkRequest

from rota.base.instant import Instant
from rota.serving.engines.vllm.virtual import VirtualVllm
from rota.serving.instance.machine import InstanceMachine
from rota.serving.model.commands import RunStep
from rota.serving.model.events import SequenceAborted, SequenceArrived, StepFinished
from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import Request, RequestId, TenantId


class VllmHost:
    """vLLM's real scheduler: stock, or with our plug-in if given policies."""

    def __init__(self, limits: InstanceLimits, policies: Any = None) -> None:
        self.engine = VirtualVllm(limits, policies)
        self.num_cached_tokens = 0
        self.num_waiting_max = 0

    def arrive(self, request: WorkRequest, now: int) -> None:
        self.engine.add_request(request.id, request.prompt, request.max_tokens, request.priority, now, request.tenant)

    def schedule(self, now: int) -> Decision | None:
        preempted: tuple[str, ...] = ()
        while self.engine.num_unfinished:
            facts = self.engine.schedule(now)
            preempted += facts.preempted
            self.num_cached_tokens += facts.num_cached_tokens
            self.num_waiting_max = max(self.num_waiting_max, len(facts.waiting))
            if facts.grants:
                return Decision(facts.grants, preempted, facts.num_free_blocks)
            self.engine.update()
            if not facts.preempted:
                break
        return None

    def abort(self, request_id: str) -> None:
        self.engine.abort(request_id)

    def update(self, output_lengths: Mapping[str, int]) -> tuple[str, ...]:
        return self.engine.update_lengths(output_lengths)


class MachineHost:
    """Our instance machine. It plans as soon as a step has finished, so the end of a step is told when the next is
    due."""

    def __init__(self, limits: InstanceLimits, policies: Any) -> None:
        self.machine = InstanceMachine(limits, order=policies.order, batch=policies.batch, memory=policies.memory)
        self._block_size = limits.block_size
        self._step: RunStep | None = None
        self._finished: StepFinished | None = None
        self._now = Instant(0)

    def arrive(self, request: WorkRequest, now: int) -> None:
        self._now = Instant(now)
        if not self.machine.unfinished() and self._finished is not None:
            # The step that left the machine idle ended before this request came.
            self.machine.handle(self._finished, self._now)
            self._finished = None
        fact = Request(
            id=RequestId(request.id),
            arrived_at=self._now,
            num_prompt_tokens=len(request.prompt),
            max_tokens=request.max_tokens,
            priority=request.priority,
            tenant=TenantId(request.tenant),
            block_hashes=chained_hashes(request.prompt, self._block_size),
        )
        self._take(self.machine.handle(SequenceArrived(fact), self._now))

    def schedule(self, now: int) -> Decision | None:
        self._now = Instant(now)
        if self._finished is not None:
            finished, self._finished = self._finished, None
            self._take(self.machine.handle(finished, self._now))
        step = self._step
        if step is None:
            return None
        self.machine.check()
        return Decision(tuple((g.request_id, g.num_tokens) for g in step.grants), step.preempted, step.num_free_blocks)

    def abort(self, request_id: str) -> None:
        self._take(self.machine.handle(SequenceAborted(RequestId(request_id)), self._now))

    def update(self, output_lengths: Mapping[str, int]) -> tuple[str, ...]:
        step, self._step = self._step, None
        assert step is not None
        ended = []
        for grant in step.grants:
            sequence = self.machine.sequence(grant.request_id)
            if sequence is None or sequence.num_computed_tokens != sequence.num_tokens:
                continue
            if sequence.num_output_tokens + 1 >= output_lengths[grant.request_id]:
                ended.append(grant.request_id)
        self._finished = StepFinished(step.step_id, tuple(ended))
        return tuple(ended)

    def _take(self, commands: Any) -> None:
        for command in commands:
            assert isinstance(command, RunStep), command
            assert self._step is None, "a step was ordered while another was in flight"
            self._step = command


def chained_hashes(prompt: tuple[int, ...], block_size: int) -> tuple[int, ...]:
    """One hash for each full block, over the whole prefix up to its end."""
    hashes = []
    value = 0
    for start in range(0, len(prompt) - block_size + 1, block_size):
        value = hash((value, prompt[start : start + block_size]))
        hashes.append(value)
    return tuple(hashes)
