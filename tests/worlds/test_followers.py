"""Programs in a simulated cluster: calls come when what they wait for has ended, whatever breaks, leaping or not."""

from dataclasses import replace
from itertools import product

import pytest
from tests.command_line import rota

from rota.base.instant import Duration, Instant, milliseconds
from rota.base.journal import Journal
from rota.base.random_streams import RandomStreams
from rota.serving.assemble import SystemConfig, header_of
from rota.serving.model.events import RequestArrived
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.model.request import Request
from rota.serving.sim.cluster import SimulatedCluster, WorldOptions
from rota.serving.stack import StackConfig
from rota.serving.workload.arrivals import Arrival, to_request
from rota.serving.workload.followers import ArrivalFlow
from rota.testing.faults import cluster_faults
from rota.testing.worlds import Pace

LIMITS = InstanceLimits(num_blocks=30, block_size=16, max_num_seqs=5, max_num_batched_tokens=64)
OPTIONS = WorldOptions(step_overhead=Duration(100_000), report_interval=milliseconds(20), report_delay=milliseconds(3))
STACKS = {
    "default": StackConfig(),
    "priority": StackConfig(order="strict_priority", batch="stall_free_chunks", memory="recompute_lowest"),
    "prefill first": StackConfig(batch="prefill_first", dispatch="least_outstanding_tokens"),
}


def programs(seed: int, num_programs: int = 12) -> list[Arrival]:
    """Chains, and forks that join, with tool times from nothing to more than a program takes."""
    stream = RandomStreams(seed).stream("programs")
    at, rows = 0, []
    for _ in range(num_programs):
        at += stream.integers(0, 60) * 1_000_000
        for call in range(stream.integers(1, 7)):
            names = [str(number) for number in range(call)]
            after = tuple(stream.sample(names, stream.integers(1, len(names) + 1))) if names else ()
            gap = stream.choice([0, 0, 1_000_000, 40_000_000]) if after else 0
            rows.append(
                Arrival(
                    Duration(at),
                    stream.integers(1, 120),
                    stream.integers(1, 60),
                    (1, 2, 3)[: stream.integers(0, 4)] if stream.random() < 0.5 else (),
                    16,
                    priority=stream.integers(0, 2),
                    id=str(call),
                    after=after,
                    gap=Duration(gap),
                )
            )
    return [row if row.num_prompt_tokens >= 16 * len(row.prefix_hashes) else Arrival(row.at, 64, 3, id=row.id,
            after=row.after, gap=row.gap) for row in rows]  # fmt: skip


def play(rows: list[Arrival], stack: StackConfig, seed: int, *, leap: bool = True) -> tuple[SimulatedCluster, Journal]:
    def build(arrival: Arrival, number: int, at: Instant | None) -> tuple[Request, int]:
        return to_request(arrival, f"r-{number}", Instant(0), max_model_len=400, arrived_at=at)

    ids = [InstanceId("i0"), InstanceId("i1")]
    config = SystemConfig(stack=stack, instances=tuple(InstanceSpec(name, LIMITS) for name in ids))
    names = [f"r-{number}" for number in range(len(rows))]
    faults = cluster_faults(RandomStreams(seed).stream("faults"), ids, names, Duration(12 * 60_000_000))
    journal = Journal(header_of(config), keep_rows=True)
    flow = ArrivalFlow(rows, build)
    cluster = SimulatedCluster(
        config, flow, Pace(), replace(OPTIONS, leap=leap), journal=journal, faults=faults, followers=flow.ended
    )
    cluster.run()
    assert flow.num_waited_for == 0
    return cluster, journal


@pytest.mark.parametrize(("stack", "seed"), list(product(STACKS, range(6))))
def test_calls_come_when_what_they_wait_for_has_ended(stack: str, seed: int) -> None:
    rows = programs(seed)
    cluster, journal = play(rows, STACKS[stack], seed)
    records = {record.id: record for record in cluster.records}
    assert len(records) == len(cluster.records) == len(rows), "a request was lost or answered twice"
    arrivals = [row.event.request for row in journal.rows if isinstance(row.event, RequestArrived)]
    assert sorted(request.id for request in arrivals) == sorted(records)
    names: dict[str, str] = {}
    for number, row in enumerate(rows):
        if not row.after:
            names.clear()
            assert records[f"r-{number}"].arrived_at == row.at
        else:
            ends = [records[names[name]].finished_at for name in row.after]
            assert records[f"r-{number}"].arrived_at == max(ends) + row.gap
        names[str(row.id)] = f"r-{number}"


@pytest.mark.parametrize(("stack", "seed"), list(product(STACKS, range(4))))
def test_leaping_is_as_good_as_stepping(stack: str, seed: int) -> None:
    rows = programs(seed)
    leaping, _ = play(rows, STACKS[stack], seed)
    stepping, _ = play(rows, STACKS[stack], seed, leap=False)
    assert leaping.records == stepping.records


def test_same_trace_same_journal() -> None:
    assert play(programs(3), StackConfig(), 3)[1].digest == play(programs(3), StackConfig(), 3)[1].digest


def test_the_command_line_plays_programs(tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.unit.workload.samples import AGENTS

    path = tmp_path_factory.mktemp("agents") / "calls.csv"
    path.write_text(AGENTS)
    ran = rota("simulate", "--trace", path, "--json")
    assert ran.code == 0, ran.stderr
    assert '"num_finished": 4' in ran.stdout
