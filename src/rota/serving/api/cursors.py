"""The cursor that most order policies need."""

from collections.abc import Iterable

from rota.serving.api.decisions import OnRefusal, Refusal
from rota.serving.api.views import SequenceView


class InOrder:
    """A cursor over sequences in a given order that stops at the first refusal, so that nobody is overtaken."""

    __slots__ = ("_sequences",)

    def __init__(self, sequences: Iterable[SequenceView]) -> None:
        self._sequences = iter(sequences)

    def next(self) -> SequenceView | None:
        return next(self._sequences, None)

    def granted(self, sequence: SequenceView, num_tokens: int) -> None:
        pass

    def refused(self, sequence: SequenceView, why: Refusal) -> OnRefusal:
        return OnRefusal.STOP
