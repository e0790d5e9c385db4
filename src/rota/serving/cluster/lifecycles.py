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
    """The first token passed. From here on its instance alone can finish it."""
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
move when the last request of a draining instance ended."""
