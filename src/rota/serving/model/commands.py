"""Orders that machines give, in the imperative. Each ends in one outcome event."""

from typing import Literal, NamedTuple

import msgspec

from rota.base.instant import Duration
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import RequestId

# --- from an instance ------------------------------------------------------------------------------------------------


class Grant(NamedTuple):
    """Tokens of one sequence in a step."""

    request_id: RequestId
    num_tokens: int


EVERYBODY = RequestId("*")
"""All who wait and were not looked at."""


class Reason(NamedTuple):
    """Why a sequence was not served, or was stopped, in a step."""

    request_id: RequestId
    """`EVERYBODY` where the walk over the waiting had ended, or was not begun."""
    choice: Literal["refused", "preempted", "displaced"]
    why: str
    """A `Refusal`, and whom the room was for where somebody was stopped."""


class RunStep(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Run one forward pass. The world answers with one `StepFinished`."""

    step_id: int
    grants: tuple[Grant, ...]
    """In batch order."""
    preempted: tuple[RequestId, ...] = ()
    """Stopped before this step, in the order in which it happened."""
    num_free_blocks: int = 0
    """Blocks that can be had once this batch holds its own."""
    reasons: tuple[Reason, ...] = ()
    """For whom the walk over the waiting stopped or passed over, and for each in `preempted`; `REASONS_MAX` at most."""


REASONS_MAX = 16
"""A step that passes over a long queue explains the first so many."""


class RejectSequence(msgspec.Struct, frozen=True, tag=True):
    """This request can never run here."""

    request_id: RequestId
    reason: str


InstanceCommand = RunStep | RejectSequence

# --- from the cluster ------------------------------------------------------------------------------------------------


class Hold(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Keep a request until an instance can take it. The host has nothing to do."""

    request_id: RequestId
    reason: str
    admission: str = ""
    """Why the admission policy let it in."""


class Dispatch(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Send a request to an instance."""

    request_id: RequestId
    instance_id: InstanceId
    reason: str
    attempt: int = 1
    """1 for the first, one more for each retry."""
    scores: tuple[tuple[InstanceId, float], ...] = ()
    """What the policy made of each instance that it looked at."""
    admission: str = ""
    """Why the admission policy let it in; empty on a retry and after a hold, where that was said before."""


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


ClusterCommand = Dispatch | Hold | Reject | Abort | Fail
