"""Highest response ratio next: the wait in units of the work."""

from collections.abc import Iterator
from heapq import heapify, heappop, heapreplace
from math import log2
from typing import Any, Literal

from rota.serving.api import (
    Capability,
    EngineCapabilities,
    EngineView,
    InOrder,
    LengthPredictor,
    Pool,
    SequenceView,
)
from rota.serving.policies.parameters import above_zero

_KINDS_PER_DOUBLING = 4


class HighestResponseRatio:
    """Serve next whoever has waited the longest, in units of the work that it is predicted to be.

    Rule: highest response ratio next (Brinch Hansen, 1971): (wait + work) / work, work being the predicted output
    tokens and `prompt_weight` for each prompt token. Work is rounded to a quarter of a doubling, so that a step looks
    at the first of each such kind and not at everybody who waits. Nobody is displaced. One that was preempted is ahead
    of its kind. Classes go first.

    Good as a compromise: short work overtakes, and long work cannot be overtaken for ever, since its ratio grows
    without bound; between two requests of works a and b, the one of b that comes t later overtakes only while the first
    has waited less than t × a / (a - b). Starves nobody of the highest class; the mean is above that of
    `shortest_predicted_first`.
    """

    requires: EngineCapabilities = frozenset({Capability.ORDER_WAITING})
    running_order: Literal["admission", "own"] = "admission"
    displacing = False

    def __init__(self, *, lengths: LengthPredictor, prompt_weight: float = 0.02) -> None:
        """`prompt_weight` is what a prompt token costs where an output token costs 1."""
        above_zero("highest_response_ratio", prompt_weight=prompt_weight)
        self._lengths = lengths
        self._prompt_weight = prompt_weight

    def open(self, view: EngineView, pool: Pool) -> InOrder:
        return InOrder(view.running if pool is Pool.RUNNING else self._waiting(view))

    def displaces(self, view: EngineView, waiting: SequenceView, running: SequenceView) -> bool:
        return False

    def request_ended(self, request: Any, num_output_tokens: int | None) -> None:
        self._lengths.request_ended(request, num_output_tokens)

    def _kind(self, sequence: SequenceView) -> int:
        work = self._lengths.predict(sequence.request) + self._prompt_weight * sequence.num_prompt_tokens
        return round(_KINDS_PER_DOUBLING * log2(work))

    def _waiting(self, view: EngineView) -> Iterator[SequenceView]:
        waiting, now = view.waiting, view.now
        for priority in waiting.priorities():
            heads = []
            for kind in waiting.groups(priority, self._kind):
                assert isinstance(kind, int)
                work = 2.0 ** (kind / _KINDS_PER_DOUBLING)
                walk = waiting.of_group(priority, self._kind, kind)
                first = next(walk)
                heads.append((-(now - first.arrived_at) / work, first.queue_position, first, work, walk))
            heapify(heads)
            while heads:
                _, _, sequence, work, walk = heads[0]
                yield sequence
                following = next(walk, None)
                if following is None:
                    heappop(heads)
                else:
                    ratio = -(now - following.arrived_at) / work
                    heapreplace(heads, (ratio, following.queue_position, following, work, walk))
