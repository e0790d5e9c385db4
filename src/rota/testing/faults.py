"""What goes wrong in a simulated cluster, drawn from a seed or aimed at every step in turn."""

from collections.abc import Iterable, Iterator, Sequence

from rota.base.instant import Duration, Instant, milliseconds
from rota.base.journal import Row
from rota.base.random_streams import Stream
from rota.runtime.faults import Fault, FaultKind, FaultPlan, random_plan
from rota.serving.model.commands import RunStep
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import RequestId


def cluster_faults(
    stream: Stream,
    instance_ids: Sequence[InstanceId],
    request_ids: Sequence[RequestId],
    horizon: Duration,
    *,
    num_crashes: int = 2,
    num_slowdowns: int = 2,
    num_leaving: int = 4,
    start: Instant = Instant(0),
) -> FaultPlan:
    """Crashes, slowdowns and clients who leave, evenly over `[start, start + horizon)`."""
    down = FaultKind("crash", duration=(milliseconds(1), Duration(max(horizon // 3, milliseconds(1)))))
    slow = FaultKind(
        "slow", duration=(milliseconds(1), Duration(max(horizon // 3, milliseconds(1)))), magnitude=(1.5, 6.0)
    )
    leaves = FaultKind("client_leaves")
    return FaultPlan(
        [
            *random_plan(stream, [down], instance_ids, horizon, num_crashes, start),
            *random_plan(stream, [slow], instance_ids, horizon, num_slowdowns, start),
            *random_plan(stream, [leaves], request_ids, horizon, num_leaving, start),
        ]
    )


def crash_in_each_step(rows: Iterable[Row], duration: Duration) -> Iterator[FaultPlan]:
    """For every step in the journal of a run, the plan by which its instance dies in the midst of it."""
    for row in rows:
        if any(isinstance(command, RunStep) for command in row.commands):
            instance_id = row.machine.removeprefix("instance/").partition("#")[0]
            yield FaultPlan([Fault("crash", instance_id, Instant(row.at + 1), duration)])
