"""Shortest first, where queueing theory knows what it is worth: one server, two lengths, preemption without loss."""

import pytest
from tests.theory.test_queues import Constant

from rota.base.instant import Duration, Instant
from rota.base.random_streams import RandomStreams
from rota.serving.assemble import SystemConfig
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.model.request import Request, RequestId
from rota.serving.sim.cluster import SimulatedCluster, WorldOptions
from rota.serving.stack import Parameters, StackConfig

pytestmark = pytest.mark.slow

STEP = 1_000_000
SHORT, LONG, SHARE_LONG = 10, 100, 0.1
LOAD = 0.7
RATE = LOAD / ((1 - SHARE_LONG) * SHORT + SHARE_LONG * LONG)
"""Requests a step."""
NUM_REQUESTS = 6000


class RandomScores:
    """The control: the same preemptive engine, and scores that say nothing."""

    cost = Duration(0)

    def __init__(self):
        self.stream = RandomStreams(7).stream("scores")

    def predict(self, request):
        return 1.0 + self.stream.random() * LONG

    def request_ended(self, request, num_output_tokens):
        pass


def arrivals(seed):
    stream = RandomStreams(seed).stream("arrivals")
    at = 0.0
    for number in range(NUM_REQUESTS):
        at += stream.exponential(STEP / RATE)
        length = LONG if stream.random() < SHARE_LONG else SHORT
        yield Request(RequestId(f"r{number}"), Instant(round(at)), 1, LONG), length


def mean_steps(seed=0, **stack):
    """Mean time from arrival to end, in steps. A preempted request is computed again in a single step, which it would
    have needed for its next token anyway, so that preemption loses nothing."""
    limits = InstanceLimits(num_blocks=1000, max_num_seqs=1)
    system = SystemConfig(StackConfig(dispatch="round_robin", **stack), (InstanceSpec(InstanceId("i0"), limits),))
    cluster = SimulatedCluster(system, arrivals(seed), Constant(STEP), WorldOptions(report_interval=Duration(0)))
    cluster.run()
    assert {record.status for record in cluster.records} == {"finished"}
    return sum(record.finished_at - record.arrived_at for record in cluster.records) / NUM_REQUESTS / STEP


def shortest(length):
    plain = {"starvation_steps": 0, "preempted_at_most": 10**6, "bucket_tokens": 1}
    return {"order": "shortest_predicted_first", "length": length, "parameters": Parameters(order=plain)}


def first_come_first_served():
    """Pollaczek and Khinchine."""
    return RATE * moment(2) / (2 * (1 - LOAD)) + moment(1)


def shortest_job_first():
    """Preemptive resume with two classes, the short ones first; the mean of shortest remaining first is a little lower
    still."""
    of_short = RATE * (1 - SHARE_LONG) * SHORT
    ahead = RATE * (1 - SHARE_LONG) * SHORT**2 / 2
    short = SHORT + ahead / (1 - of_short)
    long = LONG / (1 - of_short) + RATE * moment(2) / 2 / ((1 - of_short) * (1 - LOAD))
    return (1 - SHARE_LONG) * short + SHARE_LONG * long


def moment(power):
    return (1 - SHARE_LONG) * SHORT**power + SHARE_LONG * LONG**power


def test_with_the_oracle_the_mean_is_that_of_shortest_job_first():
    expected, without = shortest_job_first(), first_come_first_served()
    assert expected < 0.45 * without, "there is something to gain"
    measured = {seed: mean_steps(seed, **shortest("oracle")) for seed in (0, 1, 2)}
    assert sum(measured.values()) / 3 == pytest.approx(expected, rel=0.06)


def test_the_gain_is_that_of_the_lengths_and_not_of_preempting():
    oracle, scores = mean_steps(**shortest("oracle")), mean_steps(**shortest(f"{__name__}:RandomScores"))
    assert mean_steps(order="fcfs") == pytest.approx(first_come_first_served(), rel=0.2)
    assert scores > 1.5 * oracle


def test_attained_service_lies_between_the_two():
    """It needs no prediction, and gains where lengths differ that much."""
    constants = {"quantum_tokens": 11, "preempted_at_most": 10**6}
    service = {"order": "least_attained_service", "parameters": Parameters(order=constants)}
    assert mean_steps(**shortest("oracle")) < mean_steps(**service) < 0.9 * first_come_first_served()
