"""The bakery's machine: which oven bakes which loaves next."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

import msgspec

from rota.base.errors import LawBroken
from rota.base.instant import Duration, Instant, after
from rota.base.table import TransitionTable


class LoafOrdered(msgspec.Struct, frozen=True, tag=True):
    """A customer wants a loaf. How long it will really bake is not known."""

    loaf_id: str
    recipe_time: Duration


class BatchBaked(msgspec.Struct, frozen=True, tag=True):
    """A batch came out well."""

    oven: int


class BatchBurnt(msgspec.Struct, frozen=True, tag=True):
    """A batch was lost; its loaves must be baked again."""

    oven: int


class BakeBatch(msgspec.Struct, frozen=True, tag=True):
    """Put these loaves into an oven."""

    oven: int
    loaf_ids: tuple[str, ...]


class RefuseLoaf(msgspec.Struct, frozen=True, tag=True):
    """Too many loaves wait already."""

    loaf_id: str


BakeryEvent = LoafOrdered | BatchBaked | BatchBurnt
BakeryCommand = BakeBatch | RefuseLoaf


class LoafState(StrEnum):
    """Where a loaf is in its life."""

    ORDERED = "ordered"
    BAKING = "baking"
    DONE = "done"
    REFUSED = "refused"


LOAF = TransitionTable(
    "loaf",
    {
        LoafState.ORDERED: {"bake": LoafState.BAKING, "refuse": LoafState.REFUSED},
        LoafState.BAKING: {"baked": LoafState.DONE, "burnt": LoafState.ORDERED},
    },
    initial=LoafState.ORDERED,
    final=(LoafState.DONE, LoafState.REFUSED),
)


class LoafPolicy(Protocol):
    """Chooses whom to bake next."""

    def choose(self, waiting: Sequence[LoafOrdered], num_loaves: int) -> Sequence[LoafOrdered]:
        """At most `num_loaves` of `waiting`, which is never empty."""
        ...


class ShortestRecipeFirst:
    """The loaves with the shortest recipes; ties by id. Can starve long recipes."""

    def choose(self, waiting: Sequence[LoafOrdered], num_loaves: int) -> Sequence[LoafOrdered]:
        """See the class."""
        return sorted(waiting, key=lambda loaf: (loaf.recipe_time, loaf.loaf_id))[:num_loaves]


class Bakery:
    """Some ovens, a batch size, and a wait for fuller batches.

    It chooses in `expire`, after all of one instant was heard: the order within an instant cannot matter.
    """

    def __init__(
        self, policy: LoafPolicy, *, num_ovens: int = 2, batch_size: int = 3, patience: Duration, max_waiting: int = 100
    ) -> None:
        self.states: dict[str, str] = {}
        self.num_burnt = 0
        self._policy = policy
        self._batch_size = batch_size
        self._patience = patience
        self._max_waiting = max_waiting
        self._waiting: dict[str, LoafOrdered] = {}
        self._waited_since: Instant | None = None
        self._ovens: dict[int, tuple[LoafOrdered, ...]] = dict.fromkeys(range(num_ovens), ())
        self._deadline: Instant | None = None

    def handle(self, event: BakeryEvent, now: Instant) -> Sequence[BakeryCommand]:
        """Take a fact in; only a refusal is answered at once."""
        if isinstance(event, LoafOrdered):
            if event.loaf_id in self.states:
                raise LawBroken(f"loaf {event.loaf_id!r} was ordered twice")
            self.states[event.loaf_id] = LOAF.initial
            if len(self._waiting) >= self._max_waiting:
                self._move(event, "refuse")
                return (RefuseLoaf(event.loaf_id),)
            self._waiting[event.loaf_id] = event
        else:
            batch, self._ovens[event.oven] = self._ovens[event.oven], ()
            is_burnt = isinstance(event, BatchBurnt)
            self.num_burnt += len(batch) * is_burnt
            for loaf in batch:
                self._move(loaf, "burnt" if is_burnt else "baked")
                if is_burnt:
                    self._waiting[loaf.loaf_id] = loaf
        self._plan(now)
        return ()

    def next_deadline(self) -> Instant | None:
        """When the next batch must start, full or not."""
        return self._deadline

    def expire(self, now: Instant) -> Sequence[BakeryCommand]:
        """Fill every idle oven."""
        commands: list[BakeryCommand] = []
        for oven in sorted(oven for oven, batch in self._ovens.items() if not batch):
            if not self._waiting:
                break
            batch = tuple(self._policy.choose(tuple(self._waiting.values()), self._batch_size))
            for loaf in batch:
                self._move(loaf, "bake")
                del self._waiting[loaf.loaf_id]
            self._ovens[oven] = batch
            commands.append(BakeBatch(oven, tuple(loaf.loaf_id for loaf in batch)))
        self._waited_since = None
        self._plan(now)
        return commands

    def check(self) -> None:
        """Every unfinished loaf is in exactly one place."""
        places = [*self._waiting, *(loaf.loaf_id for batch in self._ovens.values() for loaf in batch)]
        if sorted(places) != sorted(self.unfinished()):
            raise LawBroken(f"loaves in places {sorted(places)}, but unfinished are {sorted(self.unfinished())}")

    def unfinished(self) -> Sequence[str]:
        """Loaves that are neither done nor refused, oldest first."""
        return [loaf_id for loaf_id, state in self.states.items() if state not in LOAF.final]

    def _plan(self, now: Instant) -> None:
        """A full batch starts now; a smaller one waits for company, but no longer than `patience`."""
        self._deadline = None
        if not self._waiting or all(self._ovens.values()):
            return
        if self._waited_since is None:
            self._waited_since = now
        is_full = len(self._waiting) >= self._batch_size
        self._deadline = now if is_full else max(now, after(self._waited_since, self._patience))

    def _move(self, loaf: LoafOrdered, event: str) -> None:
        self.states[loaf.loaf_id] = LOAF.move(self.states[loaf.loaf_id], event)
