"""A cheap guess for everybody, and a costly prediction only for those whom it calls long."""

from typing import Any

from rota.serving.api import LengthPredictor, Request, RequestId, SequenceView
from rota.serving.policies.parameters import at_least_one
from rota.serving.policies.ranked import Rank, RankedOrder


class SkipPredict(RankedOrder):
    """Serve those whom a cheap guess calls short, first come first served; then the others, by what is left of them as
    a costly prediction has it. Each may displace those behind it.

    Rule: SkipPredict (Shahout and Mitzenmacher, 2024) in its server-time model. Short is whose cheap guess
    (`quick_length` of the stack) is at most `short_tokens`; only the others are predicted (`length`). Both guesses are
    work of the engine, by the `cost` of their predictors: a simulated step takes as much longer, and a live one does
    by itself. Unlike in the paper a prediction is not a job of its own that may wait: it is made when its request is
    first looked at. What is left is in buckets of `bucket_tokens`; whoever was preempted `preempted_at_most` times
    stays ahead of its class to its end. With `short_tokens = 0` it is shortest predicted remaining first, and above
    every guess first come, first served. Classes go first.

    Good where predicting costs something and most requests are short. The long pay, and starve for as long as short
    ones fill the engine; one that is long but was called short is served as short.
    """

    def __init__(
        self,
        *,
        lengths: LengthPredictor,
        quick_lengths: LengthPredictor,
        short_tokens: int = 128,
        bucket_tokens: int = 10,
        preempted_at_most: int = 8,
        skip_refused: bool = False,
    ) -> None:
        super().__init__(skip_refused=skip_refused)
        at_least_one("skip_predict", bucket_tokens=bucket_tokens, preempted_at_most=preempted_at_most)
        self._lengths = lengths
        self._quick_lengths = quick_lengths
        self._short_tokens = short_tokens
        self._bucket_tokens = bucket_tokens
        self._preempted_at_most = preempted_at_most
        self._predicted: dict[RequestId, float | None] = {}
        """None for those who are short."""

    def rank(self, sequence: SequenceView) -> Rank:
        if sequence.num_preemptions >= self._preempted_at_most:
            return (0, sequence.arrived_at)
        request = sequence.request
        try:
            predicted = self._predicted[request.id]
        except KeyError:
            predicted = self._predict(request)
        if predicted is None:
            return (1, 0)
        left = predicted - sequence.num_output_tokens
        return (2, left // self._bucket_tokens if left > 0 else 0.0)

    def _predict(self, request: Request) -> float | None:
        is_short = self._quick_lengths.predict(request) <= self._short_tokens
        predicted = self._predicted[request.id] = None if is_short else self._lengths.predict(request)
        return predicted

    def request_ended(self, request: Any, num_output_tokens: int | None) -> None:
        self._predicted.pop(request.id, None)
        self._lengths.request_ended(request, num_output_tokens)
        self._quick_lengths.request_ended(request, num_output_tokens)
