"""Little's law as an equality of integers, on a run with everything in it."""

from collections.abc import Iterator, Sequence

from benchmarks.truth.row import TruthRow, compared

from rota.base.instant import Duration, Instant, after, milliseconds
from rota.base.journal import Header, Journal, Row, RowKind
from rota.runtime.faults import Fault, FaultPlan
from rota.serving.assemble import SystemConfig, header_of
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.predictors.step_time.affine import AffineStepTime
from rota.serving.sim.cluster import SimulatedCluster, WorldOptions
from rota.serving.stack import StackConfig
from rota.testing.worlds import seeded_arrivals

LIMITS = InstanceLimits(num_blocks=24, block_size=4, max_num_seqs=8, max_num_batched_tokens=32)
NUM_REQUESTS = 2_000


class Area(Journal):
    """Adds up over time how many sequences wait and run on the engines. Each row of the journal is a moment at which
    that may change; between two rows it cannot."""

    def __init__(self, header: Header) -> None:
        super().__init__(header)
        self.area = 0
        self.cluster: SimulatedCluster | None = None
        self._last_at = 0
        self._num_before = 0

    def append(self, machine: str, at: Instant, kind: RowKind, event: object, commands: Sequence[object]) -> Row:
        self.area += (at - self._last_at) * self._num_before
        self._last_at = at
        if self.cluster is not None:
            self._num_before = sum(len(each.running) + len(each.waiting) for each in self.cluster.machines())
        return super().append(machine, at, kind, event, commands)


def littles_law(group: str) -> Iterator[TruthRow]:
    """The area under the number of sequences on the engines is the sum of the times that requests spend there: one is
    counted at the machines over time, the other taken from the records. Bursts, three classes that displace each
    other, shared prefixes, too little memory, clients who leave."""
    for order in ("fcfs", "strict_priority"):
        for num_instances in (1, 3):
            yield _row(group, order, num_instances)


def _row(group: str, order: str, num_instances: int) -> TruthRow:
    specs = tuple(InstanceSpec(InstanceId(f"i{number}"), LIMITS) for number in range(num_instances))
    config = SystemConfig(StackConfig(order=order), specs)
    journal = Area(header_of(config))
    arrivals = seeded_arrivals(1, NUM_REQUESTS, milliseconds(60 / num_instances))
    leavers = [
        Fault("client_leaves", request.id, after(request.arrived_at, milliseconds(40))) for request, _ in arrivals[5::9]
    ]
    cluster = SimulatedCluster(
        config,
        arrivals,
        AffineStepTime(base_ms=2.0, token_us=10.0, kv_token_ns=100.0),
        WorldOptions(step_overhead=Duration(300_001)),
        journal=journal,
        faults=FaultPlan(leavers),
    )
    journal.cluster = cluster
    cluster.run()
    records = cluster.records
    num_preemptions = sum(machine.statistics().num_preemptions for machine in cluster.machines())
    num_left = sum(record.status == "aborted" for record in records)
    return compared(
        group, f"Little's law, {order}, {num_instances} engines", "area under the number in the system",
        "requests × ns", truth=sum(record.finished_at - record.arrived_at for record in records), rota=journal.area,
        bound=0.0, note=f"{num_preemptions:,} preemptions, {num_left:,} left",
    )  # fmt: skip
