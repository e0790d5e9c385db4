"""Go where the batch can grow longest."""

from collections.abc import Sequence

from rota.base.errors import ConfigError
from rota.serving.api import NOTHING, ClusterView, EngineCapabilities, InstanceView, Pick, Request
from rota.serving.policies.freeness import HIGH_LOAD_TARGET, Freeness

_HALF_SCORE_STEPS = 1024.0


class VirtualUsage:
    """The instance with the most freeness: (capacity - virtual usage) / requests, the decode steps that its batch can
    grow; the first by id if equal.

    Rule: Llumnix's dispatch (OSDI 2024). Virtual usage is what those who run hold, plus all that the head of the queue
    demands, plus headroom beside the high class; an instance that drains is full. See `rota.serving.policies.freeness`.
    What is queued behind the head counts nothing, as in the paper; `whole_queue` counts it, as the public code does
    unless told to defragment.

    Reports are late, so what was dispatched since counts too: requests that are outstanding at the router beyond those
    that the report tells of, with the prompt tokens that are outstanding beyond theirs. A request that ended is taken
    off at once. An instance that does not tell of its sequences is judged by its blocks and outstanding prompts.

    Among more than `num_examined` instances, half of that many are looked at in turn, and beside them the half that
    were freest at their last look; all at first, and whenever instances come or go. So a decision costs the same in any
    fleet, and an instance that became free is seen a few decisions later.

    Published: the rule. Published for one setting only (LLaMA-7B on an A10): the headroom, which `high_load_target`
    makes a share of the capacity. Never published: which class is high; here `priority` up to `high_priority_max`,
    so that the default class 0 is not. Ours: `num_examined`. The score is 1/2 at a freeness of 0, and 3/4 at 1,024
    steps.

    Good when lengths differ much and memory is what runs out. Starves nobody, but ignores cached prefixes.
    """

    requires: EngineCapabilities = NOTHING
    reads_sequences = True

    def __init__(
        self,
        *,
        high_priority_max: int = -1,
        high_load_target: float = HIGH_LOAD_TARGET,
        whole_queue: bool = False,
        num_examined: int = 64,
    ) -> None:
        """`high_load_target` is a share of the capacity in [0, 1]; `num_examined` counts instances, at least 2. Raises
        `ConfigError` outside of that."""
        if num_examined < 2:
            raise ConfigError(f"num_examined must be at least 2 instances, not {num_examined}")
        self._freeness = Freeness(
            high_priority_max=high_priority_max, high_load_target=high_load_target, whole_queue=whole_queue
        )
        self._num_examined = num_examined
        self._instances: Sequence[InstanceView] = ()
        self._freest: list[int] = []
        self._turn = 0

    def pick(self, request: Request, cluster: ClusterView) -> Pick:
        instances = cluster.instances
        self._freeness.forget_others(instances)
        freeness_of = self._freeness.of
        if len(instances) <= self._num_examined:
            found = [freeness_of(view) for view in instances]
            most = max(found)
            chosen = instances[found.index(most)]
            scores = tuple([(view.id, _score(freeness)) for view, freeness in zip(instances, found, strict=True)])
            return Pick(chosen.id, f"most freeness ({most:,.0f} steps) of {len(instances)}", scores)
        ranked = sorted([(-freeness_of(instances[position]), position) for position in self._positions(instances)])
        self._freest = [position for _, position in ranked[: self._num_examined // 2]]
        owed, position = ranked[0]
        reason = f"most freeness ({-owed:,.0f} steps) of {len(ranked)} looked at among {len(instances)}"
        return Pick(
            instances[position].id, reason, tuple([(instances[each].id, _score(-owed)) for owed, each in ranked])
        )

    def _positions(self, instances: Sequence[InstanceView]) -> Sequence[int] | set[int]:
        """Which of many instances to look at, by position."""
        if instances is not self._instances:
            self._instances = instances
            self._turn = 0
            return range(len(instances))
        num_in_turn = self._num_examined - self._num_examined // 2
        start, self._turn = self._turn, (self._turn + num_in_turn) % len(instances)
        in_turn = range(start, start + num_in_turn)
        return {position % len(instances) for position in in_turn}.union(self._freest)


def _score(freeness: float) -> float:
    """Freeness as a score in [0, 1] that rises with it."""
    if freeness < 0.0:
        return 0.5 / (1.0 - freeness / _HALF_SCORE_STEPS)
    return 1.0 - 0.5 / (1.0 + freeness / _HALF_SCORE_STEPS)
