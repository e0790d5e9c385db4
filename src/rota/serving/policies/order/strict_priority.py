"""Classes: the higher class first, and it displaces the lower one when it cannot start otherwise."""

import heapq
from collections.abc import Iterator
from typing import Literal

from rota.base.errors import ConfigError
from rota.base.instant import seconds
from rota.serving.api import Capability, EngineCapabilities, EngineView, InOrder, Pool, SequenceView


class StrictPriority:
    """Serve the class with the lowest `priority` number first, first come first served inside a class.

    A waiting sequence that cannot start otherwise displaces running ones of lower classes (higher numbers), never its
    equals. vLLM's own `--scheduling-policy priority` orders the queue alike but never displaces.

    With `ageing_seconds`, a request's class improves by one for every such span since its arrival, down to `top`.
    Bound: a request of class c is in the top class after (c − top) × ageing_seconds, and from then on nobody that
    arrives later overtakes or displaces it. Without ageing a lower class may starve for as long as higher ones keep
    the engine busy.

    Good when classes are few and the high ones small. Starves low classes under sustained load of higher ones.
    """

    requires: EngineCapabilities = frozenset(
        {Capability.ORDER_WAITING, Capability.ORDER_RUNNING, Capability.DISPLACE, Capability.PREEMPT_RECOMPUTE}
    )
    running_order: Literal["admission", "own"] = "own"
    displacing = True

    def __init__(self, *, ageing_seconds: float | None = None, top: int = 0) -> None:
        if ageing_seconds is not None and not ageing_seconds > 0:
            raise ConfigError(
                f"strict_priority: ageing_seconds must be above 0, not {ageing_seconds}",
                hint="leave it out for no ageing",
            )
        self._ageing = None if ageing_seconds is None else max(1, seconds(ageing_seconds))
        self._top = top
        self.repeatable = ageing_seconds is None

    def open(self, view: EngineView, pool: Pool) -> InOrder:
        if pool is Pool.WAITING:
            return InOrder(self._waiting(view))
        running = view.running
        first = running[0].priority if running else 0
        if self._ageing is None and all(sequence.priority == first for sequence in running):
            return InOrder(running)
        return InOrder(sorted(running, key=lambda sequence: self._class(view, sequence)))

    def displaces(self, view: EngineView, waiting: SequenceView, running: SequenceView) -> bool:
        return self._class(view, waiting) < self._class(view, running)

    def _class(self, view: EngineView, sequence: SequenceView) -> int:
        priority = sequence.priority
        if self._ageing is None or priority <= self._top:
            return priority
        return max(self._top, priority - (view.now - sequence.arrived_at) // self._ageing)

    def _waiting(self, view: EngineView) -> Iterator[SequenceView]:
        waiting = view.waiting
        if self._ageing is None:
            for priority in waiting.priorities():
                yield from waiting.of_priority(priority)
            return
        # Inside one class the queue order is the order of age but for those preempted, so the walk over each class must
        # look at all of its sequences: ageing costs a sort of the queue in every step that has room.
        yield from heapq.merge(
            *(
                sorted(waiting.of_priority(priority), key=lambda sequence: self._rank(view, sequence))
                for priority in waiting.priorities()
            ),
            key=lambda sequence: self._rank(view, sequence),
        )

    def _rank(self, view: EngineView, sequence: SequenceView) -> tuple[int, int]:
        return self._class(view, sequence), sequence.queue_position
