"""Measured points at fixed concurrency: the two bounds that `python -m benchmarks.truth.silicon` prints are kept."""

import pytest
from benchmarks.truth import silicon


@pytest.mark.slow
def test_every_bound_is_kept() -> None:
    bounded = [row for row in silicon.rows() if row.bound is not None]
    assert [row.quantity for row in bounded] == ["median error of tpot", "median error of ttft"]
    missed = [f"{row.quantity}: {row.error:.1%} of {row.bound:.0%}" for row in bounded if row.verdict != "holds"]
    assert not missed, missed


@pytest.mark.slow
def test_every_large_error_has_a_cause() -> None:
    for one in silicon.outcomes():
        if abs(one.tpot_error) > silicon.TPOT_BOUND:
            assert silicon.cause(one, "tpot"), one
        if abs(one.ttft_error) > silicon.TTFT_BOUND:
            assert silicon.cause(one, "ttft"), one


def point(**changes: float) -> silicon.Point:
    facts = {"num_prompt_tokens": 512, "num_output_tokens": 32, "concurrency": 6, "ttft_ms": 100.0, "tpot_ms": 10.0}
    return silicon.Point("h100_sxm", "trtllm", **(facts | changes))  # type: ignore[arg-type]


def test_the_loop_is_closed() -> None:
    """As many requests are under way as there are clients, until the last wave runs out."""
    clients = silicon._Clients(point(), 7, 10)
    under_way = [request.id for request, _ in clients.first()]
    num_ended = 0
    while under_way:
        ended = under_way.pop(0)
        num_ended += 1
        under_way += [request.id for request, _ in clients.ended(ended, silicon.Instant(num_ended))]
        assert len(under_way) == min(7, 60 - num_ended)
    assert num_ended == 60


def test_one_client_more_than_slots_waits_for_one_answer_in_turn() -> None:
    """With c slots and c + 1 clients each request waits 1 / c of an answer's time on average."""
    one = silicon.play(point(num_output_tokens=400, concurrency=4), num_waves=40)
    assert one.ttft_ms == pytest.approx(400 * one.tpot_ms / 4, rel=0.2)


def test_the_table_alone_says_what_playing_says_where_clients_are_few() -> None:
    one = silicon.play(point(num_output_tokens=256, concurrency=8))
    assert one.static_tpot_ms == pytest.approx(one.tpot_ms, rel=0.1)
    assert point().requests_per_second == pytest.approx(6000 / (100 + 31 * 10))


def test_points_are_those_on_one_gpu() -> None:
    found = silicon.points()
    assert len(found) == 68 and {(one.system, one.backend) for one in found} == set(silicon.ENGINES)
