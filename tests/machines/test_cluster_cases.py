"""The cluster machine, one sentence of its contract at a time, where the words and numbers of an answer matter."""

import pytest

from rota.base.errors import ConfigError, LawBroken, PolicyError
from rota.base.instant import Instant, milliseconds, seconds
from rota.serving.api import Admission, InstanceId, Pick, QueueRules, Request, RequestId
from rota.serving.cluster.lifecycles import INSTANCE_LIFECYCLE, REQUEST_LIFECYCLE
from rota.serving.cluster.machine import ClusterMachine
from rota.serving.cluster.prefix_index import PrefixIndex
from rota.serving.model.commands import Abort, Dispatch, Fail, Hold, Reject
from rota.serving.model.events import (
    ClientLeft,
    FirstTokenSeen,
    InstanceDraining,
    InstanceLost,
    InstanceReported,
    InstanceStarted,
    RequestArrived,
    RequestFailed,
    RequestFinished,
)
from rota.serving.model.instance import InstanceLimits, InstanceReport, InstanceSpec
from rota.serving.policies.admission.bounded_queue import BoundedQueue
from rota.serving.policies.dispatch.least_outstanding_tokens import LeastOutstandingTokens
from rota.serving.policies.dispatch.prefix_then_load import PrefixThenLoad

A, B = InstanceId("a"), InstanceId("b")
R = RequestId("r")


def started(instance_id, num_blocks=100, max_model_len=1000, **limits):
    return InstanceStarted(
        InstanceSpec(instance_id, InstanceLimits(num_blocks=num_blocks, max_model_len=max_model_len, **limits))
    )


def arrived(request_id=R, num_prompt_tokens=100, at=0, priority=0, blocks=()):
    return RequestArrived(
        Request(RequestId(request_id), Instant(at), num_prompt_tokens, 10, priority=priority, block_hashes=blocks)
    )


class Cluster:
    """A machine with a clock that ticks a millisecond an event, checked after each."""

    def __init__(self, *instance_ids, dispatch=None, admission=None, **options):
        self.machine = ClusterMachine(dispatch or LeastOutstandingTokens(), admission or BoundedQueue(), **options)
        self.now = Instant(0)
        for instance_id in instance_ids:
            self.feed(started(instance_id))

    def feed(self, event):
        self.now = Instant(self.now + milliseconds(1))
        commands = list(self.machine.handle(event, self.now))
        self.machine.check()
        return commands


def is_held(commands):
    return [type(command) for command in commands] == [Hold]


def test_a_request_goes_out_and_ends():
    cluster = Cluster(A)
    (dispatch,) = cluster.feed(arrived())
    why = "fewest outstanding tokens (0) of 1"
    assert dispatch == Dispatch(R, A, why, 1, scores=((A, 1.0),), admission="0 of 4096 places taken")
    (view,) = cluster.machine.instance_views()
    assert (view.num_outstanding_requests, view.num_outstanding_tokens) == (1, 100)
    assert not cluster.feed(FirstTokenSeen(R, A))
    assert (view.num_outstanding_requests, view.num_outstanding_tokens) == (1, 1)
    assert not cluster.feed(RequestFinished(R, A, 7))
    assert (view.num_outstanding_requests, view.num_outstanding_tokens) == (0, 0)
    assert not cluster.machine.unfinished()


def test_a_prompt_that_fits_nowhere_is_refused_with_the_numbers():
    cluster = Cluster(A)
    (reject,) = cluster.feed(arrived(num_prompt_tokens=1000))
    assert isinstance(reject, Reject)
    assert (reject.status, reject.retry_after) == (400, None)
    assert reject.reason == (
        "the prompt has 1000 tokens, and the largest instance takes at most 999 with room for one token of output"
    )
    assert isinstance(cluster.feed(arrived("fits", 999))[0], Dispatch)


def test_a_prompt_that_leaves_no_slot_on_the_largest_instance_is_refused():
    cluster = Cluster()
    cluster.feed(started(A, num_blocks=10))
    assert cluster.feed(arrived(num_prompt_tokens=160))[0].status == 400
    assert isinstance(cluster.feed(arrived("fits", 159))[0], Dispatch)


def test_a_long_prompt_goes_only_where_it_fits():
    cluster = Cluster()
    cluster.feed(started(A, num_blocks=5))
    cluster.feed(started(B, num_blocks=50))
    for number in range(3):
        assert cluster.feed(arrived(f"r{number}", 200))[0].instance_id == B
    cluster.feed(InstanceLost(B))
    (hold,) = cluster.feed(arrived("waits", 200))
    assert hold.reason == "no instance can take it: none of 1 takes 200 prompt tokens", "one of that size may come back"
    assert cluster.machine.counts().num_queued == 1


def test_held_requests_go_by_class_and_then_by_arrival():
    cluster = Cluster()
    for request_id, priority in (("late", 5), ("first", 0), ("second", 0), ("urgent", -1)):
        assert is_held(cluster.feed(arrived(request_id, at=cluster.now, priority=priority)))
    assert [command.request_id for command in cluster.feed(started(A))] == ["urgent", "first", "second", "late"]


def test_a_held_request_that_turns_out_to_fit_nowhere_is_refused_when_the_first_instance_starts():
    cluster = Cluster()
    cluster.feed(arrived(num_prompt_tokens=5000))
    (reject,) = cluster.feed(started(A))
    assert (reject.request_id, reject.status) == (R, 400)


def test_a_request_is_held_for_a_time_and_then_refused():
    cluster = Cluster(queue=QueueRules(timeout_seconds=2.0), retry_after=seconds(7))
    cluster.feed(arrived())
    deadline = cluster.machine.next_deadline()
    assert deadline == cluster.now + seconds(2)
    assert cluster.machine.expire(Instant(deadline - 1)) == []
    (reject,) = cluster.machine.expire(deadline)
    assert reject == Reject(R, "no instance could take the request within 2 s", 503, seconds(7))
    assert cluster.machine.next_deadline() is None


def test_the_queue_is_bounded():
    cluster = Cluster(queue=QueueRules(max_held=2))
    assert is_held(cluster.feed(arrived("one")))
    assert is_held(cluster.feed(arrived("two")))
    (reject,) = cluster.feed(arrived("three"))
    assert (reject.status, reject.retry_after) == (503, seconds(5))
    assert "2 others wait" in reject.reason


def test_a_failure_before_the_first_token_is_retried_elsewhere_with_its_reason():
    cluster = Cluster(A, B)
    assert cluster.feed(arrived())[0].instance_id == A
    (retry,) = cluster.feed(RequestFailed(R, A, "connection reset"))
    assert (retry.instance_id, retry.attempt) == (B, 2)
    assert retry.reason.startswith("attempt 2 of 3, since a failed (connection reset): ")
    (again,) = cluster.feed(RequestFailed(R, B, "timed out"))
    assert (again.instance_id, again.attempt) == (A, 3), "all have failed it, so any will do"
    (fail,) = cluster.feed(RequestFailed(R, A, "connection refused"))
    assert fail == Fail(R, "all 3 attempts failed (a: connection reset; b: timed out; a: connection refused)")


class Stubborn:
    """Always picks the same instance, if it may."""

    requires: frozenset = frozenset()
    wanted = A

    def pick(self, request, cluster):
        offered = [view.id for view in cluster.instances]
        return Pick(self.wanted if self.wanted in offered else offered[0], "always")


@pytest.mark.parametrize("instances", [(A,), (A, B), (A, B, InstanceId("c"))])
def test_where_all_have_failed_it_a_retry_is_not_for_the_one_that_did_last(instances):
    """That may be dead, have nothing left to do, look like the best, and burn every attempt within a millisecond."""
    stubborn = Stubborn()
    cluster = Cluster(*instances, dispatch=stubborn, max_attempts=9)
    (sent,) = cluster.feed(arrived())
    for _ in range(7):
        stubborn.wanted = sent.instance_id
        (retry,) = cluster.feed(RequestFailed(R, sent.instance_id, "broke off"))
        assert (retry.instance_id != sent.instance_id) == (len(instances) > 1)
        sent = retry


@pytest.mark.parametrize(
    ("before", "retryable", "reason"),
    [
        ([FirstTokenSeen(R, A)], True, "the instance failed after the first token (a: it died)"),
        ([], False, "the instance refused the request (a: it died)"),
    ],
)
def test_what_cannot_be_retried_fails(before, retryable, reason):
    cluster = Cluster(A, B)
    cluster.feed(arrived())
    for event in before:
        cluster.feed(event)
    assert cluster.feed(RequestFailed(R, A, "it died", retryable)) == [Fail(R, reason)]


def test_a_retry_without_an_instance_waits_beyond_the_bound_of_the_queue_and_fails_in_the_end():
    cluster = Cluster(A, queue=QueueRules(max_held=0))
    cluster.feed(arrived())
    cluster.feed(InstanceLost(A, "killed"))
    assert is_held(cluster.feed(RequestFailed(R, A, "killed")))
    assert cluster.machine.counts().num_queued == 1
    (fail,) = cluster.machine.expire(cluster.machine.next_deadline())
    assert fail == Fail(R, "no instance could take the request within 60 s (a: killed)")


def test_a_lost_instance_gets_nothing_and_what_crossed_the_loss_is_believed():
    cluster = Cluster(A, B)
    cluster.feed(arrived("crossed"))
    cluster.feed(InstanceLost(A))
    assert [view.id for view in cluster.machine.instance_views()] == [B]
    assert cluster.machine.instance_states() == {A: "lost", B: "ready"}
    assert cluster.feed(arrived("next"))[0].instance_id == B
    cluster.feed(RequestFinished(RequestId("crossed"), A))
    assert cluster.machine.instance_states() == {B: "ready"}, "forgotten with its last request"
    assert cluster.machine.counts().num_finished == 1


def test_a_draining_instance_finishes_what_it_has():
    cluster = Cluster(A, B)
    cluster.feed(arrived("mine"))
    cluster.feed(InstanceDraining(A))
    assert cluster.feed(arrived("next", 900))[0].instance_id == B
    cluster.feed(RequestFinished(RequestId("mine"), A))
    assert cluster.machine.instance_states() == {B: "ready"}


def test_a_client_that_leaves_ends_its_request_at_the_instance_and_late_facts_are_ignored():
    cluster = Cluster(A)
    cluster.feed(arrived())
    assert cluster.feed(ClientLeft(R)) == [Abort(R, A, "the client left")]
    for late in (FirstTokenSeen(R, A), RequestFinished(R, A), RequestFailed(R, A, "aborted"), ClientLeft(R)):
        assert cluster.feed(late) == []
    assert cluster.machine.counts().num_aborted == 1


def test_a_client_that_leaves_the_queue_needs_no_order():
    cluster = Cluster()
    cluster.feed(arrived())
    assert cluster.feed(ClientLeft(R)) == []
    assert cluster.machine.next_deadline() is None
    assert cluster.feed(started(A)) == []


def test_reports_are_kept_by_the_time_at_which_they_were_true():
    cluster = Cluster(A)
    (view,) = cluster.machine.instance_views()
    assert (view.observed_at, view.num_free_blocks) == (None, None)

    def report(observed_at, num_free_blocks):
        cluster.feed(InstanceReported(InstanceReport(A, Instant(observed_at), 2, 1, num_free_blocks, 100)))

    report(500, 50)
    report(400, 40)
    assert (view.observed_at, view.num_running, view.num_waiting, view.num_free_blocks) == (500, 2, 1, 50)
    report(600, 60)
    assert view.num_free_blocks == 60


def test_a_restart_voids_reports_and_prefixes():
    cluster = Cluster(A, dispatch=PrefixThenLoad(), prefix_index=PrefixIndex())
    (view,) = cluster.machine.instance_views()
    blocks = tuple(range(6))
    cluster.feed(arrived("one", blocks=blocks))
    request = Request(R, Instant(0), 100, 10, block_hashes=blocks)
    assert view.num_prefix_tokens(request) == 96
    before = cluster.now
    cluster.feed(InstanceReported(InstanceReport(A, before, 1, 0, 50, 100)))
    cluster.feed(started(A))
    assert (view.observed_at, view.num_prefix_tokens(request)) == (None, 0)
    cluster.feed(InstanceReported(InstanceReport(A, before, 1, 0, 50, 100)))
    assert view.observed_at is None, "a report from before the restart came late"


def test_an_instance_without_prefix_caching_holds_no_prefixes():
    cluster = Cluster(prefix_index=PrefixIndex())
    cluster.feed(started(A, enable_prefix_caching=False))
    cluster.feed(arrived("one", blocks=(1, 2)))
    (view,) = cluster.machine.instance_views()
    assert view.num_prefix_tokens(Request(R, Instant(0), 40, 1, block_hashes=(1, 2))) == 0


class Refuses:
    requires = frozenset()

    def __init__(self, admission):
        self._admission = admission

    def admit(self, request, cluster, num_unfinished):
        return self._admission


def test_a_refusal_of_the_admission_policy_reaches_the_client_as_it_is():
    cluster = Cluster(A, admission=Refuses(Admission(False, "tenant t is over its quota", 429, 1.5)))
    assert cluster.feed(arrived()) == [Reject(R, "tenant t is over its quota", 429, milliseconds(1500))]


class Answers:
    requires = frozenset()

    def __init__(self, pick):
        self._pick = pick

    def pick(self, request, cluster):
        return self._pick


class Breaks:
    requires = frozenset()

    def pick(self, request, cluster):
        raise ZeroDivisionError("no load at all")

    def admit(self, request, cluster, num_unfinished):
        raise ZeroDivisionError("no load at all")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dispatch": Answers(Pick(B, "b is best"))}, "Answers picked 'b', which is not among a"),
        ({"dispatch": Answers(Pick(A, ""))}, "without a reason"),
        ({"dispatch": Breaks()}, "Breaks raised ZeroDivisionError"),
        ({"admission": Breaks()}, "Breaks raised ZeroDivisionError"),
        ({"admission": Refuses(Admission(False, ""))}, "law 11"),
    ],
)
def test_a_policy_that_breaks_its_contract_is_named_and_leaves_no_trace(options, says):
    cluster = Cluster(A, **options)
    with pytest.raises(PolicyError, match=says) as raised:
        cluster.feed(arrived())
    assert "request r" in raised.value.message
    assert raised.value.hint
    cluster.machine.check()
    assert cluster.machine.counts().num_arrived == 0


def test_what_the_host_may_not_do_is_refused_by_law():
    cluster = Cluster(A)
    cluster.feed(arrived())
    with pytest.raises(LawBroken, match="law 1"):
        cluster.feed(arrived())
    cluster.feed(RequestFinished(R, A))
    with pytest.raises(LawBroken, match="law 1"):
        cluster.feed(arrived())
    with pytest.raises(LawBroken, match="law 5"):
        cluster.feed(arrived("future", at=cluster.now + 10**9))
    with pytest.raises(LawBroken, match="law 5"):
        cluster.feed(InstanceReported(InstanceReport(A, Instant(cluster.now + 10**9), 0, 0, 1, 1)))
    with pytest.raises(LawBroken, match="law 5"):
        cluster.machine.expire(Instant(0))


def test_only_so_many_ended_requests_are_remembered():
    cluster = Cluster(A, num_recent=2)
    for name in ("one", "two", "three"):
        cluster.feed(arrived(name))
        cluster.feed(RequestFinished(RequestId(name), A))
    with pytest.raises(LawBroken, match="law 1"):
        cluster.feed(arrived("two"))
    assert isinstance(cluster.feed(arrived("one"))[0], Dispatch)


@pytest.mark.parametrize("option", ["max_held", "max_outstanding_per_instance", "timeout_seconds"])
def test_bad_rules_of_the_queue_are_named(option):
    with pytest.raises(ValueError, match=option):
        QueueRules(**{option: -1})


@pytest.mark.parametrize("option", ["max_attempts", "max_resuming_per_instance"])
def test_bad_options_are_named(option):
    with pytest.raises(ConfigError, match=option):
        Cluster(**{option: -1})


def test_every_state_of_a_life_is_drawn():
    assert "assigned --> queued: retried" in REQUEST_LIFECYCLE.diagram()
    assert "draining --> stopped: drained" in INSTANCE_LIFECYCLE.diagram()
