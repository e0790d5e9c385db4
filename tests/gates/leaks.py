"""Policies that leak: each reads something that it must not, and some gate must catch it."""

import random
import time
from collections.abc import Iterable
from typing import Literal

from rota.serving.api import NOTHING, EngineCapabilities, EngineView, InOrder, Pool, SequenceView


class _Leaky:
    requires: EngineCapabilities = NOTHING
    running_order: Literal["admission", "own"] = "admission"
    displacing = False

    def open(self, view: EngineView, pool: Pool) -> InOrder:
        if pool is Pool.RUNNING:
            return InOrder(view.running)
        return InOrder(self.reorder(view, list(view.waiting)))

    def displaces(self, view: EngineView, waiting: SequenceView, running: SequenceView) -> bool:
        return False

    def reorder(self, view: EngineView, waiting: list[SequenceView]) -> list[SequenceView]:
        raise NotImplementedError


class ReadsTheClock(_Leaky):
    def reorder(self, view: EngineView, waiting: list[SequenceView]) -> list[SequenceView]:
        return waiting if time.perf_counter_ns() % 2 else waiting[::-1]


class ComparesWithAConstant(_Leaky):
    def reorder(self, view: EngineView, waiting: list[SequenceView]) -> list[SequenceView]:
        return waiting if view.now < 1_000_000_000_000 else waiting[::-1]


class DrawsUnseeded(_Leaky):
    def reorder(self, view: EngineView, waiting: list[SequenceView]) -> list[SequenceView]:
        return random.sample(waiting, len(waiting))


class WalksASet(_Leaky):
    def reorder(self, view: EngineView, waiting: list[SequenceView]) -> list[SequenceView]:
        by_id = {sequence.id: sequence for sequence in waiting}
        return [by_id[request_id] for request_id in set(by_id)]


class CountsWhatItGrants(_Leaky):
    """Turns the queue round with every token that its cursors hear of, and says that it may be leapt over."""

    repeatable = True

    def __init__(self) -> None:
        self.num_granted = 0

    def open(self, view: EngineView, pool: Pool) -> InOrder:
        waiting = list(view.waiting)
        sequences = view.running if pool is Pool.RUNNING else self.reorder(view, waiting)
        return _Counting(self, sequences)

    def reorder(self, view: EngineView, waiting: list[SequenceView]) -> list[SequenceView]:
        return waiting if self.num_granted % 2 else waiting[::-1]


class _Counting(InOrder):
    __slots__ = ("_policy",)

    def __init__(self, policy: CountsWhatItGrants, sequences: Iterable[SequenceView]) -> None:
        super().__init__(sequences)
        self._policy = policy

    def granted(self, sequence: SequenceView, num_tokens: int) -> None:
        self._policy.num_granted += num_tokens
