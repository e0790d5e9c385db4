"""Earliest deadline first, by what each request was promised."""

from rota.serving.api import SequenceView
from rota.serving.policies.deadlines import end_due, next_token_due
from rota.serving.policies.parameters import at_least_one
from rota.serving.policies.ranked import Rank, RankedOrder


class EarliestDeadline(RankedOrder):
    """Serve the request whose next promise falls due first.

    Rule: earliest deadline first (Liu and Layland, 1973). A request's deadline is the earlier of that of its next
    token, by its targets for TTFT and TPOT, and that of its end, by its target for E2E. Whoever was promised nothing
    comes last, first come first served, and whoever was preempted `preempted_at_most` times stays ahead to its end.
    Classes go first. It orders those who wait; with `displace` they may also displace those
    who run and whose next promise falls due later, which pays only where TPOT or E2E are promised too: whoever has its
    first token and was promised no more makes way for everybody who waits for theirs, and computes its prompt again.

    Good below saturation: with one slot, preemption for nothing and a set of requests that can be served in time, it
    serves it in time. Above saturation it fails all alike, since whoever is late already goes first: keep the load out
    (an admission policy). Starves requests without targets for as long as there are others.
    """

    def __init__(self, *, displace: bool = False, preempted_at_most: int = 8, skip_refused: bool = False) -> None:
        super().__init__(skip_refused=skip_refused)
        at_least_one("earliest_deadline", preempted_at_most=preempted_at_most)
        self._preempted_at_most = preempted_at_most
        self.only_order_waiting(not displace)

    def rank(self, sequence: SequenceView) -> Rank:
        if sequence.num_preemptions >= self._preempted_at_most:
            return (0, sequence.arrived_at)
        return (1, min(next_token_due(sequence), end_due(sequence)))
