"""Host memory in the simulation: when blocks that are swapped out and in have arrived, and what waits for them."""

from collections.abc import Callable

from rota.base.instant import Duration, Instant
from rota.runtime.simulation import SimulationLoop
from rota.serving.model.commands import InstanceCommand, SwapIn, SwapOut
from rota.serving.model.events import SequenceResumed
from rota.serving.model.instance import InstanceId, InstanceSpec
from rota.serving.model.request import RequestId
from rota.serving.model.swapping import SwapRules
from rota.serving.sim.instance import Journeys, SimulatedInstance, SimulatedMachine
from rota.serving.stack import StackConfig

RANK_SWAPPED = 2
"""At one instant steps end and requests arrive before a copy does."""


class Swapping:
    """The link between one instance and its host memory; stands before `journeys` and hears what is to be copied.

    Each way one copy goes after the other: for every group of blocks a latency, and the bytes. What is copied out may
    not be overwritten before it has left, so a step whose blocks leave too few free for that waits until enough has;
    what is copied in is its sequence's once it is there. Without `asynchronous` each step waits for every copy."""

    def __init__(
        self,
        rules: SwapRules,
        loop: SimulationLoop,
        machine: SimulatedMachine,
        block_size: int,
        journeys: Journeys,
        thinking: Callable[[], Duration] | None,
    ) -> None:
        self._rules = rules
        self._loop = loop
        self._machine = machine
        self._bytes_per_block = block_size * rules.kv_bytes_per_token
        self._journeys = journeys
        self._thinking = thinking
        self._out_free_at = 0
        self._in_free_at = 0
        self._leaving: list[tuple[int, int]] = []
        """`(when it has left, blocks)` of what is copied out, in that order."""
        self._kept_at: dict[RequestId, int] = {}
        """When the copy of each is whole."""

    def on_answer(self, instance: SimulatedInstance, command: InstanceCommand, now: Instant) -> None:
        if isinstance(command, SwapOut):
            self._out_free_at = max(self._out_free_at, now) + self._time(command.num_blocks)
            self._kept_at[command.request_id] = self._out_free_at
            self._leaving.append((self._out_free_at, command.num_blocks))
        elif isinstance(command, SwapIn):
            begins_at = max(self._in_free_at, now, self._kept_at.pop(command.request_id, 0))
            self._in_free_at = begins_at + self._time(command.num_blocks)
            arrived = SequenceResumed(command.request_id)
            self._loop.call_at(Instant(self._in_free_at), lambda _: instance.tell(arrived), RANK_SWAPPED)
        else:
            self._journeys.on_answer(instance, command, now)

    def on_returned(self, instance_id: InstanceId, request_id: RequestId, at: Instant) -> None:
        self._journeys.on_returned(instance_id, request_id, at)

    def waited(self) -> Duration:
        """How long the step that begins now waits for copies, beside what deciding took."""
        thought = 0 if self._thinking is None else self._thinking()
        now = self._loop.now
        self._leaving = [(at, count) for at, count in self._leaving if at > now]
        if not self._rules.asynchronous:
            return Duration(thought + max(0, self._out_free_at - now, self._in_free_at - now))
        num_over = sum(count for _, count in self._leaving) - self._machine.num_free_blocks
        ready_at: int = now
        for at, count in self._leaving:
            if num_over <= 0:
                break
            ready_at, num_over = at, num_over - count
        return Duration(thought + ready_at - now)

    def _time(self, num_blocks: int) -> int:
        rules = self._rules
        num_groups = -(-num_blocks // rules.block_group)
        num_bytes = num_blocks * self._bytes_per_block
        return round(num_groups * rules.group_latency_us * 1e3 + num_bytes / rules.gigabytes_per_second)


def with_swap(
    stack: StackConfig,
    loop: SimulationLoop,
    machine: SimulatedMachine,
    spec: InstanceSpec,
    journeys: Journeys,
    thinking: Callable[[], Duration] | None,
) -> tuple[Journeys, Callable[[], Duration] | None]:
    """Who hears of an instance's requests that move, and what its steps wait for: host memory between, if it has it."""
    if not stack.swap:
        return journeys, thinking
    swapping = Swapping(stack.swap, loop, machine, spec.limits.block_size, journeys, thinking)
    return swapping, swapping.waited
