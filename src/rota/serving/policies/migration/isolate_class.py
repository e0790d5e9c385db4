"""Keep low classes away from the high one."""

from collections.abc import Sequence, Set

from rota.serving.api import NOTHING, ClusterView, EngineCapabilities, InstanceView, Move, RequestId, SequenceReport
from rota.serving.policies.freeness import HIGH_LOAD_TARGET
from rota.serving.policies.migration.drain import empty_draining
from rota.serving.policies.migration.rounds import FRONTIER_STEPS, Round, Rounds, checked_interval


class IsolateClass:
    """Where the high class runs and an instance is loaded beyond a target, low classes leave until it is not.

    Rule: what the headroom of Llumnix (OSDI 2024) is for, done by itself: whoever is of the high class decodes in small
    batches. The lowest class leaves first, then the shortest, for the freest instance on which nobody of the high class
    runs and which stays above `destination_above` steps; where there is none, they stay. The high class never moves,
    but off an instance that drains, which is emptied before all.

    Published for one setting only (LLaMA-7B on an A10): a target of 1,600 of 13,616 tokens; here a share of the
    capacity. Never published: which class is high; here `priority` up to `high_priority_max`. A round every 0.05 s and
    one migration at a time are the public code's.

    Good for a small high class with targets for its time per token. Low classes pay: they pause to move, crowd the
    instances that are left, and move again when the high class comes after them, so keep it to fewer instances than
    there are. Dispatch policy `virtual_usage` keeps new requests of low classes away from it.
    """

    requires: EngineCapabilities = NOTHING
    reads_sequences = True

    def __init__(
        self,
        *,
        high_priority_max: int = -1,
        high_load_target: float = HIGH_LOAD_TARGET,
        destination_above: float = FRONTIER_STEPS,
        interval_seconds: float = 0.05,
        max_migrations: int = 1,
    ) -> None:
        """`high_load_target` is a share of the capacity in [0, 1]. `max_migrations` may be under way at an instance at
        once; the router has a limit of its own."""
        self.interval_seconds = checked_interval(interval_seconds)
        self._high_load_target = high_load_target
        self._destination_above = destination_above
        self._rounds = Rounds(
            max_migrations=max_migrations, high_priority_max=high_priority_max, high_load_target=high_load_target
        )

    def instance_reported(self, instance: InstanceView) -> None:
        self._rounds.read(instance)

    def plan(self, cluster: ClusterView, moving: Set[RequestId]) -> Sequence[Move]:
        planned = self._rounds.open(cluster, moving)
        empty_draining(planned)
        for source in cluster.instances:
            if planned.loads[source.id].num_high and not source.is_draining:
                self._isolate(planned, source)
        return self._rounds.close(planned, cluster.now)

    def _isolate(self, planned: Round, source: InstanceView) -> None:
        num_tokens_target = self._high_load_target * planned.loads[source.id].num_tokens_max
        if planned.loads[source.id].num_tokens <= num_tokens_target or planned.num_left(source.id) <= 0:
            return
        for sequence in planned.movable(source):
            num_tokens = planned.loads[source.id].num_tokens
            if num_tokens <= num_tokens_target or planned.num_left(source.id) <= 0:
                return
            destination = None if planned.is_high(sequence) else self._freest_without_high(planned, sequence)
            if destination is not None:
                reason = (
                    f"the high class runs on {source.id}, which is loaded with {num_tokens:,} tokens, "
                    f"more than {num_tokens_target:,.0f}; {destination.id} has none of it"
                )
                planned.add(sequence, source, destination, reason)

    def _freest_without_high(self, planned: Round, sequence: SequenceReport) -> InstanceView | None:
        for destination in planned.freest_above(self._destination_above):
            if planned.loads[destination.id].num_high:
                continue
            filled = planned.load_with(sequence, destination)
            if filled is not None and filled.freeness > self._destination_above:
                return destination
        return None
