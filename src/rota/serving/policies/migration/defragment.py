"""Make the head of a queue fit."""

from collections.abc import Sequence, Set

from rota.base.errors import ConfigError
from rota.serving.api import NOTHING, ClusterView, EngineCapabilities, InstanceView, Move, RequestId, SequenceReport
from rota.serving.policies.freeness import HIGH_LOAD_TARGET
from rota.serving.policies.migration.drain import empty_draining
from rota.serving.policies.migration.queue_heads import BlockedHead, blocked_heads, fewest_tokens
from rota.serving.policies.migration.rounds import FRONTIER_STEPS, Round, Rounds, checked_interval


class Defragment:
    """Where the head of a queue does not fit, those leave who make it fit with the fewest tokens moved.

    Rule: the defragmentation of Llumnix (OSDI 2024), which reaches it through freeness; here it is the aim itself.
    Memory that is free in all, but on no instance alone, helps nobody. For each blocked head, of the highest class
    first, then of those who lack least: if one that runs there is large enough, the shortest such; else the shortest
    and one more, up to `max_migrations` in all. Each goes to an instance of its own, the freest first, which must have
    a slot and stay above `destination_above` steps. If not all of them can go, none does. Before all, it empties
    instances that drain.

    Published: a round every 0.05 s, a threshold of 48 steps (3 blocks of 16 tokens a request). The public code moves
    one at a time; here `max_migrations` lets up to 4 leave for one head, and the router begins as many at once as its
    own limit allows. Ours: `max_heads`, which bounds what a round costs in a large fleet.

    Good when prompts are long and instances nearly full. Starves nobody of its class; a head that lacks more than
    `max_migrations` can free waits as it would have. See `defragment_plan` for many heads at once.
    """

    requires: EngineCapabilities = NOTHING
    reads_sequences = True

    def __init__(
        self,
        *,
        destination_above: float = FRONTIER_STEPS,
        interval_seconds: float = 0.05,
        max_migrations: int = 4,
        max_heads: int = 16,
        high_priority_max: int = -1,
        high_load_target: float = HIGH_LOAD_TARGET,
    ) -> None:
        """`max_heads` are helped in a round, of those that are blocked."""
        if max_heads < 1:
            raise ConfigError(f"max_heads must be at least 1, not {max_heads}")
        self._max_heads = max_heads
        self.interval_seconds = checked_interval(interval_seconds)
        self._destination_above = destination_above
        self._rounds = Rounds(
            max_migrations=max_migrations, high_priority_max=high_priority_max, high_load_target=high_load_target
        )

    def instance_reported(self, instance: InstanceView) -> None:
        self._rounds.read(instance)

    def plan(self, cluster: ClusterView, moving: Set[RequestId]) -> Sequence[Move]:
        planned = self._rounds.open(cluster, moving)
        empty_draining(planned)
        for head in blocked_heads(planned)[: self._max_heads]:
            make_fit(planned, head, self._destination_above)
        return self._rounds.close(planned, cluster.now)


def make_fit(planned: Round, head: BlockedHead, destination_above: float) -> bool:
    """Add the moves that make a head fit, all or none; whether they were added."""
    source = head.source
    candidates = sorted(planned.movable(source), key=_shortest)
    leaving = fewest_tokens(head, candidates, planned.num_left(source.id))
    destinations: list[InstanceView] = []
    for sequence in reversed(leaving):
        destination = _freest_that_stays_above(planned, sequence, destination_above, (source, *destinations))
        if destination is None:
            return False
        destinations.append(destination)
    num_tokens = sum(sequence.num_tokens for sequence in leaving)
    for sequence, destination in zip(reversed(leaving), destinations, strict=True):
        planned.add(sequence, source, destination, reason_for(head, len(leaving), num_tokens))
    return bool(leaving)


def reason_for(head: BlockedHead, num_moves: int, num_tokens: int) -> str:
    """Why so many moves of so many tokens in all are made for a head."""
    lack = f"{head.num_blocks_lacking:,} blocks" if head.num_blocks_lacking > 0 else "a slot"
    return (
        f"{head.request.request_id} heads the queue of {head.source.id} and lacks {lack}: "
        f"it fits after {num_moves} move{'s' * (num_moves > 1)} of {num_tokens:,} tokens"
    )


def _freest_that_stays_above(
    planned: Round, sequence: SequenceReport, steps: float, taken: Sequence[InstanceView]
) -> InstanceView | None:
    for destination in planned.freest_above(steps):
        filled = planned.load_with(sequence, destination)
        if filled is not None and filled.freeness > steps and destination not in taken:
            return destination
    return None


def _shortest(sequence: SequenceReport) -> tuple[int, RequestId]:
    return sequence.num_tokens, sequence.request_id
