"""Simulated clusters with faults on: whatever breaks, every request ends once, and nothing is left behind."""

import pytest

from rota.base.errors import ConfigError, LawBroken, StarvationError
from rota.base.instant import Duration, Instant, milliseconds, seconds
from rota.base.journal import Journal
from rota.base.random_streams import RandomStreams
from rota.runtime.faults import Fault, FaultPlan
from rota.serving.assemble import CLUSTER, SystemConfig, header_of
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.policies.batch.vllm_default import VllmDefault
from rota.serving.sim.cluster import SimulatedCluster, WorldOptions
from rota.serving.sim.instance import SimulatedInstance
from rota.serving.stack import Parameters, StackConfig
from rota.testing.faults import cluster_faults, crash_in_each_step
from rota.testing.worlds import Pace, seeded_arrivals

LIMITS = InstanceLimits(num_blocks=24, block_size=4, max_num_seqs=5, max_num_batched_tokens=32)
NUM_REQUESTS = 60
GAP = milliseconds(5)
HORIZON = Duration(NUM_REQUESTS * GAP)
STACKS = {
    "default": StackConfig(),
    "strict_priority, stall_free_chunks": StackConfig(
        order="strict_priority", batch="stall_free_chunks", dispatch="least_outstanding_tokens"
    ),
    "ageing, prefill_first": StackConfig(
        order="strict_priority",
        batch="prefill_first",
        memory="recompute_last",
        dispatch="round_robin",
        parameters=Parameters(order={"ageing_seconds": 0.02}),
    ),
    "fcfs, power_of_two": StackConfig(batch="stall_free_chunks", memory="recompute_last", dispatch="power_of_two"),
}
OPTIONS = WorldOptions(step_overhead=Duration(100_000), report_interval=milliseconds(20), report_delay=milliseconds(3))


class CheckingJournal(Journal):
    """Has every machine check its laws after each row of its own."""

    cluster = None

    def append(self, machine, at, kind, event, commands):
        if self.cluster is not None:
            self.cluster.loop._slots[machine].machine.check()
        return super().append(machine, at, kind, event, commands)


def simulate(stack, arrivals, faults=FaultPlan(), *, num_instances=3, options=OPTIONS):
    """Run to the end, with all that must hold of any run checked on the way and afterwards."""
    config = SystemConfig(
        stack=stack, instances=tuple(InstanceSpec(InstanceId(f"i{number}"), LIMITS) for number in range(num_instances))
    )
    journal = CheckingJournal(header_of(config), keep_rows=True)
    cluster = SimulatedCluster(config, arrivals, Pace(), options, journal=journal, faults=faults)
    journal.cluster = cluster
    cluster.run()
    check_records(cluster, arrivals, faults)
    for machine in cluster.machines():
        machine.check()
        assert not machine.unfinished()
        assert machine.num_free_blocks == LIMITS.num_blocks, "law 3: blocks are held for nobody"
    router = cluster.loop._slots[CLUSTER].machine
    assert not router.unfinished()
    assert router.counts().num_arrived == len(arrivals)
    assert all(view.num_outstanding_tokens == 0 for view in router.instance_views())
    assert not cluster._truth._num_output_tokens, "law 12: the truth about ended requests is kept"
    return cluster, journal


def check_records(cluster, arrivals, faults):
    truth = {request.id: (request, num_output) for request, num_output in arrivals}
    assert sorted(record.id for record in cluster.records) == sorted(truth), "law 1"
    leaving = {fault.target for fault in faults if fault.kind == "client_leaves"}
    for record in cluster.records:
        request, num_output = truth[record.id]
        assert record.arrived_at == request.arrived_at <= record.finished_at, "law 5"
        if record.first_token_at is not None:
            assert record.arrived_at <= record.first_token_at <= record.finished_at, "law 5"
        if record.status == "finished":
            longest = LIMITS.num_blocks * LIMITS.block_size - request.num_prompt_tokens
            assert record.num_output_tokens == min(num_output, request.max_tokens, longest), "law 2"
            assert record.first_token_at is not None
        elif record.status == "aborted":
            assert record.id in leaving
        else:
            assert record.reason, "law 11"


@pytest.mark.parametrize("stack", STACKS)
def test_every_request_ends_once_whatever_breaks(stack):
    ended = {}
    num_preempted = num_retried = num_incarnations = 0
    for seed in range(8):
        arrivals = seeded_arrivals(seed, NUM_REQUESTS, GAP)
        instance_ids = [InstanceId(f"i{number}") for number in range(3)]
        faults = cluster_faults(
            RandomStreams(seed).stream("faults"), instance_ids, [request.id for request, _ in arrivals], HORIZON
        )
        cluster, journal = simulate(STACKS[stack], arrivals, faults)
        for record in cluster.records:
            ended[record.status] = ended.get(record.status, 0) + 1
        num_preempted += sum(machine.statistics().num_preemptions for machine in cluster.machines())
        num_incarnations += len({row.machine for row in journal.rows if "#" in row.machine})
        num_retried += sum(getattr(command, "attempt", 1) > 1 for row in journal.rows for command in row.commands)
    # It went wrong in every way in which it can.
    assert ended["finished"] > 200
    assert min(ended["failed"], ended["aborted"], num_retried, num_incarnations) > 3
    assert num_preempted > 50


def small():
    """Few requests and one instance, so that every step of the run can be broken in turn."""
    return seeded_arrivals(3, 8, milliseconds(4))


def test_an_instance_may_die_in_any_step():
    _, journal = simulate(StackConfig(), small(), num_instances=2)
    num_plans = 0
    failed = set()
    for faults in crash_in_each_step(journal.rows, milliseconds(10)):
        cluster, _ = simulate(StackConfig(), small(), faults, num_instances=2)
        failed |= {record.id for record in cluster.records if record.status == "failed"}
        num_plans += 1
    assert num_plans > 30
    assert len(failed) > 4, "crashes after the first token end in an error"


def test_a_client_may_leave_in_any_step():
    _, journal = simulate(StackConfig(), small(), num_instances=1)
    instants = sorted({row.at for row in journal.rows})
    aborted = 0
    for number, at in enumerate(instants):
        target = f"r{number % 8:03}"
        for moment in (at, at + 1):
            faults = FaultPlan([Fault("client_leaves", target, Instant(moment))])
            cluster, _ = simulate(StackConfig(), small(), faults, num_instances=1)
            aborted += sum(record.status == "aborted" for record in cluster.records)
    assert aborted > 20


def test_a_step_that_never_ends_is_noticed(monkeypatch):
    """Fail the n-th step, for every n: the engine swallows it. Then nothing ever wakes the machine again, and the run
    says who starves, instead of ending as if all were well."""
    start = SimulatedInstance._start
    num_struck = 0
    for nth in range(1, 1_000):
        num_seen = 0

        def swallow(self, command, now, nth=nth):
            nonlocal num_seen
            num_seen += 1
            if num_seen != nth:
                start(self, command, now)

        monkeypatch.setattr(SimulatedInstance, "_start", swallow)
        try:
            simulate(StackConfig(), small(), num_instances=1, options=WorldOptions(report_interval=seconds(5)))
        except StarvationError as error:
            assert "r00" in error.message
            num_struck += 1
        if num_seen < nth:
            break
        assert num_struck == nth, f"step {nth} was lost, and nobody noticed"
    assert num_struck > 10


class GrantsNothing(VllmDefault):
    shape = None

    def plan(self, draft, order):
        pass


def test_a_policy_that_serves_nobody_is_named_with_its_victim():
    with pytest.raises(StarvationError, match=r"r000 starves") as raised:
        simulate(StackConfig(batch="tests.worlds.test_simulated_cluster:GrantsNothing"), small())
    assert raised.value.hint


def test_when_the_only_instance_never_comes_back_everybody_is_told():
    """Nobody waits for ever: what is held ends with a reason when it has waited long enough."""
    faults = FaultPlan([Fault("crash", "i0", milliseconds(6), seconds(1_000))])
    cluster, _ = simulate(StackConfig(), small(), faults, num_instances=1, options=WorldOptions())
    by_status = {record.status: record for record in cluster.records}
    assert {"failed", "rejected"} <= set(by_status)
    assert "within 60 s" in by_status["rejected"].reason
    assert by_status["rejected"].finished_at - by_status["rejected"].arrived_at == seconds(60)


def test_a_prompt_that_fits_nowhere_is_refused_at_the_door():
    (request, _), *rest = small()
    long = type(request)(request.id, request.arrived_at, 24 * 4, 5)
    cluster, _ = simulate(StackConfig(), [(long, 5), *rest])
    (record,) = [record for record in cluster.records if record.status == "rejected"]
    assert (record.id, record.finished_at) == (long.id, long.arrived_at)
    assert "96 tokens" in record.reason


@pytest.mark.parametrize("report_interval", [0, milliseconds(20)])
def test_a_slow_instance_takes_longer_and_recovers(report_interval):
    options = WorldOptions(report_interval=Duration(report_interval))
    plain, _ = simulate(StackConfig(), small(), num_instances=1, options=options)
    slow = FaultPlan([Fault("slow", "i0", milliseconds(2), milliseconds(10), 4.0)])
    slowed, _ = simulate(StackConfig(), small(), slow, num_instances=1, options=options)
    over = FaultPlan([Fault("slow", "i0", Instant(0), milliseconds(1), 4.0)])
    assert slowed.records[-1].finished_at > plain.records[-1].finished_at
    recovered, _ = simulate(StackConfig(), small(), over, num_instances=1, options=options)
    assert recovered.records[-1].finished_at < slowed.records[-1].finished_at


def test_slowdowns_that_overlap_end_one_by_one():
    """The shorter one within the longer: when it ends, the longer still holds."""
    long = Fault("slow", "i0", Instant(0), seconds(10), 3.0)
    short = Fault("slow", "i0", Instant(1), milliseconds(1), 3.0)
    one, _ = simulate(StackConfig(), small(), FaultPlan([long]), num_instances=1)
    both, _ = simulate(StackConfig(), small(), FaultPlan([long, short]), num_instances=1)
    assert one.records == both.records


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("flood", "i0", Instant(0)), "unknown kind of fault 'flood'"),
        (Fault("crash", "i9", Instant(0)), "unknown instance 'i9'"),
    ],
)
def test_a_fault_that_cannot_be_is_refused(fault, message):
    with pytest.raises(ConfigError, match=message):
        simulate(StackConfig(), small(), FaultPlan([fault]))


def test_a_second_end_would_be_seen():
    """The checks above are not blind: an answer given twice breaks the first of them."""
    cluster, _ = simulate(StackConfig(), small(), num_instances=1)
    cluster.records.append(cluster.records[0])
    with pytest.raises(AssertionError, match="law 1"):
        check_records(cluster, small(), FaultPlan())


def test_laws_are_checked_on_the_way(monkeypatch):
    monkeypatch.setattr("rota.serving.instance.ledger.BlockLedger.release", lambda *args, **kwargs: None)
    with pytest.raises(LawBroken, match="law 3"):
        simulate(StackConfig(), small(), num_instances=1)
