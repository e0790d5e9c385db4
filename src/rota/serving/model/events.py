"""Facts that machines are fed, in the past tense. All are values: a journal of them replays a run."""

import msgspec

from rota.base.instant import Duration
from rota.serving.model.instance import InstanceId, InstanceReport, InstanceSpec
from rota.serving.model.request import Request, RequestId

# --- what one instance hears -----------------------------------------------------------------------------------------


class SequenceArrived(msgspec.Struct, frozen=True, tag=True):
    """A request was dispatched to this instance."""

    request: Request


class StepFinished(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """The step that was ordered last has run.

    Every sequence whose computed tokens reached its total produced one token. `finished` names those whose last token
    this was, in batch order; only the world can know.
    """

    step_id: int
    finished: tuple[RequestId, ...] = ()


class SequenceAborted(msgspec.Struct, frozen=True, tag=True):
    """The client left, or the router took the request back. Unknown ids are ignored: the end may have crossed it."""

    request_id: RequestId


InstanceEvent = SequenceArrived | StepFinished | SequenceAborted

# --- what the cluster hears ------------------------------------------------------------------------------------------


class RequestArrived(msgspec.Struct, frozen=True, tag=True):
    """A request came in at the front door."""

    request: Request


class FirstTokenSeen(msgspec.Struct, frozen=True, tag=True):
    """The first token (or the first byte of the answer) of a request passed."""

    request_id: RequestId
    instance_id: InstanceId


class RequestFinished(msgspec.Struct, frozen=True, tag=True):
    """An instance answered a request in full. `num_output_tokens` is None where the engine did not say."""

    request_id: RequestId
    instance_id: InstanceId
    num_output_tokens: int | None = None


class RequestFailed(msgspec.Struct, frozen=True, tag=True):
    """An attempt at a request failed at an instance. After the first token it can no longer be retried."""

    request_id: RequestId
    instance_id: InstanceId
    reason: str
    retryable: bool = True
    """False where the engine answered, e.g. that the request is malformed; another one would say the same."""


class ClientLeft(msgspec.Struct, frozen=True, tag=True):
    """The client closed its connection."""

    request_id: RequestId


class InstanceStarted(msgspec.Struct, frozen=True, tag=True):
    """An instance is ready for requests."""

    spec: InstanceSpec


class InstanceLost(msgspec.Struct, frozen=True, tag=True):
    """An instance died or cannot be reached. Its requests are reported by `RequestFailed`, one by one."""

    instance_id: InstanceId
    reason: str = ""


class InstanceDraining(msgspec.Struct, frozen=True, tag=True):
    """An instance takes no new requests and finishes what it has."""

    instance_id: InstanceId


class InstanceReported(msgspec.Struct, frozen=True, tag=True):
    """A report arrived, `delay` after it was taken."""

    report: InstanceReport
    delay: Duration = Duration(0)


ClusterEvent = (
    RequestArrived
    | FirstTokenSeen
    | RequestFinished
    | RequestFailed
    | ClientLeft
    | InstanceStarted
    | InstanceLost
    | InstanceDraining
    | InstanceReported
)
