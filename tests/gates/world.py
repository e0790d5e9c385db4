"""The congested run that every gate is run on: two small instances, bursts, shared prefixes, classes, aborts, a
crash."""

import random
from collections.abc import Iterator

from rota.base.instant import Duration, Instant, milliseconds, seconds
from rota.base.journal import Journal
from rota.runtime.faults import Fault, FaultPlan
from rota.serving.assemble import SystemConfig, header_of
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.model.request import Request, RequestId
from rota.serving.predictors.step_time.affine import AffineStepTime
from rota.serving.sim.cluster import SimulatedCluster, WorldOptions
from rota.serving.stack import StackConfig

NUM_REQUESTS = 160
LIMITS = InstanceLimits(num_blocks=72, max_num_seqs=8, max_num_batched_tokens=192, max_model_len=1024)


def system(stack: StackConfig) -> SystemConfig:
    return SystemConfig(
        stack=stack,
        instances=tuple(InstanceSpec(InstanceId(name), LIMITS) for name in ("a", "b")),
    )


def requests(start: Instant) -> Iterator[tuple[Request, int]]:
    draw = random.Random(7)
    at = 0
    for number in range(NUM_REQUESTS):
        at += 0 if draw.random() < 0.4 else round(draw.expovariate(1 / 0.06) * 1e9)
        family = draw.randrange(4)
        num_shared = draw.choice((0, 2, 6))
        num_prompt_tokens = 16 * num_shared + draw.randint(1, 200)
        request = Request(
            id=RequestId(f"r{number}"),
            arrived_at=Instant(start + at),
            num_prompt_tokens=num_prompt_tokens,
            max_tokens=256,
            priority=draw.choice((0, 1, 1, 2)),
            block_hashes=tuple((family, block) for block in range(num_shared)),
        )
        yield request, draw.randint(1, 140)


def faults(start: Instant) -> FaultPlan:
    return FaultPlan(
        [
            Fault("crash", "a", Instant(start + seconds(2)), seconds(1)),
            Fault("slow", "b", Instant(start + seconds(3)), seconds(1), 3.0),
            *(
                Fault("client_leaves", f"r{number}", Instant(start + seconds(number / 20)))
                for number in range(5, 90, 9)
            ),
        ]
    )


def play(config: SystemConfig, start: Instant = Instant(0), *, leap: bool = True) -> tuple[SimulatedCluster, Journal]:
    """Run it, and make sure that the run is worth looking at: a gate on an idle system proves nothing."""
    journal = Journal(header_of(config), keep_rows=True)
    cluster = SimulatedCluster(
        config,
        requests(start),
        AffineStepTime(base_ms=8.0, token_us=60.0, kv_token_ns=100.0, seq_us=20.0),
        WorldOptions(
            start=start,
            leap=leap,
            report_interval=milliseconds(250),
            report_delay=milliseconds(30),
            step_overhead=Duration(500_000),
        ),
        journal=journal,
        faults=faults(start),
    )
    cluster.run()
    for machine in cluster.machines():
        machine.check()
        assert not machine.unfinished()
    assert len(cluster.records) == NUM_REQUESTS
    assert sum(machine.statistics().num_preemptions for machine in cluster.machines()) > 5, "nobody was preempted"
    assert max(max(series.waiting) for series in cluster.sampler.series.values()) > 10, "nobody queued"
    assert sum(machine.statistics().num_cached_tokens for machine in cluster.machines()) > 0, "no prefix was shared"
    assert {record.status for record in cluster.records} >= {"finished", "aborted"}
    return cluster, journal


STACKS = {
    "default": StackConfig(),
    "strict_priority": StackConfig(order="strict_priority"),
    "strict_priority, stall_free_chunks": StackConfig(order="strict_priority", batch="stall_free_chunks"),
    "prefill_first, power_of_two": StackConfig(batch="prefill_first", memory="recompute_last", dispatch="power_of_two"),
    "round_robin": StackConfig(memory="recompute_last", dispatch="round_robin"),
}
