"""What the migration policies share: one round of planning, and what is remembered from one round to the next.

A report is a second old where a round comes every 50 ms. Unless it remembered its own moves, a policy would find the
same instance freest for twenty rounds and send all that it has there.
"""

import heapq
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from rota.base.errors import ConfigError
from rota.base.instant import Duration, Instant, after, seconds
from rota.serving.api import ClusterView, InstanceId, InstanceView, Move, RequestId, Role, SequenceReport
from rota.serving.policies.freeness import HIGH_LOAD_TARGET, Freeness, Load, blocks_for, room_of

SET_ASIDE: Duration = seconds(5)
"""How long a request is left alone after a move of it came to nothing. Not published; the published code tries again at
once."""
FRONTIER_STEPS = 48.0
"""Freeness below which an instance should give, and above which one may take: 3 blocks of 16 tokens for each request,
the default in the published code."""


@dataclass(slots=True)
class _Sent:
    """A move that was wanted, until a report of its destination must know of it."""

    source: InstanceId
    destination: InstanceId
    num_tokens: int
    is_high: bool
    last_seen_at: Instant
    """When it was wanted, or last on its way."""


class Rounds:
    """Opens rounds, and remembers the moves of those before until reports tell of them."""

    def __init__(
        self,
        *,
        max_migrations: int,
        high_priority_max: int = -1,
        high_load_target: float = HIGH_LOAD_TARGET,
    ) -> None:
        if max_migrations < 1:
            raise ConfigError(f"max_migrations must be at least 1, not {max_migrations}")
        self.freeness = Freeness(high_priority_max=high_priority_max, high_load_target=high_load_target)
        self._max_migrations = max_migrations
        self._sent: dict[RequestId, _Sent] = {}
        self._set_aside_until: dict[RequestId, Instant] = {}

    def read(self, instance: InstanceView) -> None:
        """Read an instance ahead of the next round, which reads it again only if it has changed until then."""
        self.freeness.load(instance)

    def open(self, cluster: ClusterView, moving: Set[RequestId]) -> "Round":
        """A round over what is shown, with the load of an instance as it is once the moves to it are over."""
        now = cluster.now
        self.freeness.forget_others(cluster.instances)
        views = {view.id: view for view in cluster.instances}
        self._set_aside_until = {each: until for each, until in self._set_aside_until.items() if until > now}
        for request_id, sent in list(self._sent.items()):
            if request_id in moving:
                sent.last_seen_at = now
            elif self._came_to_nothing(request_id, views.get(sent.source)):
                self._set_aside_until[request_id] = after(now, SET_ASIDE)
                del self._sent[request_id]
            elif _is_reported(sent, views.get(sent.destination)):
                del self._sent[request_id]
        loads = {view.id: self.freeness.load(view) for view in cluster.instances}
        for sent in self._sent.values():
            if sent.destination in loads:
                loads[sent.destination] = loads[sent.destination].with_request(sent.num_tokens, is_high=sent.is_high)
        excluded = moving | self._set_aside_until.keys() | self._sent.keys()
        return Round(views, loads, excluded, self._max_migrations, self.freeness)

    def close(self, opened: "Round", now: Instant) -> Sequence[Move]:
        """The moves of a round, which are remembered."""
        for move in opened.moves:
            num_tokens, is_high = opened.sent[move.request_id]
            self._sent[move.request_id] = _Sent(move.source, move.destination, num_tokens, is_high, now)
        return opened.moves

    def _came_to_nothing(self, request_id: RequestId, source: InstanceView | None) -> bool:
        """Whether one that is not on its way still runs where it was."""
        return source is not None and any(each.request_id == request_id for each in source.running)


def _is_reported(sent: _Sent, destination: InstanceView | None) -> bool:
    if destination is None:
        return True
    observed_at = destination.observed_at
    return observed_at is not None and observed_at > sent.last_seen_at


class Round:
    """One round of planning: each move that is added changes the loads that the next one sees."""

    def __init__(
        self,
        views: dict[InstanceId, InstanceView],
        loads: dict[InstanceId, Load],
        excluded: Set[RequestId],
        max_migrations: int,
        freeness: Freeness,
    ) -> None:
        self.views = views
        self.loads = loads
        self.moves: list[Move] = []
        self.sent: dict[RequestId, tuple[int, bool]] = {}
        """Usage at its destination, and whether it is of the high class, of each that moves in this round."""
        self._excluded = excluded
        self._freeness = freeness
        self._max_migrations = max_migrations
        self._num_planned: dict[InstanceId, int] = {}
        self._freest: list[tuple[float, InstanceId]] | None = None

    def fork(self) -> "Round":
        """Another round in the same state, to try moves on."""
        other = Round(self.views, dict(self.loads), self._excluded, self._max_migrations, self._freeness)
        other.moves = list(self.moves)
        other.sent = dict(self.sent)
        other._num_planned = dict(self._num_planned)
        other._freest = None if self._freest is None else list(self._freest)
        return other

    def num_left(self, instance_id: InstanceId) -> int:
        """Moves from or to an instance that may still begin."""
        num_begun = self.views[instance_id].num_migrations + self._num_planned.get(instance_id, 0)
        return self._max_migrations - num_begun

    def is_high(self, sequence: SequenceReport) -> bool:
        return self._freeness.is_high(sequence)

    def num_free_blocks(self, view: InstanceView) -> int:
        """By the last report, or by those who still run, if that is more: some have ended since. Shared blocks make
        the second too few."""
        return max(view.num_blocks - self._freeness.num_blocks_held(view), view.num_free_blocks or 0)

    def movable(self, source: InstanceView) -> list[SequenceReport]:
        """Who may move: those who run with their prompt computed, and are not on their way. The lowest class first,
        then the shortest."""
        block_size, excluded, planned = source.block_size, self._excluded, self.sent
        found = [
            each
            for each in source.running
            if each.num_blocks * block_size >= each.num_tokens - 1  # not in its prefill
            and each.request_id not in excluded
            and each.request_id not in planned
        ]
        return sorted(found, key=_lowest_class_then_shortest)

    def may_receive(self, view: InstanceView) -> bool:
        """Whether an instance takes requests, and may take part in one more move."""
        return not view.is_draining and view.role is not Role.PREFILL and self.num_left(view.id) > 0

    def load_with(self, sequence: SequenceReport, destination: InstanceView) -> Load | None:
        """The load of an instance with one more request; None where a slot or room for it lacks."""
        load = self.loads[destination.id]
        num_tokens = blocks_for(sequence.num_tokens, destination.block_size) * destination.block_size
        if load.num_requests >= destination.max_num_seqs or load.num_free_tokens < num_tokens:
            return None
        return load.with_request(num_tokens, is_high=self.is_high(sequence))

    def load_without(self, sequence: SequenceReport, source: InstanceView) -> Load:
        """The load of an instance with one request less."""
        num_tokens = room_of(sequence, source.block_size)
        return self.loads[source.id].without_request(num_tokens, is_high=self.is_high(sequence))

    def add(self, sequence: SequenceReport, source: InstanceView, destination: InstanceView, reason: str) -> None:
        """Move a request from `source` to `destination`, for which `load_with` has room."""
        load = self.load_with(sequence, destination)
        assert load is not None
        request_id = sequence.request_id
        self.moves.append(Move(request_id, source.id, destination.id, reason))
        self.sent[request_id] = (load.num_tokens - self.loads[destination.id].num_tokens, self.is_high(sequence))
        self.loads[source.id] = self.load_without(sequence, source)
        self.loads[destination.id] = load
        for view in (source, destination):
            self._num_planned[view.id] = self._num_planned.get(view.id, 0) + 1

    def freest_above(self, steps: float) -> Iterator[InstanceView]:
        """As `freest`, without those that one more request cannot leave above so many steps."""
        for view in self.freest():
            # A request more never makes an instance freer, but for one that owes: there it shares the debt.
            if steps >= 0.0 and self.loads[view.id].freeness <= steps:
                return
            yield view

    def freest(self) -> Iterator[InstanceView]:
        """The instances that may receive, the freest first, by id if equal. Loads may change between two calls, not
        while one is walked."""
        if self._freest is None:
            self._freest = [(-load.freeness, instance_id) for instance_id, load in self.loads.items()]
            heapq.heapify(self._freest)
        heap, walked = self._freest, []
        try:
            while heap:
                entry = heapq.heappop(heap)
                view = self.views[entry[1]]
                current = (-self.loads[view.id].freeness, view.id)
                if current != entry:
                    heapq.heappush(heap, current)
                elif self.may_receive(view):
                    walked.append(entry)
                    yield view
        finally:
            for entry in walked:
                heapq.heappush(heap, entry)


def _lowest_class_then_shortest(sequence: SequenceReport) -> tuple[int, int, RequestId]:
    return -sequence.priority, sequence.num_tokens, sequence.request_id


def checked_interval(interval_seconds: float) -> float:
    """The interval of a policy, in seconds. Raises `ConfigError` unless it is above 0."""
    if not interval_seconds > 0.0:
        raise ConfigError(f"interval_seconds must be above 0, not {interval_seconds}")
    return interval_seconds
