"""Policies that leak: each reads something that it must not, and some gate must catch it."""

import random
import time
from typing import Literal

from rota.serving.api import NOTHING, EngineView, InOrder, Pool, SequenceView


class _Leaky:
    requires = NOTHING
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
