"""What the router notes about one request, and how many requests it has in each state."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rota.base.instant import Instant
from rota.serving.cluster.lifecycles import REQUEST_LIFECYCLE, RequestState
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import Request, RequestId


@dataclass(frozen=True, slots=True)
class ClusterCounts:
    """How many requests are in each state now, and how many have ended in each way since the start."""

    num_arrived: int
    num_queued: int
    num_assigned: int
    num_running: int
    num_finished: int
    num_rejected: int
    num_failed: int
    num_aborted: int
    num_resumed: int = 0
    """Attempts that went on elsewhere after the client had got tokens."""

    @classmethod
    def of(
        cls, states: Iterable[str], num_ended: Mapping[str, int], num_arrived: int, num_resumed: int
    ) -> "ClusterCounts":
        """The counts from the states of those who are unfinished."""
        num_in = Counter(states)
        return cls(
            num_arrived=num_arrived,
            num_queued=num_in[RequestState.QUEUED],
            num_assigned=num_in[RequestState.ASSIGNED],
            num_running=num_in[RequestState.RUNNING],
            num_finished=num_ended[RequestState.FINISHED],
            num_rejected=num_ended[RequestState.REJECTED],
            num_failed=num_ended[RequestState.FAILED],
            num_aborted=num_ended[RequestState.ABORTED],
            num_resumed=num_resumed,
        )


class TrackedRequest:
    """One unfinished request: its state, its owner, and what went wrong so far."""

    __slots__ = (
        "admission",
        "decode_at",
        "failures",
        "instance_id",
        "num_attempts",
        "num_output_tokens",
        "num_resumptions",
        "only",
        "prefill_only",
        "request",
        "state",
    )

    def __init__(self, request: Request) -> None:
        self.request = request
        self.state = str(REQUEST_LIFECYCLE.initial)
        self.instance_id: InstanceId | None = None
        self.num_attempts = 0
        self.num_resumptions = 0
        self.num_output_tokens = 0
        """What the client had got when the last attempt failed; the next one goes on from there."""
        self.admission = ""
        """Why it was let in, until a command has said so."""
        self.only: tuple[InstanceId, ...] = ()
        """Where it may go while nothing failed and one of them is ready; empty is anywhere."""
        self.failures: tuple[tuple[InstanceId, str], ...] = ()
        self.prefill_only = False
        """Whether it is to decode elsewhere, and the next token has not come yet."""
        self.decode_at: InstanceId | None = None
        """Where it is expected, until it has come there or will not."""

    @property
    def num_tokens(self) -> int:
        """What an instance has to compute before the next token, if nothing of it is cached there."""
        return self.request.num_prompt_tokens + self.num_output_tokens

    @property
    def hold_order(self) -> tuple[int, bool, Instant, RequestId]:
        """By class; in a class those whose clients have got something already, then by arrival."""
        return self.request.priority, self.num_resumptions == 0, self.request.arrived_at, self.request.id

    def move(self, event: str) -> None:
        self.state = REQUEST_LIFECYCLE.move(self.state, event)
