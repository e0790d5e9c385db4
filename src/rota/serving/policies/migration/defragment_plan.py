"""Make many heads of queues fit at once."""

from collections.abc import Sequence, Set

from rota.base.errors import ConfigError
from rota.serving.api import NOTHING, ClusterView, EngineCapabilities, InstanceView, Move, RequestId, SequenceReport
from rota.serving.policies.freeness import HIGH_LOAD_TARGET
from rota.serving.policies.migration.defragment import make_fit, reason_for
from rota.serving.policies.migration.drain import empty_draining
from rota.serving.policies.migration.plan_program import Program, solver_module
from rota.serving.policies.migration.plan_search import Placed, PlanSearch
from rota.serving.policies.migration.queue_heads import BlockedHead, blocked_heads, fewest_tokens
from rota.serving.policies.migration.rounds import FRONTIER_STEPS, Round, Rounds, checked_interval
from rota.serving.policies.parameters import at_least_one


class DefragmentPlan:
    """As many blocked heads as possible fit, then the fewest tokens move: chosen for all heads at once.

    Rule: what `defragment` does one head at a time, as an integer program, in the way of VM rescheduling (VM2RL), which
    plans under a budget of moves. A variable says that a request goes to an instance, another that a head is helped. A
    head is helped if those who leave free what it lacks; an instance takes no more than keeps it above
    `destination_above` steps and within its slots. First as many heads as possible are helped, then the fewest tokens
    move. Beside it runs `defragment`: its answer is the bound that a plan must beat, so the plan is never worse.

    The program stays small: `max_heads` heads, of the highest class first, then of those who lack least;
    `max_candidates` of those who run beside each; the `max_destinations` freest instances. Within these a branch and
    bound looks up to `max_looks` times for a place. Where it does not prove its plan the best by then, a
    `search_limit` above 0 lets OR-Tools go on from there: up to about a second a unit, for which the router stands
    still. That is the solver's own measure of work. Neither limit depends on the machine: the same views give the same
    moves. What is seen is late, so the router looks again before each move, and drops what does not hold any more.

    All constants are ours but the threshold and `max_migrations` (see `defragment`). Good for large fleets, nearly
    full, with long prompts. Starves a head that is costly to help for as long as the others are cheaper. With
    `search_limit` it needs OR-Tools: `pip install 'rota[planner]'`.
    """

    requires: EngineCapabilities = NOTHING
    reads_sequences = True

    def __init__(
        self,
        *,
        destination_above: float = FRONTIER_STEPS,
        interval_seconds: float = 1.0,
        max_migrations: int = 4,
        max_heads: int = 8,
        max_candidates: int = 8,
        max_destinations: int = 8,
        max_looks: int = 200,
        search_limit: float = 0.0,
        high_priority_max: int = -1,
        high_load_target: float = HIGH_LOAD_TARGET,
    ) -> None:
        """Raises `ConfigError` for a limit below 1 and a threshold below 0, and without OR-Tools where
        `search_limit` is above 0."""
        at_least_one(
            "defragment_plan",
            max_heads=max_heads,
            max_candidates=max_candidates,
            max_destinations=max_destinations,
            max_looks=max_looks,
        )
        if not search_limit >= 0.0:
            raise ConfigError(f"search_limit must be at least 0, not {search_limit}")
        if not destination_above >= 0.0:
            raise ConfigError(f"destination_above must be at least 0 steps, not {destination_above}")
        self.interval_seconds = checked_interval(interval_seconds)
        self._destination_above = destination_above
        self._max_heads = max_heads
        self._max_candidates = max_candidates
        self._max_destinations = max_destinations
        self._search_limit = search_limit
        self._max_looks = max_looks
        self._solver_module = solver_module() if search_limit > 0.0 else None
        self._rounds = Rounds(
            max_migrations=max_migrations, high_priority_max=high_priority_max, high_load_target=high_load_target
        )

    def instance_reported(self, instance: InstanceView) -> None:
        self._rounds.read(instance)

    def plan(self, cluster: ClusterView, moving: Set[RequestId]) -> Sequence[Move]:
        planned = self._rounds.open(cluster, moving)
        empty_draining(planned)
        heads = blocked_heads(planned)[: self._max_heads]
        if not heads:
            return self._rounds.close(planned, cluster.now)
        num_before = len(planned.moves)
        destinations = [view for view, _ in zip(planned.freest(), range(self._max_destinations), strict=False)]
        greedy = planned.fork()
        for head in heads:
            make_fit(greedy, head, self._destination_above)
        candidates = [(head, self._candidates(planned, head)) for head in heads]
        best = self._searched(planned, greedy, candidates, destinations, num_before)
        return self._rounds.close(best, cluster.now)

    def _searched(
        self,
        planned: Round,
        greedy: Round,
        candidates: Sequence[tuple[BlockedHead, Sequence[SequenceReport]]],
        destinations: Sequence[InstanceView],
        num_before: int,
    ) -> Round:
        """The round with the best plan found; `greedy` if none is better."""
        search = PlanSearch(planned, destinations, self._destination_above, self._max_looks)
        for head, able in candidates:
            search.help(head, able)
        num_helped, owed = _worth(greedy, num_before)
        found = search.better_than(num_helped, -owed)
        best = self._with(planned, found.moves, len(candidates)) if found.moves else greedy
        if found.is_best or self._solver_module is None:
            return best
        program = Program(self._solver_module, planned, self._destination_above)
        for head, able in candidates:
            program.help(head, able, destinations)
        program.bound(destinations)
        program.start_from({(move.request_id, move.destination) for move in best.moves})
        solved = self._with(planned, program.solved(self._search_limit), len(candidates))
        return max(best, solved, key=lambda each: _worth(each, num_before))

    def _with(self, planned: Round, placed: Sequence[Placed], num_heads: int) -> Round:
        """Another round, with these moves."""
        other = planned.fork()
        for source_id in dict.fromkeys(each.head.source.id for each in placed):
            leaving = [each for each in placed if each.head.source.id == source_id]
            head, num_tokens = leaving[0].head, sum(each.sequence.num_tokens for each in leaving)
            reason = f"{reason_for(head, len(leaving), num_tokens)}, in a plan for {num_heads} heads"
            for each in leaving:
                other.add(each.sequence, head.source, each.destination, reason)
        return other

    def _candidates(self, planned: Round, head: BlockedHead) -> list[SequenceReport]:
        """Those beside a head who may be worth moving: those whom `defragment` would take, the shortest, and the
        shortest that would do alone."""
        movable = sorted(planned.movable(head.source), key=lambda each: (each.num_tokens, each.request_id))
        greedy = fewest_tokens(head, movable, planned.num_left(head.source.id))
        enough = [each for each in movable if each.num_blocks >= head.num_blocks_lacking]
        half = -(-self._max_candidates // 2)
        chosen = {each.request_id: each for each in (*greedy, *enough[:half], *movable[:half], *movable[-half:])}
        return list(chosen.values())[: self._max_candidates]


def _worth(planned: Round, num_before: int) -> tuple[int, int]:
    """How good the moves of a plan after the first few are: heads helped, which is one a source, then few tokens."""
    moves = planned.moves[num_before:]
    return len({move.source for move in moves}), -sum(planned.sent[move.request_id][0] for move in moves)
