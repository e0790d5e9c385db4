"""Move from the fullest to the freest."""

import heapq
from collections.abc import Iterator, Sequence, Set

from rota.base.errors import ConfigError
from rota.serving.api import NOTHING, ClusterView, EngineCapabilities, InstanceId, InstanceView, Move, RequestId
from rota.serving.policies.freeness import HIGH_LOAD_TARGET
from rota.serving.policies.migration.drain import empty_draining
from rota.serving.policies.migration.rounds import FRONTIER_STEPS, Round, Rounds, checked_interval


class BalanceLoad:
    """The least free instances give to the freest, until they need not any more.

    Rule: Llumnix (OSDI 2024). Sources have less freeness than `source_below`, destinations more than
    `destination_above`; the lowest source is paired with the highest destination, the next with the next. A source
    gives the lowest class first, then the shortest request, until it leaves the sources. A move must leave the
    destination above its threshold, so that no new source is made, and the two nearer to each other than they were. The
    default of the published code does not ask for that; its `balanced` variant does, and also refuses what makes the
    source the freer of the two, which leaves an instance stuck that is full of a few long requests. Before all,
    instances that drain are emptied.

    An instance whose queue has a head that does not fit is short of freeness by all that the head demands; so is one
    that preempted, since those preempted head its queue. The published code makes such instances sources by a rule of
    its own. Pairs are formed anew in each round.

    Published in the code: a round every 0.05 s, a threshold of 3 blocks a request (48 steps, for blocks of 16), one
    migration at a time for an instance. Never published: two thresholds that differ. Ours: `max_pairs`, which bounds
    what a round costs in a large fleet; the next round begins with those who are short of most again. The headroom is
    that of dispatch policy `virtual_usage`; give both the same parameters.

    Good when lengths are heavy-tailed, so that placing a request once is not enough. Starves nobody, but it is the
    short requests of the low classes that move and pause, some of them more than once.
    """

    requires: EngineCapabilities = NOTHING
    reads_sequences = True

    def __init__(
        self,
        *,
        source_below: float = FRONTIER_STEPS,
        destination_above: float = FRONTIER_STEPS,
        interval_seconds: float = 0.05,
        max_migrations: int = 1,
        max_pairs: int = 16,
        high_priority_max: int = -1,
        high_load_target: float = HIGH_LOAD_TARGET,
    ) -> None:
        """Thresholds are in steps; `destination_above` may not be below `source_below`. `max_migrations` may be under
        way at an instance at once; the router has a limit of its own. `max_pairs` are looked at in a round."""
        if max_pairs < 1:
            raise ConfigError(f"max_pairs must be at least 1, not {max_pairs}")
        if not destination_above >= source_below:
            raise ConfigError(
                f"destination_above ({destination_above}) must not be below source_below ({source_below})"
            )
        self.interval_seconds = checked_interval(interval_seconds)
        self._source_below = source_below
        self._destination_above = destination_above
        self._max_pairs = max_pairs
        self._rounds = Rounds(
            max_migrations=max_migrations, high_priority_max=high_priority_max, high_load_target=high_load_target
        )

    def instance_reported(self, instance: InstanceView) -> None:
        self._rounds.read(instance)

    def plan(self, cluster: ClusterView, moving: Set[RequestId]) -> Sequence[Move]:
        planned = self._rounds.open(cluster, moving)
        empty_draining(planned)
        sources = heapq.nsmallest(self._max_pairs, self._short(planned))
        freest = [view for view, _ in zip(planned.freest(), sources, strict=False)]
        for (_, source_id), destination in zip(sources, freest, strict=False):
            if planned.loads[destination.id].freeness > self._destination_above:
                self._relieve(planned, planned.views[source_id], destination)
        return self._rounds.close(planned, cluster.now)

    def _short(self, planned: Round) -> Iterator[tuple[float, InstanceId]]:
        """The sources, in no order."""
        for instance_id, load in planned.loads.items():
            steps = load.freeness
            if steps < self._source_below and not load.is_draining and planned.num_left(instance_id) > 0:
                yield steps, instance_id

    def _relieve(self, planned: Round, source: InstanceView, destination: InstanceView) -> None:
        for sequence in planned.movable(source):
            least, most = planned.loads[source.id].freeness, planned.loads[destination.id].freeness
            if least >= self._source_below or min(map(planned.num_left, (source.id, destination.id))) <= 0:
                return
            filled = planned.load_with(sequence, destination)
            if filled is None or filled.freeness <= self._destination_above:
                continue
            if abs(filled.freeness - planned.load_without(sequence, source).freeness) < most - least:
                reason = (
                    f"{source.id} can grow {least:,.0f} steps, {destination.id} {most:,.0f}: "
                    f"the shortest of the lowest class that brings them nearer ({sequence.num_tokens:,} tokens)"
                )
                planned.add(sequence, source, destination, reason)
