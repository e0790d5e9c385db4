"""The search for a plan: which blocked heads are helped, who leaves for each, and where they go."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rota.serving.api import InstanceView, SequenceReport
from rota.serving.policies.freeness import blocks_for
from rota.serving.policies.migration.queue_heads import BlockedHead
from rota.serving.policies.migration.rounds import Round

MAX_WAYS = 12
"""Ways to help a head that are tried, those of the fewest tokens."""


class Placed(NamedTuple):
    """One who leaves for a head, and where it goes."""

    head: BlockedHead
    sequence: SequenceReport
    destination: InstanceView


class Found(NamedTuple):
    """What a search came to."""

    moves: tuple[Placed, ...]
    """Of the best plan; empty where none is better than the one that was known."""
    is_best: bool
    """Whether no plan is better, of those among the candidates and destinations that were given."""


class _Leaving(NamedTuple):
    """One who may leave, and what it would use at each destination."""

    sequence: SequenceReport
    num_tokens: tuple[int | None, ...]
    """By destination; None where it cannot go."""
    fewest: int


class _Way(NamedTuple):
    """Some who together make room for a head, the largest first."""

    num_tokens: int
    """At least."""
    leaving: tuple[_Leaving, ...]


@dataclass(slots=True)
class _Place:
    """What a destination can take still."""

    view: InstanceView
    room: int
    """Tokens of capacity before it falls to the threshold; each who comes also takes the threshold."""
    num_slots: int
    kind: tuple[int, bool]
    """What else decides who may go there: places of a kind with equal room are alike."""


class PlanSearch:
    """Branch and bound over heads, the ways to help each, and places. As many heads as possible are helped, then the
    fewest tokens move. It looks for a place up to `max_looks` times; the best plan found until then is the answer, so
    the same views give the same moves on any machine."""

    def __init__(
        self, planned: Round, destinations: Sequence[InstanceView], destination_above: float, max_looks: int
    ) -> None:
        self._planned = planned
        self._threshold = math.ceil(destination_above)
        self._places = [each for each in map(self._place, destinations) if each.room > 0 and each.num_slots > 0]
        self._room = sum([place.room for place in self._places])
        self._num_looks_left = max_looks
        self._is_whole = True
        self._heads: list[tuple[BlockedHead, list[_Way]]] = []
        self._fewest: list[list[int]] = []
        self._placed: list[Placed] = []
        self._best: tuple[int, int] = (0, 0)
        self._best_moves: tuple[Placed, ...] = ()

    def help(self, head: BlockedHead, candidates: Sequence[SequenceReport]) -> None:
        """Let a head be helped by those of `candidates` who leave."""
        able = [each for each in map(self._leaving, candidates) if each is not None]
        ways: list[_Way] = []
        for num_moves in range(1, min(self._planned.num_left(head.source.id), len(able)) + 1):
            for chosen in itertools.combinations(able, num_moves):
                blocks = [each.sequence.num_blocks for each in chosen]
                num_freed = sum(blocks)
                # Whoever is not needed stays.
                if num_freed >= head.num_blocks_lacking and (
                    num_moves == 1 or num_freed - min(blocks) < head.num_blocks_lacking
                ):
                    ways.append(_Way(sum([each.fewest for each in chosen]), chosen))
        if ways:
            ways.sort(key=lambda way: (way.num_tokens, len(way.leaving)))
            self._is_whole &= len(ways) <= MAX_WAYS
            self._heads.append((head, ways[:MAX_WAYS]))

    def better_than(self, num_helped: int, num_tokens: int) -> Found:
        """The best plan found, if it helps more heads than `num_helped`, or as many with fewer tokens."""
        self._best = (num_helped, -num_tokens)
        self._heads.sort(key=lambda each: each[1][0].num_tokens)
        # For those from each position on: the tokens of the cheapest one, of the cheapest two, ...
        costs = [ways[0].num_tokens for _, ways in self._heads]
        self._fewest = [[0, *itertools.accumulate(costs[start:])] for start in range(len(costs) + 1)]
        self._visit(0, 0, 0)
        return Found(self._best_moves, self._is_whole and self._num_looks_left > 0)

    def _visit(self, position: int, num_helped: int, num_tokens: int) -> None:
        """Try all that can be done for the heads from `position` on."""
        if (num_helped, -num_tokens) > self._best:
            self._best, self._best_moves = (num_helped, -num_tokens), tuple(self._placed)
        if position == len(self._heads) or self._is_hopeless(position, num_helped, num_tokens):
            return
        head, ways = self._heads[position]
        for way in ways:
            self._put(head, way.leaving, 0, (position + 1, num_helped + 1, num_tokens))
            if self._num_looks_left <= 0 or self._is_hopeless(position, num_helped, num_tokens):
                return
        self._visit(position + 1, num_helped, num_tokens)

    def _put(self, head: BlockedHead, leaving: tuple[_Leaving, ...], number: int, then: tuple[int, int, int]) -> None:
        """Put those from `number` on somewhere, where it is tightest first, and go on with the next head."""
        if number == len(leaving):
            self._visit(*then)
            return
        self._num_looks_left -= 1
        moving = leaving[number]
        fitting = [
            (num_tokens, place.room, place.num_slots, place.kind, position)
            for position, (place, num_tokens) in enumerate(zip(self._places, moving.num_tokens, strict=True))
            if num_tokens is not None and place.num_slots > 0 and num_tokens + self._threshold <= place.room
        ]
        tried = None
        for *like, position in sorted(fitting):
            if like == tried:
                continue  # A place like the one before: it comes to the same.
            if self._num_looks_left <= 0:
                return
            tried, place, num_tokens = like, self._places[position], moving.num_tokens[position]
            assert num_tokens is not None
            self._take(place, num_tokens, 1)
            self._placed.append(Placed(head, moving.sequence, place.view))
            self._put(head, leaving, number + 1, (then[0], then[1], then[2] + num_tokens))
            self._placed.pop()
            self._take(place, num_tokens, -1)

    def _take(self, place: _Place, num_tokens: int, sign: int) -> None:
        used = sign * (num_tokens + self._threshold)
        place.room -= used
        self._room -= used
        place.num_slots -= sign

    def _is_hopeless(self, position: int, num_helped: int, num_tokens: int) -> bool:
        """Whether nothing better can come of it, whatever is done for the heads from `position` on."""
        num_best, owed = self._best
        fewest = self._fewest[position]
        num_more = len(fewest) - 1
        while num_more and fewest[num_more] + num_more * self._threshold > self._room:
            num_more -= 1
        if num_helped + num_more != num_best:
            return num_helped + num_more < num_best
        return num_tokens + fewest[num_best - num_helped] >= -owed

    def _place(self, view: InstanceView) -> _Place:
        load = self._planned.loads[view.id]
        kept = load.headroom if load.num_high else 0
        # Freeness above the threshold, times the requests.
        room = load.num_free_tokens - kept - self._threshold * load.num_requests - 1
        num_slots = min(view.max_num_seqs - load.num_requests, self._planned.num_left(view.id))
        return _Place(view, room, num_slots, (view.block_size, load.num_high > 0))

    def _leaving(self, sequence: SequenceReport) -> _Leaving | None:
        """Where a request may go; None if nowhere. Where nobody of the high class runs, one of it would bring headroom
        with it, which is not reckoned with, so it does not go there."""
        is_high, loads = self._planned.is_high(sequence), self._planned.loads
        found: list[int | None] = []
        for place in self._places:
            block_size = place.view.block_size
            num_tokens = blocks_for(sequence.num_tokens, block_size) * block_size
            fits = place.num_slots > 0 and num_tokens + self._threshold <= place.room
            found.append(num_tokens if fits and (not is_high or loads[place.view.id].num_high) else None)
        possible = [each for each in found if each is not None]
        return _Leaving(sequence, tuple(found), min(possible)) if possible else None
