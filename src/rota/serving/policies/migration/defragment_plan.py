"""Make many heads of queues fit at once."""

import importlib
import math
from collections.abc import Sequence, Set
from typing import Any, NamedTuple

from rota.base.errors import ConfigError
from rota.serving.api import NOTHING, ClusterView, EngineCapabilities, InstanceView, Move, RequestId, SequenceReport
from rota.serving.policies.freeness import HIGH_LOAD_TARGET, blocks_for
from rota.serving.policies.migration.defragment import make_fit, reason_for
from rota.serving.policies.migration.drain import empty_draining
from rota.serving.policies.migration.queue_heads import BlockedHead, blocked_heads, fewest_tokens
from rota.serving.policies.migration.rounds import FRONTIER_STEPS, Round, Rounds, checked_interval


class DefragmentPlan:
    """As many blocked heads as possible fit, then the fewest tokens move: chosen for all heads at once.

    Rule: what `defragment` does one head at a time, as an integer program, in the way of VM rescheduling (VM2RL), which
    plans under a budget of moves. A binary variable says that a request goes to an instance, another that a head is
    helped. A head is helped if those who leave free what it lacks; an instance takes no more than keeps it above
    `destination_above` steps and within its slots. First as many heads as possible are helped, then the fewest tokens
    move. Beside it runs `defragment`: its answer is where the search starts and the bound that it must beat, so the
    plan is never worse.

    The program stays small: `max_heads` heads, of the highest class first, then of those who lack least;
    `max_candidates` of those who run beside each; the `max_destinations` freest instances. It is exact within these, if
    the search ends within `search_limit`. That is the solver's own measure of work, about a second a unit at most,
    which does not depend on the machine: the same views give the same moves. The world goes on meanwhile, so the router
    looks again before each move, and drops what does not hold any more.

    All constants are ours but the threshold and `max_migrations` (see `defragment`). Good for large fleets, nearly
    full, with long prompts; where few heads are blocked, `defragment` does as well for a hundredth of the cost, which
    the router pays with its own time. Starves a head that is costly to help for as long as the others are cheaper.
    Needs OR-Tools: `pip install 'rota[planner]'`.
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
        search_limit: float = 0.02,
        high_priority_max: int = -1,
        high_load_target: float = HIGH_LOAD_TARGET,
    ) -> None:
        """Raises `ConfigError` without OR-Tools, for a limit that is not above 0, and for a threshold below 0."""
        limits = {
            "max_heads": max_heads,
            "max_candidates": max_candidates,
            "max_destinations": max_destinations,
            "search_limit": search_limit,
        }
        for name, limit in limits.items():
            if not limit > 0:
                raise ConfigError(f"{name} must be above 0, not {limit}")
        if not destination_above >= 0.0:
            raise ConfigError(f"destination_above must be at least 0 steps, not {destination_above}")
        self.interval_seconds = checked_interval(interval_seconds)
        self._destination_above = destination_above
        self._max_heads = max_heads
        self._max_candidates = max_candidates
        self._max_destinations = max_destinations
        self._search_limit = search_limit
        self._solver_module = _solver_module()
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
        greedy = planned.fork()
        num_before = len(planned.moves)
        for head in heads:
            make_fit(greedy, head, self._destination_above)
        self._search(planned, heads, greedy)
        better = max(greedy, planned, key=lambda each: _worth(each, num_before))
        return self._rounds.close(better, cluster.now)

    def _search(self, planned: Round, heads: Sequence[BlockedHead], greedy: Round) -> None:
        """Add the moves of the best plan found, if there is one."""
        program = _Program(self._solver_module, planned, self._destination_above)
        destinations = [view for view, _ in zip(planned.freest(), range(self._max_destinations), strict=False)]
        for head in heads:
            program.help(head, self._candidates(planned, head), destinations)
        program.bound(destinations)
        program.start_from({(move.request_id, move.destination) for move in greedy.moves})
        for head, choices in program.solved(self._search_limit):
            num_tokens = sum(choice.sequence.num_tokens for choice in choices)
            reason = f"{reason_for(head, len(choices), num_tokens)}, in a plan for {len(heads)} heads"
            for choice in choices:
                planned.add(choice.sequence, head.source, choice.destination, reason)

    def _candidates(self, planned: Round, head: BlockedHead) -> list[SequenceReport]:
        """Those beside a head who may be worth moving: those whom `defragment` would take, the shortest, and the
        shortest that would do alone."""
        movable = sorted(planned.movable(head.source), key=lambda each: (each.num_tokens, each.request_id))
        greedy = fewest_tokens(head, movable, planned.num_left(head.source.id))
        enough = [each for each in movable if each.num_blocks >= head.num_blocks_lacking]
        half = -(-self._max_candidates // 2)
        chosen = {each.request_id: each for each in (*greedy, *enough[:half], *movable[:half], *movable[-half:])}
        return list(chosen.values())[: self._max_candidates]


class _Choice(NamedTuple):
    """That a request goes to a destination, as a variable of the program."""

    sequence: SequenceReport
    destination: InstanceView
    num_tokens: int
    """Of capacity that it will use there."""
    variable: Any


class _Program:
    """The integer program: who goes where, and which heads that helps."""

    def __init__(self, solver_module: Any, planned: Round, destination_above: float) -> None:
        self._solver_module = solver_module
        self._planned = planned
        self._threshold = math.ceil(destination_above)
        self._model = solver_module.CpModel()
        self._choices: list[tuple[BlockedHead, Any, list[_Choice]]] = []

    def help(
        self, head: BlockedHead, candidates: Sequence[SequenceReport], destinations: Sequence[InstanceView]
    ) -> None:
        """Let a head be helped by those who leave."""
        model, choices = self._model, []
        helped = model.new_bool_var(f"help {head.source.id}")
        for sequence in candidates:
            going = []
            for view in destinations:
                if view.id != head.source.id and self._fits(sequence, view):
                    variable = model.new_bool_var(f"{sequence.request_id} to {view.id}")
                    num_tokens = blocks_for(sequence.num_tokens, view.block_size) * view.block_size
                    going.append(_Choice(sequence, view, num_tokens, variable))
            if going:
                model.add(sum(choice.variable for choice in going) <= helped)
                choices += going
        self._choices.append((head, helped, choices))
        if not choices:
            model.add(helped == 0)
            return
        num_freed = sum(choice.sequence.num_blocks * choice.variable for choice in choices)
        num_moves = sum(choice.variable for choice in choices)
        model.add(num_freed >= head.num_blocks_lacking * helped)
        model.add(num_moves >= helped)
        model.add(num_moves <= self._planned.num_left(head.source.id))

    def bound(self, destinations: Sequence[InstanceView]) -> None:
        """Keep every destination within its slots and above the threshold, and say what is wanted."""
        everything = [choice for _, _, choices in self._choices for choice in choices]
        for view in destinations:
            coming = [choice for choice in everything if choice.destination is view]
            if not coming:
                continue
            load, threshold = self._planned.loads[view.id], self._threshold
            kept = load.headroom if load.num_high else 0
            # Freeness above the threshold, times the requests: linear, since the threshold is a constant.
            room = load.num_free_tokens - kept - threshold * load.num_requests - 1
            self._model.add(sum((choice.num_tokens + threshold) * choice.variable for choice in coming) <= max(0, room))
            num_slots = min(view.max_num_seqs - load.num_requests, self._planned.num_left(view.id))
            self._model.add(sum(choice.variable for choice in coming) <= max(0, num_slots))
        cost = sum(choice.num_tokens * choice.variable for choice in everything)
        prize = 1 + sum(choice.num_tokens for choice in everything)
        self._model.maximize(prize * sum(helped for _, helped, _ in self._choices) - cost)

    def start_from(self, moves: Set[tuple[str, str]]) -> None:
        """Hint at a plan that is known."""
        for _, helped, choices in self._choices:
            hints = [(choice.sequence.request_id, choice.destination.id) in moves for choice in choices]
            self._model.add_hint(helped, any(hints))
            for choice, hint in zip(choices, hints, strict=True):
                self._model.add_hint(choice.variable, hint)

    def solved(self, search_limit: float) -> list[tuple[BlockedHead, list[_Choice]]]:
        """Who goes where for which head, in the best plan found; empty if none was."""
        solver = self._solver_module.CpSolver()
        # One worker, one seed and a limit in work, not in time: the same program has the same answer everywhere.
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = 0
        solver.parameters.max_deterministic_time = search_limit
        # A program this small is solved sooner than it is simplified: 3 ms in place of 160 on four heads.
        solver.parameters.cp_model_presolve = False
        status = solver.solve(self._model)
        if status not in (self._solver_module.OPTIMAL, self._solver_module.FEASIBLE):
            return []
        found = [
            (head, [each for each in choices if solver.value(each.variable)]) for head, _, choices in self._choices
        ]
        return [(head, choices) for head, choices in found if choices]

    def _fits(self, sequence: SequenceReport, view: InstanceView) -> bool:
        """Whether a request alone keeps an instance above the threshold, and brings no headroom with it, which the
        program does not know of."""
        filled = self._planned.load_with(sequence, view)
        if filled is None or filled.freeness <= self._threshold:
            return False
        return not self._planned.is_high(sequence) or self._planned.loads[view.id].num_high > 0


def _worth(planned: Round, num_before: int) -> tuple[int, int]:
    """How good the moves of a plan after the first few are: heads helped, which is one a source, then few tokens."""
    moves = planned.moves[num_before:]
    return len({move.source for move in moves}), -sum(planned.sent[move.request_id][0] for move in moves)


def _solver_module() -> Any:
    try:
        return importlib.import_module("ortools.sat.python.cp_model")
    except ImportError:
        raise ConfigError(
            "defragment_plan needs OR-Tools, which is not installed", hint="pip install 'rota[planner]'"
        ) from None
