"""Policies of queueing theory. Those by size know what no scheduler knows: here `max_tokens` is the true length."""

from collections.abc import Callable
from typing import ClassVar, Literal

from rota.base.random_streams import Stream
from rota.serving.api import (
    NOTHING,
    Capability,
    ClusterView,
    EngineCapabilities,
    EngineView,
    InOrder,
    Pick,
    Pool,
    Request,
    SequenceView,
)


class _ByKey:
    """Waiting sequences by `key`, first come first served among equals; nobody is displaced."""

    requires: EngineCapabilities = frozenset({Capability.ORDER_WAITING})
    running_order: Literal["admission", "own"] = "admission"
    displacing = False
    repeatable = True
    key: ClassVar[Callable[[SequenceView], int]]

    def open(self, view: EngineView, pool: Pool) -> InOrder:
        if pool is Pool.RUNNING:
            return InOrder(view.running)
        key = type(self).key
        return InOrder(sorted(view.waiting, key=lambda sequence: (key(sequence), sequence.queue_position)))

    def displaces(self, view: EngineView, waiting: SequenceView, running: SequenceView) -> bool:
        key = type(self).key
        return self.displacing and key(waiting) < key(running)


class ShortestPromptFirst(_ByKey):
    """Shortest job first, where the prompt is the job."""

    key = staticmethod(lambda sequence: sequence.num_prompt_tokens)


class LastComeFirst(_ByKey):
    """The youngest first, once the server is free."""

    key = staticmethod(lambda sequence: -sequence.arrived_at)


class _Displacing(_ByKey):
    requires: EngineCapabilities = frozenset(
        {Capability.ORDER_WAITING, Capability.DISPLACE, Capability.PREEMPT_RECOMPUTE}
    )
    displacing = True


class ShortestRemainingFirst(_Displacing):
    """Whoever needs the fewest steps to its end; a shorter one displaces."""

    key = staticmethod(lambda sequence: sequence.request.max_tokens - sequence.num_output_tokens)


class ShortestJobDisplaces(_Displacing):
    """By the whole length, whatever was served of it."""

    key = staticmethod(lambda sequence: sequence.request.max_tokens)


class LeastAttainedFirst(_Displacing):
    """Whoever was served least so far."""

    key = staticmethod(lambda sequence: sequence.num_output_tokens)


class AtRandom:
    """Any instance, all equally likely."""

    requires: EngineCapabilities = NOTHING

    def __init__(self, *, stream: Stream) -> None:
        self._stream = stream

    def pick(self, request: Request, cluster: ClusterView) -> Pick:
        return Pick(self._stream.choice([instance.id for instance in cluster.instances]), "drawn")
