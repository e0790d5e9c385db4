"""Orders that machines give, in the imperative. Each ends in one outcome event."""

from enum import StrEnum
from typing import Literal, NamedTuple

import msgspec

from rota.base.instant import Duration
from rota.serving.model.fleet import StartSource
from rota.serving.model.instance import InstanceId, Role
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


class SwapOut(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Copy so many blocks of a preempted sequence to host memory. The steps after it may overwrite them once they are
    there."""

    request_id: RequestId
    num_blocks: int
    num_valid: int = 0
    """Blocks before these of which there was a copy already."""


class SwapIn(msgspec.Struct, frozen=True, tag=True):
    """Copy so many blocks of a sequence back, into blocks that it holds. It rests until the world says
    `SequenceResumed`."""

    request_id: RequestId
    num_blocks: int


class RejectSequence(msgspec.Struct, frozen=True, tag=True):
    """This request can never run here."""

    request_id: RequestId
    reason: str


class RoomKept(msgspec.Struct, frozen=True, tag=True):
    """Room is kept for a request that may come, for so many tokens."""

    request_id: RequestId
    num_tokens: int


class RoomRefused(msgspec.Struct, frozen=True, tag=True):
    """There is no room for a request that would come. What was kept for it before is given up."""

    request_id: RequestId
    reason: str


class SequenceStopped(msgspec.Struct, frozen=True, tag=True):
    """A request rests here with its blocks, so many of its tokens known, all but the last computed."""

    request_id: RequestId
    num_tokens: int


class StopRefused(msgspec.Struct, frozen=True, tag=True):
    """A request cannot be let rest: it has ended, or lost its blocks."""

    request_id: RequestId
    reason: str


InstanceCommand = RunStep | SwapOut | SwapIn | RejectSequence | RoomKept | RoomRefused | SequenceStopped | StopRefused

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
    num_output_tokens: int = 0
    """Tokens that the client has got already: the instance goes on from there (replay)."""
    prefill_only: bool = False
    """It is to rest when its next token has come, with its blocks: a `Migrate` or a `Stay` follows."""
    decode_at: InstanceId | None = None
    """Where it is to go on then, if that is known by now."""


class Stay(msgspec.Struct, frozen=True, tag=True):
    """A request that was dispatched for its prefill only goes on where it is. Nothing is owed."""

    request_id: RequestId
    instance_id: InstanceId
    reason: str


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


class Way(StrEnum):
    """How a running request gets to another instance."""

    COPY = "copy"
    """Its blocks are copied while it decodes; it stops for the last of them."""
    HAND_OFF = "hand_off"
    """It stops, and its destination pulls its blocks."""
    REPLAY = "replay"
    """It stops, and its destination computes its tokens anew."""


class Migrate(msgspec.Struct, frozen=True, tag=True):
    """Begin to move a running request: have the destination keep room for it. Ends in `RoomReserved` or
    `MigrationFailed`."""

    migration_id: int
    request_id: RequestId
    source: InstanceId
    destination: InstanceId
    way: Way
    reason: str


class MoveRefused(msgspec.Struct, frozen=True, tag=True):
    """A move that was asked for (`MoveAsked`) is not begun. Nothing is owed."""

    request_id: RequestId
    reason: str


class CopyOut(msgspec.Struct, frozen=True, tag=True):
    """Copy a migrating request's blocks while it decodes. Ends in `CopyStarted`, then `CopyCaughtUp`, or in
    `MigrationFailed`. Where nothing is copied ahead, both are said at once."""

    migration_id: int
    request_id: RequestId


class HandOver(msgspec.Struct, frozen=True, tag=True):
    """Stop a migrating request at its source and have it go on at its destination. Ends in `HandedOver` or
    `MigrationFailed`."""

    migration_id: int
    request_id: RequestId


class Commit(msgspec.Struct, frozen=True, tag=True):
    """A migrated request is its destination's: let its source forget it. Nothing is owed."""

    migration_id: int
    request_id: RequestId


class AbortMigration(msgspec.Struct, frozen=True, tag=True):
    """Give a migration up, whatever it had reached: the destination gives up the room, and the request goes on at its
    source if it is there. Nothing is owed."""

    migration_id: int
    request_id: RequestId
    reason: str


class StartInstance(msgspec.Struct, frozen=True, tag=True):
    """Start one more instance, under this id, which was never used before. Ends in `InstanceStarted` or
    `StartFailed`. A host that has no more of that source takes its next best."""

    instance_id: InstanceId
    source: StartSource
    reason: str


class DrainInstance(msgspec.Struct, frozen=True, tag=True):
    """An instance is given no new requests, and what can move goes elsewhere. The host has nothing to do."""

    instance_id: InstanceId
    reason: str


class KeepInstance(msgspec.Struct, frozen=True, tag=True):
    """An instance that was to be drained is wanted after all. The host has nothing to do."""

    instance_id: InstanceId
    reason: str


class SetRole(msgspec.Struct, frozen=True, tag=True):
    """Give an instance that has nothing left another role. Ends in `InstanceStarted`, or `InstanceLost`."""

    instance_id: InstanceId
    role: Role
    reason: str


class StopInstance(msgspec.Struct, frozen=True, tag=True):
    """Stop an instance for good: it has no requests, or is lost, or did not get ready. Ends in `InstanceStopped`."""

    instance_id: InstanceId
    reason: str


ClusterCommand = (
    Dispatch
    | Stay
    | Hold
    | Reject
    | Abort
    | Fail
    | Migrate
    | MoveRefused
    | CopyOut
    | HandOver
    | Commit
    | AbortMigration
    | StartInstance
    | DrainInstance
    | KeepInstance
    | StopInstance
    | SetRole
)
