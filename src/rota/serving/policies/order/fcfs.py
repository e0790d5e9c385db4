"""First come, first served."""

from collections.abc import Iterator
from typing import Literal

from rota.serving.api import (
    NOTHING,
    EngineCapabilities,
    EngineView,
    OnRefusal,
    Pool,
    Refusal,
    SequenceView,
)


class InOrder:
    """A cursor over sequences in a given order that stops at the first refusal, so that nobody is overtaken."""

    __slots__ = ("_sequences",)

    def __init__(self, sequences: Iterator[SequenceView]) -> None:
        self._sequences = sequences

    def next(self) -> SequenceView | None:
        return next(self._sequences, None)

    def granted(self, sequence: SequenceView, num_tokens: int) -> None:
        pass

    def refused(self, sequence: SequenceView, why: Refusal) -> OnRefusal:
        return OnRefusal.STOP


class Fcfs:
    """Serve in queue order: arrival, with preempted sequences at the front; running ones in order of admission.

    Rule: vLLM's default. Good when requests are alike. Starves nobody, but short work waits behind long work
    (head-of-line blocking), and a burst of one tenant delays all others."""

    requires: EngineCapabilities = NOTHING
    running_order: Literal["admission", "own"] = "admission"
    displacing = False

    def open(self, view: EngineView, pool: Pool) -> InOrder:
        return InOrder(iter(view.running if pool is Pool.RUNNING else view.waiting))

    def displaces(self, view: EngineView, waiting: SequenceView, running: SequenceView) -> bool:
        return False
