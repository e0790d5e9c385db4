"""The integer program of a plan: who goes where, and which heads that helps."""

import importlib
import math
from collections.abc import Sequence, Set
from typing import Any, NamedTuple

from rota.base.errors import ConfigError
from rota.serving.api import InstanceView, SequenceReport
from rota.serving.policies.freeness import blocks_for
from rota.serving.policies.migration.plan_search import Placed
from rota.serving.policies.migration.queue_heads import BlockedHead
from rota.serving.policies.migration.rounds import Round


class _Choice(NamedTuple):
    """That a request goes to a destination, as a variable of the program."""

    sequence: SequenceReport
    destination: InstanceView
    num_tokens: int
    """Of capacity that it will use there."""
    variable: Any


class Program:
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

    def solved(self, search_limit: float) -> list[Placed]:
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
        return [
            Placed(head, each.sequence, each.destination)
            for head, _, choices in self._choices
            for each in choices
            if solver.value(each.variable)
        ]

    def _fits(self, sequence: SequenceReport, view: InstanceView) -> bool:
        """Whether a request alone keeps an instance above the threshold, and brings no headroom with it, which the
        program does not know of."""
        filled = self._planned.load_with(sequence, view)
        if filled is None or filled.freeness <= self._threshold:
            return False
        return not self._planned.is_high(sequence) or self._planned.loads[view.id].num_high > 0


def solver_module() -> Any:
    try:
        return importlib.import_module("ortools.sat.python.cp_model")
    except ImportError:
        raise ConfigError(
            "defragment_plan with search_limit needs OR-Tools, which is not installed",
            hint="pip install 'rota[planner]'",
        ) from None
