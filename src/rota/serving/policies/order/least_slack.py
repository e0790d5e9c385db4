"""Least slack first: the deadline less the work that is left."""

from typing import Any

from rota.base.instant import microseconds, milliseconds
from rota.serving.api import LengthPredictor, RequestId, SequenceView
from rota.serving.policies.deadlines import NEVER, end_due, next_token_due
from rota.serving.policies.parameters import above_zero, at_least_one
from rota.serving.policies.ranked import Rank, RankedOrder


class LeastSlack(RankedOrder):
    """Serve the request that could least afford to wait.

    Rule: least slack, or laxity, first (Mok, 1983). Slack is the time until a deadline less the work that must be done
    by then: for the next token the tokens to compute, at `prefill_us_per_token`; for the end, where E2E was promised,
    also the output tokens that are predicted to be left, at `decode_ms_per_token`. The lesser of the two counts.
    Between requests only the difference matters, so that "now" cancels out, and the order of those who wait does not
    change as time passes. Whoever was promised nothing comes last. Whoever was preempted `preempted_at_most` times
    stays ahead of its class to its end. Classes go first. It orders those who wait; with `displace` they may also
    displace those who run, and do so often, since whoever waits has its prompt to compute and so the lesser slack.

    Good where prompts or answers differ much in length, so that of two equal deadlines one is nearer. It goes by the
    two rates, which should be the engine's; above saturation it fails all alike, as `earliest_deadline` does. Starves
    requests without targets for as long as there are others.
    """

    def __init__(
        self,
        *,
        lengths: LengthPredictor,
        prefill_us_per_token: float = 100.0,
        decode_ms_per_token: float = 30.0,
        displace: bool = False,
        preempted_at_most: int = 8,
        skip_refused: bool = False,
    ) -> None:
        super().__init__(skip_refused=skip_refused)
        above_zero("least_slack", prefill_us_per_token=prefill_us_per_token, decode_ms_per_token=decode_ms_per_token)
        at_least_one("least_slack", preempted_at_most=preempted_at_most)
        self._lengths = lengths
        self._per_prompt_token = microseconds(prefill_us_per_token)
        self._per_output_token = milliseconds(decode_ms_per_token)
        self._preempted_at_most = preempted_at_most
        self._predicted: dict[RequestId, float] = {}
        self.only_order_waiting(not displace)

    def rank(self, sequence: SequenceView) -> Rank:
        if sequence.num_preemptions >= self._preempted_at_most:
            return (0, sequence.arrived_at)
        next_due, last_due = next_token_due(sequence), end_due(sequence)
        # A sequence that waits has all its tokens to compute, whatever a cache may hold of them.
        to_compute = sequence.num_pending_tokens * self._per_prompt_token
        slack = NEVER if next_due == NEVER else next_due - to_compute
        if last_due != NEVER:
            left = max(1.0, self._prediction(sequence) - sequence.num_output_tokens)
            slack = min(slack, last_due - to_compute - round(left * self._per_output_token))
        return (1, slack)

    def request_ended(self, request: Any, num_output_tokens: int | None) -> None:
        self._predicted.pop(request.id, None)
        self._lengths.request_ended(request, num_output_tokens)

    def _prediction(self, sequence: SequenceView) -> float:
        request = sequence.request
        predicted = self._predicted.get(request.id)
        if predicted is None:
            predicted = self._predicted[request.id] = self._lengths.predict(request)
        return predicted
