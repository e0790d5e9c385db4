"""Shortest predicted answer first, with a guard against starving."""

from typing import Any

from rota.serving.api import EngineView, LengthPredictor, RequestId, SequenceView
from rota.serving.policies.parameters import at_least_one
from rota.serving.policies.ranked import Idling, Rank, RankedOrder


class ShortestPredictedFirst(RankedOrder):
    """Serve the request whose answer is predicted to be the shortest; it displaces longer ones when it cannot start.

    Rule: learning to rank (Fu et al., NeurIPS 2024, vllm-ltr). Each request is predicted once, when it is first looked
    at, in buckets of `bucket_tokens` (their labels are in tens). Guard: whoever was not served for `starvation_steps`
    steps is promoted ahead of its class, until it has been given `promoted_tokens` tokens. Constants: 200 and 10, as
    in the authors' scripts. Differences: they count the scheduled steps of a promoted request, which where preemption
    means to compute again would give it no token at all; they rank the promoted by score, so that no bound holds,
    and here those promoted first go first; and whoever was preempted `preempted_at_most` times stays ahead of its
    class to its end, so that nobody is displaced more often.

    Classes go first: the lowest `priority` number, and a higher class displaces a lower one.

    Good for the mean wherever lengths differ and predictions rank them. The longest pay: the tail is worse than first
    come, first served (docs/size-based.md), and without the guard (`starvation_steps` left out of a stack as 0) they
    starve for as long as shorter ones keep coming. With `skip_refused`, as published, the walk goes on past a request
    that does not fit; vLLM ends its scan there.
    """

    def __init__(
        self,
        *,
        lengths: LengthPredictor,
        starvation_steps: int = 200,
        promoted_tokens: int = 10,
        preempted_at_most: int = 8,
        bucket_tokens: int = 10,
        skip_refused: bool = False,
    ) -> None:
        """`starvation_steps` 0 is no guard."""
        super().__init__(skip_refused=skip_refused)
        at_least_one(
            "shortest_predicted_first",
            promoted_tokens=promoted_tokens,
            preempted_at_most=preempted_at_most,
            bucket_tokens=bucket_tokens,
            starvation_steps=starvation_steps or None,
        )
        self._lengths = lengths
        self._starvation_steps = starvation_steps
        self._promoted_tokens = promoted_tokens
        self._preempted_at_most = preempted_at_most
        self._bucket_tokens = bucket_tokens
        self._scores: dict[RequestId, float] = {}
        self._idling = Idling()
        self._promotions: dict[RequestId, tuple[int, int]] = {}
        """Of those who were promoted: which promotion it was, and the output tokens that end it."""
        self._num_promotions = 0
        self._seen: list[SequenceView] = []
        """Who ran when last looked."""
        self.repeatable = starvation_steps == 0

    fixed_ranks = True

    def rank(self, sequence: SequenceView) -> Rank:
        if sequence.num_preemptions >= self._preempted_at_most:
            return (0, sequence.arrived_at)
        promotion = self._promotions.get(sequence.request.id)
        if promotion is not None:
            return (1, promotion[0])
        request = sequence.request
        score = self._scores.get(request.id)
        if score is None:
            score = self._scores[request.id] = self._lengths.predict(request) // self._bucket_tokens
        return (2, score)

    def look(self, view: EngineView) -> None:
        if not self._starvation_steps:
            return
        if view.running != self._seen:
            self._seen = list(view.running)
            self._idling.served(self._seen)
        if self._promotions:
            for sequence in view.running:
                promotion = self._promotions.get(sequence.id)
                if promotion is not None and sequence.num_output_tokens >= promotion[1]:
                    del self._promotions[sequence.id]
                    self.forget_rank(sequence.id)
        for sequence in self._idling.overdue(self._num_looks - self._starvation_steps):
            if sequence.id not in self._promotions:
                self._num_promotions += 1
                end = sequence.num_output_tokens + self._promoted_tokens
                self._promotions[sequence.id] = (self._num_promotions, end)
                self.rank_again(sequence)

    def came_to_wait(self, sequence: SequenceView, rank: Rank) -> None:
        self.forget_rank(sequence.id)
        if self._starvation_steps and rank[0] == 2:
            self._idling.begin(sequence, self._num_looks)
            self._seen = []  # It may run again by the next look, in the same place as before.

    def request_ended(self, request: Any, num_output_tokens: int | None) -> None:
        self.forget_rank(request.id)
        self._scores.pop(request.id, None)
        self._promotions.pop(request.id, None)
        self._idling.end(request.id)
        self._lengths.request_ended(request, num_output_tokens)
