"""The front end's share, from requests and steps whose instants are known."""

import msgspec
import pytest
from tests.unit.calibration.fabricated import facts, straight

from rota.base.instant import Duration, Instant, milliseconds
from rota.serving.bench.client import Sent
from rota.serving.bench.plan import Planned
from rota.serving.calibration.front_end import NUM_REQUESTS_MIN, front_end_of
from rota.serving.calibration.steps import steps_of

WAY_IN, WAY_OUT = milliseconds(4), milliseconds(2.5)
RECORDS = facts(straight, num_stretches=12, num_steps=10)
STEPS = steps_of(RECORDS, "facts")


def request(first_step: int, *, kind: str = "alone", late: Duration = Duration(0)) -> Sent:
    """Sent so that its first step is `first_step` of the records; its second token comes with the step after."""
    planned = Planned(0, Duration(0), kind, 9, 2)
    sent_at = Instant(RECORDS[first_step].at - WAY_IN)
    ends = [RECORDS[step].at + RECORDS[step].step_ns for step in (first_step, first_step + 1)]
    chunk_at = [Instant(end + WAY_OUT + late) for end in ends]
    return Sent(planned, sent_at, sent_at, chunk_at[-1], "finished", chunk_at)


def test_both_ways_are_found() -> None:
    # The first step of each stretch met an idle engine, but for the first of all, before which nothing is known.
    sent = [request(step) for step in range(10, 120, 10)]
    found = front_end_of(sent, STEPS)
    assert found is not None
    assert found.request_ms == pytest.approx(4.0)
    assert found.response_ms == pytest.approx(2.5)
    assert found.num_requests == len(sent)


def test_requests_that_met_a_busy_engine_tell_nothing_of_the_way_in() -> None:
    idle = [request(step) for step in range(10, 10 + 10 * NUM_REQUESTS_MIN, 10)]
    crowd = [
        msgspec.structs.replace(request(step), sent_at=Instant(RECORDS[step - 1].at + 1)) for step in range(15, 115, 10)
    ]
    found = front_end_of([*crowd, *idle], STEPS)
    assert found is not None
    assert found.request_ms == pytest.approx(4.0)
    assert front_end_of(crowd, STEPS) is None


def test_one_late_answer_does_not_matter() -> None:
    sent = [request(step) for step in range(10, 110, 10)]
    found = front_end_of([*sent, request(110, late=milliseconds(5))], STEPS)
    assert found is not None
    assert found.response_ms == pytest.approx(2.5)


def test_unanswered_requests_are_left_out() -> None:
    failed = [msgspec.structs.replace(request(step), outcome="failed") for step in range(10, 110, 10)]
    assert front_end_of(failed, STEPS) is None
