"""Multi-level feedback queues that a request enters at the level of its prompt."""

from typing import Any

from rota.base.instant import microseconds, milliseconds, seconds
from rota.serving.api import EngineView, RequestId, SequenceView
from rota.serving.policies.parameters import above_zero, at_least_one
from rota.serving.policies.ranked import Idling, Rank, RankedOrder


class SkipJoinMlfq(RankedOrder):
    """Serve the highest of `num_levels` queues; whoever has used up its quantum there goes down one.

    Rule: FastServe (Wu et al., 2023). The quantum of level p is `base_ms` × 2^p. A request enters at the first level
    whose quantum covers its prompt, by `prefill_us_per_token`, so that a long prompt does not pass through the queues
    of the short. After a step in which its time at its level exceeds the quantum, it goes down, to the front of that
    queue. Whoever has not been served for `starvation_seconds`, counted from its arrival at first, is raised to the
    highest level, to the back of its queue; that is looked for every `sweep_steps` steps. Constants: 10 ms, 3 s and
    1,000 steps, as in the authors' code; there, time idle begins at 0 and not at arrival, so that everybody starves at
    the first sweep. Time at a level is that between the steps in which it runs.

    Nobody displaces anybody of its own level. Whoever was preempted `preempted_at_most` times stays ahead of its class
    to its end. Classes go first.

    Good where lengths differ much and nobody can guess them; with recompute in place of swap a demotion costs the
    prompt. The longest pay. Nobody waits longer than `starvation_seconds`, a sweep, and what then is ahead of it in the
    highest queue.
    """

    def __init__(
        self,
        *,
        base_ms: float = 10.0,
        num_levels: int = 12,
        prefill_us_per_token: float = 100.0,
        starvation_seconds: float = 3.0,
        sweep_steps: int = 1000,
        preempted_at_most: int = 8,
        skip_refused: bool = False,
    ) -> None:
        """`prefill_us_per_token` should be that of the engine: 100 is about an 8B model on one A100."""
        super().__init__(skip_refused=skip_refused)
        name = "skip_join_mlfq"
        above_zero(
            name, base_ms=base_ms, prefill_us_per_token=prefill_us_per_token, starvation_seconds=starvation_seconds
        )
        at_least_one(name, num_levels=num_levels, sweep_steps=sweep_steps, preempted_at_most=preempted_at_most)
        self._quanta = [milliseconds(base_ms) << level for level in range(num_levels)]
        self._per_prompt_token = microseconds(prefill_us_per_token)
        self._starvation = seconds(starvation_seconds)
        self._sweep_steps = sweep_steps
        self._preempted_at_most = preempted_at_most
        self._places: dict[RequestId, _Place] = {}
        self._idling = Idling()
        self._step_before = -1
        self._num_places = 0

    def entry_level(self, num_prompt_tokens: int) -> int:
        """The first level whose quantum covers a prompt."""
        prefill = num_prompt_tokens * self._per_prompt_token
        return next((level for level, quantum in enumerate(self._quanta) if quantum >= prefill), len(self._quanta) - 1)

    def rank(self, sequence: SequenceView) -> Rank:
        if sequence.num_preemptions >= self._preempted_at_most:
            return (-1, sequence.arrived_at)
        place = self._place_of(sequence)
        return (place.level, place.number)

    def tier(self, sequence: SequenceView) -> Rank:
        # Within a level nobody displaces anybody: to compute a prompt again costs more than the turn is worth.
        return self.rank(sequence)[:1]

    def look(self, view: EngineView) -> None:
        passed = view.now - self._step_before if self._step_before >= 0 else 0
        self._step_before = view.now
        self._idling.served(view.running)
        for sequence in view.running:
            place = self._place_of(sequence)
            place.time += passed
            if place.time > self._quanta[place.level] and place.level + 1 < len(self._quanta):
                place.level += 1
                place.time = 0
                self._num_places += 1
                place.number = -self._num_places
        if self._num_looks % self._sweep_steps == 0:
            for sequence in self._idling.overdue(view.now - self._starvation):
                place = self._place_of(sequence)
                place.level = 0
                place.time = 0
                self._num_places += 1
                place.number = self._num_places
                self.rank_again(sequence)

    def came_to_wait(self, sequence: SequenceView, rank: Rank) -> None:
        self._idling.begin(sequence, self._looked_at)

    def request_ended(self, request: Any, num_output_tokens: int | None) -> None:
        self._places.pop(request.id, None)
        self._idling.end(request.id)

    def _place_of(self, sequence: SequenceView) -> "_Place":
        place = self._places.get(sequence.request.id)
        if place is None:
            self._num_places += 1
            level = self.entry_level(sequence.num_prompt_tokens)
            place = self._places[sequence.request.id] = _Place(level, self._num_places)
        return place


class _Place:
    """Where a request stands."""

    __slots__ = ("level", "number", "time")

    def __init__(self, level: int, number: int) -> None:
        self.level = level
        self.number = number
        """Orders a level: who came later has a higher one, and who was sent down a lower one than all before."""
        self.time = 0
        """Nanoseconds at this level."""
