"""The fleet of the cluster machine, one sentence of the contract at a time."""

import pytest

from rota.base.errors import PolicyError
from rota.base.instant import Duration, Instant, seconds
from rota.serving.api import NOTHING, FleetRules, Heard, Request, RequestId, Start, StartOffer, StartSource, Stop
from rota.serving.cluster.lifecycles import InstanceState, MemberState
from rota.serving.cluster.machine import ClusterMachine
from rota.serving.cluster.scaling import Barred
from rota.serving.model.commands import Dispatch, DrainInstance, Hold, KeepInstance, StartInstance, StopInstance
from rota.serving.model.events import (
    FirstTokenSeen,
    InstanceDraining,
    InstanceLost,
    InstanceStarted,
    InstanceStarting,
    InstanceStopped,
    RequestArrived,
    RequestFailed,
    RequestFinished,
    ScalingDue,
    StartFailed,
)
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.policies.admission.bounded_queue import BoundedQueue
from rota.serving.policies.dispatch.least_outstanding_tokens import LeastOutstandingTokens

A, B, C = InstanceId("a"), InstanceId("b"), InstanceId("c")
NEW, NEWER = InstanceId("scaled-1"), InstanceId("scaled-2")
MORE = Start("more")


class Wish:
    """Wishes what the test says, once."""

    requires = NOTHING
    interval_seconds = 10.0

    def __init__(self):
        self.next = []
        self.seen = None

    def plan(self, fleet):
        self.seen = fleet
        wishes, self.next = self.next, []
        return wishes


class Cluster:
    """A machine with a clock that ticks a second an event, checked after each."""

    def __init__(self, *instances, **rules):
        self.policy = Wish()
        rules = FleetRules(**({"max_instances": 4, "cool_down_seconds": 60} | rules))
        self.machine = ClusterMachine(LeastOutstandingTokens(), BoundedQueue(), scaling=self.policy, fleet=rules)
        self.now = seconds(1000)
        for instance_id in instances:
            self.start(instance_id)
        self.wait(1000)

    def feed(self, event):
        self.now = Instant(self.now + seconds(1))
        commands = list(self.machine.handle(event, self.now))
        self.machine.check()
        return commands

    def wait(self, num_seconds):
        self.now = Instant(self.now + seconds(num_seconds))

    def start(self, instance_id):
        return self.feed(InstanceStarted(InstanceSpec(instance_id, InstanceLimits(num_blocks=100))))

    def look(self, *wishes, offers=()):
        self.policy.next = list(wishes)
        return self.feed(ScalingDue(offers))

    def arrive(self, request_id):
        return self.feed(RequestArrived(Request(RequestId(request_id), self.now, 100, max_tokens=10)))

    @property
    def fleet(self):
        return self.machine.fleet

    def counts(self):
        return self.fleet.counts(self.now)


def test_a_start_is_ordered_from_the_quickest_source_and_serves_when_it_is_ready():
    cluster = Cluster(A)
    offers = (StartOffer(StartSource.SPARE, seconds(1), 1), StartOffer(StartSource.PAGE_CACHE, seconds(30)))
    orders = cluster.look(MORE, MORE, offers=offers)
    assert orders == [
        StartInstance(NEW, StartSource.SPARE, "more"),
        StartInstance(NEWER, StartSource.PAGE_CACHE, "more"),
    ]
    cluster.look()
    assert [each.id for each in cluster.policy.seen.starting] == [NEW, NEWER]
    cluster.start(NEW)
    cluster.look()
    assert [view.id for view in cluster.policy.seen.instances] == [A, NEW]
    assert cluster.fleet.states()[NEW] is MemberState.SERVING


def test_one_that_drains_is_given_nothing_new_and_stopped_when_it_is_empty():
    cluster = Cluster(A, B)
    assert cluster.arrive("r1")[0].instance_id == A
    assert cluster.look(Stop(A, "too many")) == [DrainInstance(A, "too many")]
    assert [cluster.arrive(f"s{number}")[0].instance_id for number in range(3)] == [B, B, B]
    assert not cluster.feed(FirstTokenSeen(RequestId("r1"), A))
    assert cluster.feed(RequestFinished(RequestId("r1"), A, 5)) == [StopInstance(A, "it has drained")]
    assert cluster.fleet.states()[A] is MemberState.STOPPING
    cluster.feed(InstanceStopped(A))
    assert A not in cluster.fleet.states()
    assert cluster.counts().num_stopped == 1


def test_an_empty_one_is_stopped_at_once():
    cluster = Cluster(A, B)
    assert cluster.look(Stop(B, "idle")) == [DrainInstance(B, "idle"), StopInstance(B, "it has drained")]


def test_what_drains_is_kept_before_anything_is_started():
    cluster = Cluster(A, B)
    cluster.arrive("r1")
    cluster.look(Stop(A, "too many"))
    assert cluster.look(MORE) == [KeepInstance(A, "more")]
    assert cluster.machine.instance_states()[A] is InstanceState.READY
    assert not cluster.feed(RequestFinished(RequestId("r1"), A, 5))


def test_those_who_are_held_go_to_one_that_is_kept():
    cluster = Cluster(A, B)
    cluster.arrive("r1")
    cluster.look(Stop(A, "too many"))
    cluster.feed(InstanceLost(B))
    assert isinstance(cluster.arrive("r2")[0], Hold)
    kept, dispatched = cluster.look(MORE)
    assert isinstance(kept, KeepInstance)
    assert isinstance(dispatched, Dispatch) and dispatched.instance_id == A


def test_one_that_is_lost_while_it_drains_is_stopped_and_its_requests_go_elsewhere():
    cluster = Cluster(A, B)
    cluster.arrive("r1")
    cluster.look(Stop(A, "too many"))
    (stopped,) = cluster.feed(InstanceLost(A, "died"))
    assert isinstance(stopped, StopInstance) and stopped.instance_id == A
    (again,) = cluster.feed(RequestFailed(RequestId("r1"), A, "died"))
    assert isinstance(again, Dispatch) and again.instance_id == B
    assert not cluster.start(A), "whoever starts it again, it is not wanted"
    assert cluster.arrive("r2")[0].instance_id == B


def test_a_start_that_failed_is_tried_again_later_and_later():
    cluster = Cluster(A, retry_seconds=30)
    waited = []
    for _ in range(3):
        failed_at = cluster.now
        while not (orders := cluster.look(MORE)):
            pass
        waited.append((cluster.now - failed_at) // 10**9)
        cluster.feed(StartFailed(orders[0].instance_id, "no memory"))
    assert waited == [1, 30, 60]
    assert cluster.counts().num_failed == 3
    assert cluster.counts().num_members == 1


def test_one_that_does_not_get_ready_is_stopped():
    cluster = Cluster(A, start_timeout_seconds=100)
    cluster.look(MORE)
    cluster.wait(100)
    (stopped,) = cluster.look()
    assert isinstance(stopped, StopInstance) and stopped.instance_id == NEW
    assert not cluster.start(NEW), "too late"
    cluster.feed(InstanceStopped(NEW))
    assert list(cluster.fleet.states()) == [A]


def test_the_least_number_is_kept_though_nobody_asks():
    cluster = Cluster(A, min_instances=2)
    assert [type(order) for order in cluster.look()] == [StartInstance]
    cluster.start(NEW)
    cluster.feed(InstanceStopped(A))
    assert [type(order) for order in cluster.look()] == [StartInstance]


def test_what_the_host_starts_by_itself_is_not_ordered_again():
    cluster = Cluster(min_instances=2)
    for instance_id in (A, B):
        cluster.feed(InstanceStarting(instance_id))
    assert not cluster.look()
    assert [each.source for each in cluster.policy.seen.starting] == [None, None]


@pytest.mark.parametrize(
    ("wish", "why"),
    [
        (Stop(A, "x"), Barred.COOL_DOWN),
        (MORE, Barred.AT_MOST),
    ],
)
def test_a_wish_against_the_rules_is_counted(wish, why):
    cluster = Cluster(A, B, max_instances=2)
    if why is Barred.COOL_DOWN:
        cluster.machine.fleet._grown_at = cluster.now
    assert not cluster.look(wish)
    assert cluster.counts().num_barred == {why: 1}


def test_nobody_is_drained_while_one_is_on_its_way_nor_for_the_cool_down_after_it_came():
    cluster = Cluster(A, B)
    cluster.look(MORE)
    cluster.wait(500)
    assert not cluster.look(Stop(A, "x"))
    cluster.start(NEW)
    cluster.wait(57)
    assert not cluster.look(Stop(A, "x"))
    cluster.wait(2)
    assert cluster.look(Stop(A, "x"))
    assert cluster.counts().num_barred == {Barred.ON_ITS_WAY: 1, Barred.COOL_DOWN: 1}


def test_the_last_ones_are_not_drained():
    cluster = Cluster(A, B, C, min_instances=2)
    assert len(cluster.look(Stop(A, "x"), Stop(B, "x"))) == 2
    assert cluster.counts().num_barred == {Barred.AT_LEAST: 1}


def test_one_that_was_taken_out_by_hand_is_not_drained_but_counts():
    cluster = Cluster(A, B)
    cluster.arrive("r1")
    cluster.feed(InstanceDraining(A))
    assert not cluster.look(Stop(A, "x"))
    assert cluster.counts().num_barred == {Barred.NOT_SERVING: 1}
    cluster.feed(RequestFinished(RequestId("r1"), A, 5))
    cluster.look()
    assert cluster.policy.seen.num_aside == 1


def test_what_is_paid_for_goes_from_the_order_to_the_end():
    cluster = Cluster(A)
    cluster.look(MORE)
    before = cluster.counts().instance_seconds
    cluster.wait(9)
    cluster.start(NEW)
    assert cluster.counts().instance_seconds == before + 20
    cluster.feed(InstanceStopped(NEW))
    cluster.wait(10)
    assert cluster.counts().instance_seconds == before + 20 + 2 + 10


def test_a_policy_is_told_what_came_of_the_work_once():
    cluster = Cluster(A)
    cluster.arrive("r1")
    cluster.look()
    assert cluster.policy.seen.waits == [Duration(2 * 10**9)]
    cluster.feed(FirstTokenSeen(RequestId("r1"), A))
    cluster.feed(RequestFinished(RequestId("r1"), A, 3))
    cluster.look()
    first, end = cluster.policy.seen.outcomes
    assert (first.what, first.took) == (Heard.FIRST_TOKEN, seconds(3))
    assert (end.what, end.took) == (Heard.END, seconds(1) // 2)
    assert cluster.policy.seen.totals.num_output_tokens == 3
    cluster.look()
    assert not cluster.policy.seen.outcomes


@pytest.mark.parametrize("wish", [Stop(C, "not shown"), Start(""), "more"])
def test_an_answer_that_makes_no_sense_is_refused(wish):
    with pytest.raises(PolicyError):
        Cluster(A).look(wish)


@pytest.mark.parametrize(
    "rules", [{"min_instances": 0}, {"min_instances": 3, "max_instances": 2}, {"retry_seconds": -1}]
)
def test_rules_that_cannot_be(rules):
    with pytest.raises(ValueError, match="must"):
        FleetRules(**rules)
