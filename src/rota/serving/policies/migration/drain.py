"""Empty the instances that drain."""

from collections.abc import Sequence, Set

from rota.serving.api import NOTHING, ClusterView, EngineCapabilities, InstanceView, Move, RequestId, SequenceReport
from rota.serving.policies.migration.rounds import Round, Rounds, checked_interval


class Drain:
    """Everybody who runs on an instance that drains goes on at the freest instance that has room, the lowest class
    first, then the shortest; nothing else moves.

    Rule: Llumnix (OSDI 2024), where an instance that should end counts as infinitely full, so that it gives and never
    takes. All the other migration policies begin with this one: a stack names one policy, whatever it is, and an
    instance that drains is emptied. One for whom nobody has room ends where it is; so does one who waits, unless it
    starts before.

    Published: one migration at a time for an instance, and a round every 0.05 s. Good whenever instances come and go.
    Starves nobody, but all who move pause for it, and those who are left last wait for the longest.
    """

    requires: EngineCapabilities = NOTHING
    reads_sequences = True

    def __init__(self, *, interval_seconds: float = 0.05, max_migrations: int = 1) -> None:
        """`max_migrations` may be under way at an instance at once. The router has a limit of its own."""
        self.interval_seconds = checked_interval(interval_seconds)
        self._rounds = Rounds(max_migrations=max_migrations)

    def instance_reported(self, instance: InstanceView) -> None:
        self._rounds.read(instance)

    def plan(self, cluster: ClusterView, moving: Set[RequestId]) -> Sequence[Move]:
        planned = self._rounds.open(cluster, moving)
        empty_draining(planned)
        return self._rounds.close(planned, cluster.now)


def empty_draining(planned: Round) -> None:
    """Add the moves that empty the instances that drain."""
    draining = [planned.views[instance_id] for instance_id, load in planned.loads.items() if load.is_draining]
    for source in draining:
        for sequence in planned.movable(source):
            if planned.num_left(source.id) <= 0:
                break
            destination = _freest_with_room(planned, sequence)
            if destination is not None:
                steps = planned.loads[destination.id].freeness
                reason = f"{source.id} drains; {destination.id} has room for it, and the most freeness ({steps:,.0f})"
                planned.add(sequence, source, destination, reason)


def _freest_with_room(planned: Round, sequence: SequenceReport) -> InstanceView | None:
    for destination in planned.freest():
        if planned.load_with(sequence, destination) is not None:
            return destination
    return None
