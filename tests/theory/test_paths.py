"""Theorems that hold on every path, whatever the arrivals: Lindley's recursion, work conservation, and that nothing
beats the shortest remaining first."""

from itertools import pairwise

import pytest
from benchmarks.truth.queues import UNIT, Shared, WorkInPrompt, all_at_once, as_outputs, as_prompts, one_at_a_time, play
from hypothesis import given, settings
from hypothesis import strategies as st

DISCIPLINES = "benchmarks.truth.disciplines"
ORDERS = (
    "fcfs",
    "strict_priority",
    f"{DISCIPLINES}:LastComeFirst",
    f"{DISCIPLINES}:ShortestJobDisplaces",
    f"{DISCIPLINES}:LeastAttainedFirst",
)
SHORTEST = f"{DISCIPLINES}:ShortestRemainingFirst"


@st.composite
def jobs(draw, size_max):
    """(arrival, size), with ties, bursts, and gaps on and off the ends of steps."""
    at = 0
    drawn = []
    for _ in range(draw(st.integers(1, 14))):
        at += draw(st.sampled_from((0, 0, UNIT, 3 * UNIT, 1, UNIT // 3, 20 * UNIT)))
        drawn.append((at, draw(st.integers(1, size_max))))
    return drawn


@given(jobs(size_max=50))
@settings(max_examples=60, deadline=None)
def test_first_come_first_served_is_lindleys_recursion(drawn):
    records = play(one_at_a_time(), as_prompts(drawn), WorkInPrompt())
    end = 0
    for record, (at, size) in zip(records, drawn, strict=True):
        end = max(end, at) + size * UNIT
        assert record.finished_at == end


@given(jobs(size_max=9))
@settings(max_examples=60, deadline=None)
def test_every_order_does_the_same_work_in_the_same_busy_periods(drawn):
    ends = set()
    for order in (*ORDERS, SHORTEST):
        records = play(one_at_a_time(order), as_outputs(drawn), Shared())
        ends.add(max(record.finished_at for record in records))
    end = 0
    for at, size in drawn:
        end = max(end, at) + size * UNIT
    assert ends == {end}


@pytest.mark.parametrize("order", ORDERS)
@given(drawn=jobs(size_max=9))
@settings(max_examples=40, deadline=None)
def test_no_order_has_a_lower_mean_response_than_the_shortest_remaining_first(order, drawn):
    best = play(one_at_a_time(SHORTEST), as_outputs(drawn), Shared())
    other = play(one_at_a_time(order), as_outputs(drawn), Shared())
    assert sum(record.finished_at for record in best) <= sum(record.finished_at for record in other)


@given(jobs(size_max=12))
@settings(max_examples=60, deadline=None)
def test_who_shares_the_server_gets_as_much_as_the_others(drawn):
    """Of two jobs of one size the earlier never ends later, and at any end nobody present was served more steps than
    one that was there all along, by more than the step that it joined late."""
    records = play(all_at_once(), as_outputs(drawn), Shared())
    by_size = sorted(records, key=lambda record: (record.num_output_tokens, record.id))
    for first, second in pairwise(by_size):
        if first.num_output_tokens == second.num_output_tokens:
            assert first.finished_at <= second.finished_at
    busy = sum(record.num_output_tokens for record in records) * UNIT
    assert max(record.finished_at for record in records) >= busy
