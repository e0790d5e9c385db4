"""Where queueing theory knows the answer, the simulator gives it: Little's law exactly, M/D/1 within its error."""

from math import sqrt

import pytest

from rota.base.instant import Duration, Instant
from rota.base.journal import Journal
from rota.base.random_streams import RandomStreams
from rota.serving.assemble import CLUSTER, SystemConfig, header_of
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.model.request import Request, RequestId
from rota.serving.policies.order.strict_priority import StrictPriority
from rota.serving.sim.cluster import SimulatedCluster, WorldOptions
from rota.serving.stack import StackConfig
from rota.testing.worlds import seeded_arrivals

MS = 1_000_000
SERVICE = 10 * MS
NUM_SERVED = 50_000
NUM_BATCHES = 30


class Constant:
    """Every step takes the same time, whatever is in it."""

    def __init__(self, step):
        self.step = step

    def step_time(self, *, prefills, num_decodes, decode_kv_tokens, now=Instant(0)):
        return self.step


class ByClassWithoutDisplacing(StrictPriority):
    displacing = False

    def displaces(self, view, waiting, running):
        return False


def one_server(order="fcfs", **limits):
    """An engine that serves one request at a time."""
    spec = InstanceSpec(InstanceId("i0"), InstanceLimits(num_blocks=100, block_size=4, max_num_seqs=1, **limits))
    return SystemConfig(StackConfig(order=order, dispatch="round_robin"), (spec,))


def poisson(load, num_requests, num_steps, seed=0, classes=(0,)):
    """Requests of one prompt token and `num_steps` output tokens, so that each takes as many steps of its own."""
    stream = RandomStreams(seed).stream("arrivals")
    at = 0.0
    for number in range(num_requests):
        at += stream.exponential(SERVICE / load)
        yield (
            Request(RequestId(f"r{number}"), Instant(round(at)), 1, num_steps, priority=stream.choice(classes)),
            num_steps,
        )


def simulate(config, arrivals, step):
    cluster = SimulatedCluster(config, arrivals, Constant(step), WorldOptions(report_interval=Duration(0)))
    cluster.run()
    return cluster


def mean_wait(records, service=SERVICE):
    """Mean time in the queue in units of the service time, and its standard error by batch means."""
    assert {record.status for record in records} == {"finished"}
    ordered = sorted(records, key=lambda record: record.arrived_at)[len(records) // 20 :]
    waits = [(record.finished_at - record.arrived_at - service) / service for record in ordered]
    size = len(waits) // NUM_BATCHES
    means = [sum(waits[start : start + size]) / size for start in range(0, size * NUM_BATCHES, size)]
    mean = sum(means) / NUM_BATCHES
    deviation = sqrt(sum((each - mean) ** 2 for each in means) / (NUM_BATCHES - 1))
    return mean, deviation / sqrt(NUM_BATCHES)


@pytest.mark.parametrize(("load", "num_steps"), [(0.5, 1), pytest.param(0.8, 2, marks=pytest.mark.slow)])
def test_the_mean_wait_of_m_d_1(load, num_steps):
    """Pollaczek and Khinchine: with constant service the mean wait is load / (2 (1 - load)) services."""
    cluster = simulate(one_server(), poisson(load, NUM_SERVED, num_steps), SERVICE // num_steps)
    mean, error = mean_wait(cluster.records)
    expected = load / (2 * (1 - load))
    assert error < 0.06 * expected, "too few requests to tell"
    assert abs(mean - expected) < 4 * error
    (machine,) = cluster.machines()
    assert machine.statistics().num_steps == NUM_SERVED * num_steps


def test_a_wrong_load_is_told_apart():
    """The test above is not blind: a twentieth more load is outside of its error."""
    cluster = simulate(one_server(), poisson(0.84, 30_000, 1), SERVICE)
    mean, error = mean_wait(cluster.records)
    assert abs(mean - 0.8 / (2 * (1 - 0.8))) > 4 * error


def test_the_mean_wait_of_each_class_without_displacing():
    """Cobham: class k waits W0 / ((1 - s_{k-1}) (1 - s_k)), s_k being the load of classes up to k, W0 = load / 2."""
    load = 0.8
    order = f"{__name__}:ByClassWithoutDisplacing"
    cluster = simulate(one_server(order), poisson(load, NUM_SERVED, 1, classes=(0, 1)), SERVICE)
    for priority in (0, 1):
        mean, error = mean_wait([record for record in cluster.records if record.priority == priority])
        up_to, before = load / 2 * (priority + 1), load / 2 * priority
        expected = load / 2 / ((1 - before) * (1 - up_to))
        assert abs(mean - expected) < 4 * error, (priority, mean, expected, error)


class Area(Journal):
    """Adds up how many requests are unfinished, and how many wait and run on the engines, over time."""

    def __init__(self, header):
        super().__init__(header)
        self.last_at = 0
        self.unfinished = self.on_engines = 0
        self.cluster = None
        self.before = (0, 0)

    def append(self, machine, at, kind, event, commands):
        span = at - self.last_at
        self.last_at = at
        self.unfinished += span * self.before[0]
        self.on_engines += span * self.before[1]
        self.before = self.count()
        return super().append(machine, at, kind, event, commands)

    def count(self):
        if self.cluster is None:
            return 0, 0
        router = self.cluster.loop._slots[CLUSTER].machine
        on_engines = sum(len(machine.running) + len(machine.waiting) for machine in self.cluster.machines())
        return len(router.unfinished()), on_engines


@pytest.mark.parametrize("order", ["fcfs", "strict_priority"])
@pytest.mark.parametrize("num_instances", [1, 3])
def test_littles_law_holds_to_the_nanosecond(order, num_instances):
    """The area under the number of requests in the system is the sum of their times in it: both as integers, one
    counted at the machines over time, the other taken from the records."""
    limits = InstanceLimits(num_blocks=24, block_size=4, max_num_seqs=5, max_num_batched_tokens=32)
    specs = tuple(InstanceSpec(InstanceId(f"i{number}"), limits) for number in range(num_instances))
    config = SystemConfig(StackConfig(order=order), specs)
    journal = Area(header_of(config))
    arrivals = seeded_arrivals(1, 300, Duration(4 * MS))
    cluster = SimulatedCluster(config, arrivals, Constant(3 * MS), journal=journal)
    journal.cluster = cluster
    cluster.run()
    times = sum(record.finished_at - record.arrived_at for record in cluster.records)
    assert journal.unfinished == times > 300 * 4 * MS
    assert journal.on_engines == times, "the router holds nobody back, so all of that time is spent on the engines"


def test_an_engine_that_is_never_idle_serves_at_its_capacity():
    """A closed burst: n requests of one step each take n steps, whatever the order, and the engine never pauses."""
    for order in ("fcfs", "strict_priority"):
        arrivals = [(Request(RequestId(f"r{n:03}"), Instant(0), 1, 1, priority=n % 3), 1) for n in range(200)]
        cluster = simulate(one_server(order), arrivals, SERVICE)
        assert sorted(record.finished_at for record in cluster.records) == [SERVICE * (n + 1) for n in range(200)]


def test_a_batch_decodes_as_many_as_fit():
    """Capacity of a batch: with room for 8 at a time, 64 requests of 5 tokens take 8 rounds of 5 steps."""
    spec = InstanceSpec(InstanceId("i0"), InstanceLimits(num_blocks=100, block_size=4, max_num_seqs=8))
    arrivals = [(Request(RequestId(f"r{n:02}"), Instant(0), 1, 5), 5) for n in range(64)]
    cluster = simulate(SystemConfig(StackConfig(dispatch="round_robin"), (spec,)), arrivals, SERVICE)
    # The first arrives at an idle engine and starts alone; its slot is one step ahead from then on.
    assert max(record.finished_at for record in cluster.records) == (8 * 5 + 1) * SERVICE
