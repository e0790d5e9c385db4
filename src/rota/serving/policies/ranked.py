"""What orders by rank have in common: classes first, and within a class the lowest rank."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from rota.serving.api import (
    Capability,
    Cursor,
    EngineCapabilities,
    EngineView,
    InOrder,
    OnRefusal,
    Pool,
    Refusal,
    RequestId,
    SequenceView,
)

PREEMPTING: EngineCapabilities = frozenset(
    {Capability.ORDER_WAITING, Capability.ORDER_RUNNING, Capability.DISPLACE, Capability.PREEMPT_RECOMPUTE}
)
"""What an order needs in which those who wait may displace those who run."""

Rank = tuple[Any, ...]


class InOrderSkipping(InOrder):
    """A cursor that goes on past whoever does not fit, so that small requests fill what a large one leaves."""

    __slots__ = ()

    def refused(self, sequence: SequenceView, why: Refusal) -> OnRefusal:
        return OnRefusal.SKIP if why in (Refusal.NO_MEMORY, Refusal.NOT_PENDING) else OnRefusal.STOP


class RankedOrder(ABC):
    """An order in which whoever waits displaces whoever runs with a higher rank in the same class, and everybody of a
    lower class, if it cannot start otherwise.

    The rank of a sequence must not change while it waits, but for those given to `rank_again`.
    """

    requires: EngineCapabilities = PREEMPTING
    running_order: Literal["admission", "own"] = "own"
    displacing: bool = True
    repeatable: bool = False
    fixed_ranks = False
    """Whether the rank of a running sequence stays as it is until the policy says `forget_rank`, as it must when it
    ends or waits again. Then it is not asked for in every step."""

    def __init__(self, *, skip_refused: bool = False) -> None:
        """`skip_refused` goes on past a waiting sequence that does not fit, in place of ending the walk."""
        self._skip_refused = skip_refused
        if skip_refused:
            self.requires = self.requires | {Capability.SKIP_REFUSED}
        self._changed: list[RequestId] = []
        """Those whose rank has changed while they waited, since the last walk."""
        self._fixed: dict[RequestId, Rank] = {}
        self._lined_at = -1
        self._lined_up: list[SequenceView] = []
        self._line: list[SequenceView] = []
        """Those who run, by rank, as of the last time that it was asked: a step asks more than once."""
        self._looked_at = -1
        self._num_looks = 0
        """Steps that were looked at."""

    def only_order_waiting(self, is_so: bool) -> None:
        """Serve those who run in order of admission, and displace nobody."""
        if is_so:
            self.requires = (self.requires - PREEMPTING) | {Capability.ORDER_WAITING}
            self.running_order = "admission"
            self.displacing = False
            self.repeatable = True

    @abstractmethod
    def rank(self, sequence: SequenceView) -> Rank:
        """Where it stands within its class: lower is served first, equals in queue order or order of admission."""

    def tier(self, sequence: SequenceView) -> Rank:
        """Its rank as far as displacing goes; must order no two sequences otherwise than `rank` does."""
        return self.rank(sequence)

    def look(self, view: EngineView) -> None:  # noqa: B027  # not everybody needs to
        """Called once a step, before anything else."""

    def came_to_wait(self, sequence: SequenceView, rank: Rank) -> None:  # noqa: B027
        """Called once each time that a sequence has come to wait, or its rank has changed, by the next walk."""

    def open(self, view: EngineView, pool: Pool) -> Cursor:
        self._once_a_step(view)
        if pool is Pool.WAITING:
            return self._cursor(self._waiting(view))
        running = view.running
        if self.running_order == "admission" or len(running) < 2:
            return InOrder(running)
        if view.now != self._lined_at:
            self._line = self._by_rank(running)
        elif running != self._lined_up:
            self._line = self._without_displaced(running)
        else:
            return InOrder(self._line)
        self._lined_at, self._lined_up = view.now, list(running)
        return InOrder(self._line)

    def displaces(self, view: EngineView, waiting: SequenceView, running: SequenceView) -> bool:
        if not self.displacing:
            return False
        if waiting.priority != running.priority:
            return waiting.priority < running.priority
        return self.tier(waiting) < self.tier(running)

    def rank_again(self, sequence: SequenceView) -> None:
        """The rank of a waiting sequence is another from now on."""
        self._changed.append(sequence.id)

    def forget_rank(self, request_id: RequestId) -> None:
        """The rank of one that is in `fixed_ranks` is another from now on, or of no interest any more."""
        self._fixed.pop(request_id, None)

    def _by_rank(self, running: Sequence[SequenceView]) -> list[SequenceView]:
        if self.fixed_ranks:
            fixed = self._fixed
            for sequence in running:
                if sequence.id not in fixed:
                    fixed[sequence.id] = self.rank(sequence)
            line = sorted(running, key=lambda sequence: fixed[sequence.id])
        else:
            line = sorted(running, key=self.rank)
        line.sort(key=_priority_of)  # Most often all are of one class, and this is a look at each.
        return line

    def _without_displaced(self, running: Sequence[SequenceView]) -> list[SequenceView]:
        """The line of this step, after some have left it; anew if others have come."""
        still = {sequence.id for sequence in running}
        line = [sequence for sequence in self._line if sequence.id in still]
        return line if len(line) == len(running) else self._by_rank(running)

    def _once_a_step(self, view: EngineView) -> None:
        if view.now == self._looked_at:
            return
        self._looked_at = view.now
        self._num_looks += 1
        self.look(view)

    def _waiting(self, view: EngineView) -> Iterator[SequenceView]:
        changed, self._changed = self._changed, []
        return view.waiting.ranked(self._rank_of_newcomer, changed)

    def _rank_of_newcomer(self, sequence: SequenceView) -> Rank:
        rank = self.rank(sequence)
        self.came_to_wait(sequence, rank)
        return rank

    def _cursor(self, sequences: Iterable[SequenceView]) -> Cursor:
        return InOrderSkipping(sequences) if self._skip_refused else InOrder(sequences)


def _priority_of(sequence: SequenceView) -> int:
    return sequence.priority


class Idling:
    """Who waits, and since when, those who have waited longest first."""

    def __init__(self) -> None:
        self._since: dict[RequestId, tuple[int, SequenceView]] = {}

    def begin(self, sequence: SequenceView, at: int) -> None:
        """It has come to wait; `at` never falls."""
        self._since.pop(sequence.id, None)
        self._since[sequence.id] = (at, sequence)

    def end(self, request_id: RequestId) -> None:
        """It is served, or gone."""
        self._since.pop(request_id, None)

    def served(self, sequences: Iterable[SequenceView]) -> None:
        """These are not idle."""
        if self._since:
            for sequence in sequences:
                self._since.pop(sequence.id, None)

    def overdue(self, since: int) -> Iterator[SequenceView]:
        """Take out those who have waited since then or longer."""
        while self._since:
            request_id, (at, sequence) = next(iter(self._since.items()))
            if at > since:
                return
            del self._since[request_id]
            yield sequence
