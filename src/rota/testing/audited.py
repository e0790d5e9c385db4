"""The real instance machine with a second account of every sequence, kept from its commands alone."""

from collections.abc import Sequence

from rota.base.errors import LawBroken
from rota.base.instant import Instant
from rota.serving.instance.host_memory import HostMemory
from rota.serving.instance.machine import InstanceMachine
from rota.serving.model.commands import InstanceCommand, RunStep, SequenceStopped, SwapIn
from rota.serving.model.events import (
    InstanceEvent,
    SequenceAborted,
    SequenceAdopted,
    SequenceArrived,
    SequenceLeft,
    SequenceResumed,
    StepFinished,
)
from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import RequestId
from rota.serving.stack import EnginePolicies


class AuditedInstance(InstanceMachine):
    """The real machine with a second account of every sequence: its tokens as its commands alone tell them (law 2), its
    share of every step (law 4), and all that the machine checks itself, after every event."""

    def __init__(
        self, limits: InstanceLimits, policies: EnginePolicies, *, steady: bool = True, host: HostMemory | None = None
    ) -> None:
        super().__init__(
            limits,
            order=policies.order,
            batch=policies.batch,
            memory=policies.memory,
            steady=steady,
            host=host,
        )
        self._accounts: dict[RequestId, _Account] = {}
        self._back: set[RequestId] = set()
        """Who is on the way back from host memory, and whose preemption is yet to be told."""
        self._last_step: RunStep | None = None
        self.num_output_tokens: dict[RequestId, int] = {}
        """Of the sequences that have finished."""

    def handle(self, event: InstanceEvent, now: Instant) -> Sequence[InstanceCommand]:
        if isinstance(event, StepFinished):
            self._count_finished_step(event)
        commands = super().handle(event, now)
        if isinstance(event, SequenceAborted):
            self._accounts.pop(event.request_id, None)
            self._back.discard(event.request_id)
        elif isinstance(event, SequenceArrived) and self.sequence(event.request.id) is not None:
            self._accounts[event.request.id] = _Account(event.request.num_prompt_tokens, event.num_output_tokens)
        else:
            self._count_move(event)
        for command in commands:
            if isinstance(command, SequenceStopped):
                self._count_stop(command)
            elif isinstance(command, SwapIn):
                self._count_swap_in(command)
            elif isinstance(command, RunStep):
                self._count_step(command)
                self._last_step = command
        self.check()
        return commands

    def leap(self, num_steps: int, now: Instant) -> RunStep:
        for _ in range(num_steps):
            if self._last_step is not None:
                self._count_finished_step(StepFinished(self._last_step.step_id))
            step = super().leap(1, now)
            self._count_step(step)
            self._last_step = step
        self.check()
        return step

    def _count_move(self, event: InstanceEvent) -> None:
        if isinstance(event, SequenceAdopted):
            account = _Account(event.request.num_prompt_tokens, event.num_output_tokens)
            account.num_computed, account.is_running = account.num_tokens - 1, True
            self._accounts[event.request.id] = account
        elif isinstance(event, SequenceResumed | SequenceLeft):
            account_at_rest = self._accounts.get(event.request_id)
            if account_at_rest is None or not account_at_rest.is_resting:
                return
            if isinstance(event, SequenceLeft):
                del self._accounts[event.request_id]
            account_at_rest.is_resting, account_at_rest.is_running = False, True

    def _count_stop(self, command: SequenceStopped) -> None:
        account = self._accounts[command.request_id]
        if not account.num_computed + 1 == account.num_tokens == command.num_tokens:
            raise LawBroken(f"law 2: {command}, and by the commands it has {account.num_computed}/{account.num_tokens}")
        account.is_resting, account.is_running = True, False

    def _count_swap_in(self, command: SwapIn) -> None:
        account, sequence = self._accounts[command.request_id], self.sequence(command.request_id)
        if sequence is None or account.is_resting or sequence.state != "resting":
            raise LawBroken(f"law 2: {command} for one that was not waiting")
        if account.is_running:  # it was preempted in a pass that ordered no step, which is told with the next step
            self._back.add(command.request_id)
            account.is_running = False
        account.num_computed = sequence.num_computed_tokens
        if not command.num_blocks or not 0 < account.num_computed < account.num_tokens:
            raise LawBroken(f"law 2: {command} for {account.num_computed} of {account.num_tokens} tokens")
        account.is_resting = True

    def _count_finished_step(self, event: StepFinished) -> None:
        step, self._last_step = self._last_step, None
        if step is None:
            raise LawBroken(f"law 6: step {event.step_id} finished, and none was ordered")
        for request_id, _ in step.grants:
            account = self._accounts.get(request_id)
            if account is not None and account.num_computed == account.num_tokens:
                account.num_tokens += 1
        for request_id in event.finished:
            account = self._accounts.pop(request_id)
            self.num_output_tokens[request_id] = account.num_tokens - account.num_prompt

    def _count_step(self, step: RunStep) -> None:
        for request_id in step.preempted:
            account = self._accounts.get(request_id)
            if account is None:
                raise LawBroken(f"law 2: {request_id} was preempted, and is not here")
            if request_id in self._back:
                self._back.remove(request_id)
                continue
            account.is_running, account.num_computed = False, 0
        granted = [request_id for request_id, _ in step.grants]
        if len(set(granted)) != len(granted):
            raise LawBroken(f"law 4: step {step.step_id} names a sequence twice: {granted}")
        if sum(num_tokens for _, num_tokens in step.grants) > self.limits.max_num_batched_tokens:
            raise LawBroken(f"law 4: step {step.step_id} holds more than {self.limits.max_num_batched_tokens} tokens")
        for request_id, num_tokens in step.grants:
            self._count_grant(request_id, num_tokens)
        num_running = sum(account.is_running for account in self._accounts.values()) + self.moving.num_slots
        if num_running > self.limits.max_num_seqs:
            raise LawBroken(f"law 4: {num_running} sequences run or have a slot kept, {self.limits.max_num_seqs} may")

    def _count_grant(self, request_id: RequestId, num_tokens: int) -> None:
        account = self._accounts.get(request_id)
        sequence = self.sequence(request_id)
        if account is None or sequence is None or account.is_resting or num_tokens < 1:
            raise LawBroken(f"law 2: {request_id} was granted {num_tokens} tokens, and is {sequence}")
        if not account.is_running:
            # What is computed beyond the grant was found in the prefix cache.
            num_cached = sequence.num_computed_tokens - num_tokens
            if not 0 <= num_cached < account.num_tokens or num_cached % self.limits.block_size:
                raise LawBroken(f"law 2: {sequence} was admitted with {num_cached} cached tokens")
            account.is_running, account.num_computed = True, num_cached
        account.num_computed += num_tokens
        if (sequence.num_tokens, sequence.num_computed_tokens) != (account.num_tokens, account.num_computed):
            raise LawBroken(f"law 2: by its commands {sequence} has {account.num_computed}/{account.num_tokens}")
        if account.num_computed > account.num_tokens:
            raise LawBroken(f"law 2: {sequence} computes tokens that do not exist yet")


class _Account:
    __slots__ = ("is_resting", "is_running", "num_computed", "num_prompt", "num_tokens")

    def __init__(self, num_prompt: int, num_output: int = 0) -> None:
        self.num_prompt = num_prompt
        self.num_tokens = num_prompt + num_output
        self.num_computed = 0
        self.is_running = False
        self.is_resting = False
