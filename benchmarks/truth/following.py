"""vLLM's stock scheduler led through a simulated run, step for step, beside the machines that decide it."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rota.base.instant import Instant
from rota.base.journal import Header, Journal, Row, RowKind
from rota.serving.assemble import CLUSTER
from rota.serving.model.commands import InstanceCommand, RunStep
from rota.serving.model.events import InstanceEvent, StepFinished
from rota.serving.model.instance import InstanceSpec
from rota.serving.sim.vllm_machine import VllmMachine


class StockVllm(Journal):
    """A journal that keeps nothing: what each instance's machine is told, a stock vLLM scheduler of the same limits is
    told too, and what the machine orders must be what that scheduler decides: tokens of whom in which order, who is
    preempted, how many blocks are free.

    `first_difference` is where an instance and its scheduler parted; it is not followed from there on.
    """

    def __init__(self, header: Header, specs: Sequence[InstanceSpec]) -> None:
        super().__init__(header)
        self._engines = {f"instance/{spec.id}": _Follower(spec) for spec in specs}
        self.first_difference: str | None = None

    @property
    def num_equal_steps(self) -> int:
        """Steps that both decided alike, on all instances."""
        return sum(engine.num_equal_steps for engine in self._engines.values())

    @property
    def num_preemptions(self) -> int:
        """By vLLM's count."""
        return sum(engine.vllm.statistics().num_preemptions for engine in self._engines.values())

    @property
    def num_waiting_max(self) -> int:
        return max(engine.num_waiting_max for engine in self._engines.values())

    @property
    def num_free_blocks_min(self) -> int:
        return min(engine.num_free_blocks_min for engine in self._engines.values())

    def append(self, machine: str, at: Instant, kind: RowKind, event: Any, commands: Sequence[Any]) -> Row:
        if machine != CLUSTER:
            engine = self._engines[machine]
            if not engine.has_parted:
                difference = engine.follow(event, commands, at)
                if difference is not None and self.first_difference is None:
                    self.first_difference = f"{machine} at {at} ns: {difference}"
        self.num_rows += 1
        return Row(self.num_rows - 1, machine, at, kind, event, tuple(commands))


class _Follower:
    """One instance's scheduler."""

    def __init__(self, spec: InstanceSpec) -> None:
        self.vllm = VllmMachine(spec.limits, None)
        self.num_equal_steps = 0
        self.num_waiting_max = 0
        self.num_free_blocks_min = spec.limits.num_blocks
        self.has_parted = False
        self._step_id = 0
        """The scheduler's own, under way."""

    def follow(self, event: InstanceEvent, commands: Sequence[InstanceCommand], at: Instant) -> str | None:
        """Tell the scheduler of an event; what the machine ordered and the scheduler did not, or None."""
        if isinstance(event, StepFinished):
            decided = self._finish(event, at)
            if isinstance(decided, str):
                return self._part(decided)
        else:
            decided = self.vllm.handle(event, at)
        return self._compare(commands, decided)

    def _finish(self, event: StepFinished, at: Instant) -> Sequence[InstanceCommand] | str:
        # Who has its last token is the world's to say; vLLM adds those whose tokens are used up, and must add nobody.
        num_before = len(self.vllm.unfinished())
        decided = self.vllm.handle(StepFinished(self._step_id, event.finished), at)
        num_ended = num_before - len(self.vllm.unfinished())
        return decided if num_ended == len(event.finished) else f"{num_ended} ended in vLLM, {event.finished} here"

    def _compare(self, commands: Sequence[InstanceCommand], decided: Sequence[InstanceCommand]) -> str | None:
        if [type(command) for command in commands] != [type(command) for command in decided]:
            return self._part(f"{commands} here, {decided} by vLLM")
        for own, stock in zip(commands, decided, strict=True):
            if not isinstance(own, RunStep) or not isinstance(stock, RunStep):
                continue
            if _decision(own) != _decision(stock):
                return self._part(_shown(own, stock))
            self._take(stock)
        return None

    def _take(self, stock: RunStep) -> None:
        self._step_id = stock.step_id
        self.num_equal_steps += 1
        self.num_waiting_max = max(self.num_waiting_max, len(self.vllm.waiting))
        self.num_free_blocks_min = min(self.num_free_blocks_min, stock.num_free_blocks)

    def _part(self, difference: str) -> str:
        self.has_parted = True
        return f"after {self.num_equal_steps:,} equal steps: {difference}"


def _decision(step: RunStep) -> tuple[Any, ...]:
    return step.grants, step.preempted, step.num_free_blocks


def _shown(own: RunStep, stock: RunStep) -> str:
    """What the two decisions do not have in common."""
    ours, theirs = Counter(own.grants), Counter(stock.grants)
    here, there = list((ours - theirs).elements()), list((theirs - ours).elements())
    return (
        f"granted here only {here[:5]}, by vLLM only {there[:5]}; "
        f"preempted {own.preempted} here, {stock.preempted} by vLLM; free {own.num_free_blocks} here, "
        f"{stock.num_free_blocks} by vLLM"
    )
