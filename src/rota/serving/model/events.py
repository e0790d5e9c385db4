"""Facts that machines are fed, in the past tense. All are values: a journal of them replays a run."""

import msgspec

from rota.base.instant import Duration
from rota.serving.model.commands import Way
from rota.serving.model.fleet import StartOffer
from rota.serving.model.instance import InstanceId, InstanceReport, InstanceSpec
from rota.serving.model.request import Request, RequestId

# --- what one instance hears -----------------------------------------------------------------------------------------


class SequenceArrived(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """A request was dispatched to this instance."""

    request: Request
    num_output_tokens: int = 0
    """Tokens that it generated elsewhere. They are known here and computed anew, as after a preemption (replay)."""


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


class RoomAsked(msgspec.Struct, frozen=True, tag=True):
    """A request that runs elsewhere may come here with its KV: set blocks for so many tokens and a slot aside. Asked
    again with more tokens, it grows. The instance answers with `RoomKept` or `RoomRefused`."""

    request_id: RequestId
    num_tokens: int


class RoomGivenUp(msgspec.Struct, frozen=True, tag=True):
    """The request does not come after all. Unknown ids are ignored."""

    request_id: RequestId


class SequenceAdopted(msgspec.Struct, frozen=True, tag=True):
    """A request came with its KV, into the room that was kept for it: all but its last token is computed. It runs."""

    request: Request
    num_output_tokens: int
    """At least 1."""


class StopAsked(msgspec.Struct, frozen=True, tag=True):
    """Let a running request rest when the step in flight has ended, with its blocks. The instance answers with
    `SequenceStopped`, or with `StopRefused` if it ends, waits or was aborted by then."""

    request_id: RequestId


class SequenceResumed(msgspec.Struct, frozen=True, tag=True):
    """A request that rests, or is about to, goes on here. Unknown ids are ignored."""

    request_id: RequestId


class SequenceLeft(msgspec.Struct, frozen=True, tag=True):
    """A request that rests runs elsewhere now: let go of its blocks. Unknown ids are ignored."""

    request_id: RequestId


InstanceEvent = (
    SequenceArrived
    | StepFinished
    | SequenceAborted
    | RoomAsked
    | RoomGivenUp
    | SequenceAdopted
    | StopAsked
    | SequenceResumed
    | SequenceLeft
)

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


class RequestFailed(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """An attempt at a request failed at an instance. After the first token it can no longer be retried."""

    request_id: RequestId
    instance_id: InstanceId
    reason: str
    retryable: bool = True
    """False where the engine answered, e.g. that the request is malformed; another one would say the same."""
    num_output_tokens: int | None = None
    """After the first token: how many the client has got, where another instance can go on from there; None where the
    request cannot be resumed."""


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


class MoveAsked(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Somebody wants a running request moved now. Ends in `Migrate` or `MoveRefused`."""

    request_id: RequestId
    destination: InstanceId
    way: Way | None = None
    """None leaves it to what the two instances can do."""


class RoomReserved(msgspec.Struct, frozen=True, tag=True):
    """The destination of a migration keeps room for the request."""

    migration_id: int


class CopyStarted(msgspec.Struct, frozen=True, tag=True):
    """The first blocks of a migrating request are on their way; it decodes meanwhile."""

    migration_id: int


class CopyCaughtUp(msgspec.Struct, frozen=True, tag=True):
    """Of a migrating request so little is left to copy that it may stop for it."""

    migration_id: int


class HandedOver(msgspec.Struct, frozen=True, tag=True):
    """A migrating request runs at its destination: from here on that is its owner."""

    migration_id: int
    downtime: Duration
    """From the moment it stopped at its source until it could go on."""
    num_bytes: int = 0
    """Copied in all, while it decoded and while it stood."""


class MigrationFailed(msgspec.Struct, frozen=True, tag=True):
    """A step of a migration cannot be done. The request is where it was."""

    migration_id: int
    reason: str


class ScalingDue(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """It is time to see how many instances there should be; told every `ClusterMachine.scale_every`."""

    offers: tuple[StartOffer, ...] = ()
    """How instances could be started now, the quickest first."""


class InstanceStarting(msgspec.Struct, frozen=True, tag=True):
    """The host starts an instance by itself, which need not be ordered any more."""

    instance_id: InstanceId


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """An instance that was to be started will not come."""

    instance_id: InstanceId
    reason: str


class InstanceStopped(msgspec.Struct, frozen=True, tag=True):
    """An instance is gone for good, whether it was told to stop or not; its requests were reported before."""

    instance_id: InstanceId


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
    | MoveAsked
    | RoomReserved
    | CopyStarted
    | CopyCaughtUp
    | HandedOver
    | MigrationFailed
    | ScalingDue
    | InstanceStarting
    | StartFailed
    | InstanceStopped
)
