"""Orders that machines give, in the imperative. Each ends in one outcome event."""

from typing import NamedTuple

import msgspec

from rota.base.instant import Duration
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import RequestId

# --- from an instance ------------------------------------------------------------------------------------------------


class Grant(NamedTuple):
    """Tokens of one sequence in a step."""

    request_id: RequestId
    num_tokens: int


class RunStep(msgspec.Struct, frozen=True, tag=True):
    """Run one forward pass; the same batch may be repeated up to `max_repeats` times before the machine must be asked.

    The world runs it once or more and answers with one `StepFinished`.
    """

    step_id: int
    grants: tuple[Grant, ...]
    """In batch order."""
    preempted: tuple[RequestId, ...] = ()
    """Stopped before this step, in the order in which it happened."""
    num_free_blocks: int = 0
    """Blocks that can be had once this batch holds its own."""
    max_repeats: int = 1


class RejectSequence(msgspec.Struct, frozen=True, tag=True):
    """This request can never run here."""

    request_id: RequestId
    reason: str


InstanceCommand = RunStep | RejectSequence

# --- from the cluster ------------------------------------------------------------------------------------------------


class Dispatch(msgspec.Struct, frozen=True, tag=True):
    """Send a request to an instance."""

    request_id: RequestId
    instance_id: InstanceId
    reason: str
    attempt: int = 1
    """1 for the first, one more for each retry."""


class Reject(msgspec.Struct, frozen=True, tag=True):
    """Refuse a request before it ran anywhere."""

    request_id: RequestId
    reason: str
    status: int = 503
    """HTTP status: 429 for a limit of the client's own, 503 for overload, 400 for what can never run."""
    retry_after: Duration | None = None


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Tell an instance to stop working on a request."""

    request_id: RequestId
    instance_id: InstanceId
    reason: str


class Fail(msgspec.Struct, frozen=True, tag=True):
    """End a request with an error: its instance failed and it cannot, or may no longer, be retried."""

    request_id: RequestId
    reason: str


ClusterCommand = Dispatch | Reject | Abort | Fail
