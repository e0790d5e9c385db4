"""What scaling policies are told of the work: how much came, and what became of it."""

from collections import deque
from collections.abc import Sequence

from rota.base.instant import Duration, Instant
from rota.serving.api import Heard, Outcome, Request, RequestId, WorkTotals

OUTCOMES_MAX = 10_000
"""So many are kept between two questions; of more, the newest."""


class DemandBook:
    """Totals since the start, and the outcomes since they were read last."""

    def __init__(self) -> None:
        self._first_token_at: dict[RequestId, Instant] = {}
        self._outcomes: deque[Outcome] = deque(maxlen=OUTCOMES_MAX)
        self._num_arrived = self._num_prompt_tokens = 0
        self._num_finished = self._num_output_tokens = 0

    @property
    def totals(self) -> WorkTotals:
        return WorkTotals(self._num_arrived, self._num_prompt_tokens, self._num_finished, self._num_output_tokens)

    def arrived(self, request: Request) -> None:
        """A request came, whether it was let in or not."""
        self._num_arrived += 1
        self._num_prompt_tokens += request.num_prompt_tokens

    def first_token(self, request: Request, now: Instant) -> None:
        """The next token of a request passed; of one that was resumed it is not its first."""
        if request.id not in self._first_token_at:
            self._first_token_at[request.id] = now
            self._outcomes.append(Outcome(request, Heard.FIRST_TOKEN, Duration(now - request.arrived_at)))

    def finished(self, request: Request, num_output_tokens: int | None, now: Instant) -> None:
        """A request was answered in full."""
        self._num_finished += 1
        self._num_output_tokens += num_output_tokens or 0
        first_token_at = self._first_token_at.pop(request.id, None)
        took = None
        if first_token_at is not None and num_output_tokens is not None and num_output_tokens > 1:
            took = Duration((now - first_token_at) // (num_output_tokens - 1))
        self._outcomes.append(Outcome(request, Heard.END, took))

    def ended(self, request: Request, *, is_lost: bool) -> None:
        """A request is no more; whether it failed, or was refused."""
        self._first_token_at.pop(request.id, None)
        if is_lost:
            self._outcomes.append(Outcome(request, Heard.LOST))

    def read_outcomes(self) -> Sequence[Outcome]:
        """What was heard since this was called last."""
        outcomes = tuple(self._outcomes)
        self._outcomes.clear()
        return outcomes
