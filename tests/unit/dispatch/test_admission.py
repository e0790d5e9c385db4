"""The admission policy and the suite of its kind."""

import pytest

from rota.base.errors import ConfigError, LawBroken
from rota.base.instant import Instant, seconds
from rota.serving.api import Admission, Request, RequestId
from rota.serving.policies.admission import ADMISSION
from rota.serving.policies.admission.bounded_queue import BoundedQueue
from rota.serving.predictors.step_time.affine import AffineStepTime
from rota.testing.admission import check_admission_policy
from rota.testing.dispatch import ClusterSample

REQUEST = Request(RequestId("r"), Instant(0), 10, 10)


def at(now_seconds):
    return ClusterSample(Instant(seconds(now_seconds)), ())


@pytest.mark.parametrize("name", ADMISSION.table)
def test_keeps_the_contract(name):
    check_admission_policy(lambda: ADMISSION.create(name, services={"step_time": AffineStepTime()}), max_examples=50)


def answering(admission):
    class Answers:
        requires = frozenset()

        def admit(self, request, cluster, num_unfinished):
            return admission

    return Answers


class CountsForAll:
    requires = frozenset()
    asked = 0

    def admit(self, request, cluster, num_unfinished):
        CountsForAll.asked += 1
        return Admission(True, f"number {CountsForAll.asked}")


class WritesToViews:
    requires = frozenset()

    def admit(self, request, cluster, num_unfinished):
        cluster.now = 0
        return Admission(True, "time stands still")


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        (answering(Admission(True, "")), "law 11"),
        (answering(Admission(False, "no", status=200)), "status 200"),
        (answering(Admission(False, "no", retry_after_seconds=0.0)), "come back"),
        (answering(Admission(True, "yes", retry_after_seconds=1.0)), "come back"),
        (answering(Admission(False, "never")), "law 7"),
        (answering(Admission(False, "it does not fit", status=400)), "law 7"),
        (CountsForAll, "law 8"),
        (WritesToViews, "law 13"),
    ],
)
@pytest.mark.usefixtures("unshrunk")
def test_the_suite_finds_a_broken_policy(broken, what):
    with pytest.raises(LawBroken, match=what):
        check_admission_policy(broken)


def test_bounded_queue_admits_up_to_its_bound_and_says_why_not_beyond():
    policy = BoundedQueue(max_unfinished=2)
    assert policy.admit(REQUEST, at(0), 1).admitted
    refusal = policy.admit(REQUEST, at(0), 2)
    assert (refusal.admitted, refusal.status, refusal.retry_after_seconds) == (False, 503, 60.0)
    assert refusal.reason == ("the server is overloaded: 2 requests are unfinished and 2 may be; try again in 60 s")


def test_bounded_queue_derives_the_time_to_come_back_from_completions():
    policy = BoundedQueue(max_unfinished=100)
    for number in range(100):
        assert policy.admit(REQUEST, at(0), number).admitted
    # In 10 s, 5 of the 100 ended, so a place comes free every 2 s: the first who is turned away takes the first.
    for number in range(95, 100):
        assert policy.admit(REQUEST, at(10), number).admitted
    assert [policy.admit(REQUEST, at(11), 100).retry_after_seconds for _ in range(3)] == [2.0, 4.0, 6.0]
    # And then none ended any more.
    assert policy.admit(REQUEST, at(20), 100).retry_after_seconds == 60.0


@pytest.mark.parametrize("parameters", [{"max_unfinished": 0}, {"window_seconds": 0}, {"max_queued": 3}])
def test_bad_parameters_are_named(parameters):
    with pytest.raises(ConfigError, match=next(iter(parameters))):
        ADMISSION.create("bounded_queue", parameters)
