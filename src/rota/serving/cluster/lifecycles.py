"""The lives of a request and of an instance as the router sees them. Any move that is not listed here raises."""

from enum import StrEnum

from rota.base.table import TransitionTable


class RequestState(StrEnum):
    """Where a request is."""

    QUEUED = "queued"
    """Held by the router: no instance can take it yet."""
    ASSIGNED = "assigned"
    """Dispatched; no token seen. It can still be retried elsewhere, since the client has got nothing."""
    RUNNING = "running"
    """The first token passed. From here on its instance alone can finish it, unless it can be resumed elsewhere."""
    FINISHED = "finished"
    REJECTED = "rejected"
    FAILED = "failed"
    ABORTED = "aborted"


class InstanceState(StrEnum):
    """Whether an instance takes requests."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"
    STOPPED = "stopped"


class MemberState(StrEnum):
    """How an instance belongs to the fleet that is scaled, whatever requests it has."""

    ORDERED = "ordered"
    """It was asked to start, and has not been ready yet."""
    SERVING = "serving"
    """It was ready, and is wanted; it may be lost at times."""
    LEAVING = "leaving"
    """It drains, to be stopped when it is empty."""
    STOPPING = "stopping"
    """It was told to stop."""
    GONE = "gone"


class MigrationState(StrEnum):
    """How far a move of a running request is. Its source owns it in every state but `COMMITTED`."""

    PROPOSED = "proposed"
    """The destination was asked for room."""
    RESERVED = "reserved"
    """Room is kept there."""
    COPYING = "copying"
    """Blocks are on their way, and it decodes at its source."""
    HANDOVER = "handover"
    """It stops at its source for the last blocks."""
    COMMITTED = "committed"
    """It runs at its destination, which owns it."""
    ABORTED = "aborted"
    """It runs at its source, or has ended there."""


REQUEST_LIFECYCLE = TransitionTable(
    "request",
    {
        RequestState.QUEUED: {
            "dispatched": RequestState.ASSIGNED,
            "rejected": RequestState.REJECTED,
            "aborted": RequestState.ABORTED,
            "failed": RequestState.FAILED,
        },
        RequestState.ASSIGNED: {
            "first_token": RequestState.RUNNING,
            "finished": RequestState.FINISHED,
            "retried": RequestState.QUEUED,
            "aborted": RequestState.ABORTED,
            "failed": RequestState.FAILED,
        },
        RequestState.RUNNING: {
            "finished": RequestState.FINISHED,
            "resumed": RequestState.QUEUED,
            "aborted": RequestState.ABORTED,
            "failed": RequestState.FAILED,
        },
    },
    initial=RequestState.QUEUED,
    final=(RequestState.FINISHED, RequestState.REJECTED, RequestState.FAILED, RequestState.ABORTED),
)

INSTANCE_LIFECYCLE = TransitionTable(
    "instance",
    {
        InstanceState.STARTING: {"started": InstanceState.READY, "lost": InstanceState.LOST},
        InstanceState.READY: {
            "started": InstanceState.READY,
            "draining": InstanceState.DRAINING,
            "lost": InstanceState.LOST,
        },
        InstanceState.DRAINING: {
            "started": InstanceState.READY,
            "draining": InstanceState.DRAINING,
            "drained": InstanceState.STOPPED,
            "kept": InstanceState.READY,
            "lost": InstanceState.LOST,
        },
        InstanceState.LOST: {
            "started": InstanceState.READY,
            "lost": InstanceState.LOST,
            "draining": InstanceState.LOST,
        },
    },
    initial=InstanceState.STARTING,
    final=(InstanceState.STOPPED,),
)
"""`started` on an instance that is not new means that it came back, with nothing cached; `drained` is the router's own
move when the last request of a draining instance ended, and `kept` when one is not to be drained after all."""

MEMBER_LIFECYCLE = TransitionTable(
    "member",
    {
        MemberState.ORDERED: {
            "started": MemberState.SERVING,
            "late": MemberState.STOPPING,
            "gone": MemberState.GONE,
        },
        MemberState.SERVING: {"drained": MemberState.LEAVING, "gone": MemberState.GONE},
        MemberState.LEAVING: {
            "kept": MemberState.SERVING,
            "empty": MemberState.STOPPING,
            "lost": MemberState.STOPPING,
            "gone": MemberState.GONE,
        },
        MemberState.STOPPING: {"gone": MemberState.GONE},
    },
    initial=MemberState.ORDERED,
    final=(MemberState.GONE,),
)
"""Only the router moves it: what instances say of themselves is in their own lifecycle."""

MIGRATION_LIFECYCLE = TransitionTable(
    "migration",
    {
        MigrationState.PROPOSED: {"reserved": MigrationState.RESERVED, "aborted": MigrationState.ABORTED},
        MigrationState.RESERVED: {"copying": MigrationState.COPYING, "aborted": MigrationState.ABORTED},
        MigrationState.COPYING: {"caught_up": MigrationState.HANDOVER, "aborted": MigrationState.ABORTED},
        MigrationState.HANDOVER: {"handed_over": MigrationState.COMMITTED, "aborted": MigrationState.ABORTED},
    },
    initial=MigrationState.PROPOSED,
    final=(MigrationState.COMMITTED, MigrationState.ABORTED),
)
