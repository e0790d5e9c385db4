"""A resampled trace is as long, as dense and made of what was recorded; another seed gives another one."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rota.base.errors import ConfigError
from rota.base.instant import Duration
from rota.base.random_streams import RandomStreams
from rota.serving.workload.arrivals import Arrival
from rota.serving.workload.resampling import resample_blocks

GAPS = st.lists(st.integers(0, 1000), min_size=1, max_size=60)


def recorded(gaps):
    at, arrivals = 0, []
    for number, gap in enumerate(gaps):
        arrivals.append(Arrival(Duration(at), number + 1, 1, prefix_hashes=(number // 4,), session=f"s{number // 4}"))
        at += gap
    return arrivals


def drawn(arrivals, block, seed=0):
    return list(resample_blocks(arrivals, Duration(block), RandomStreams(seed).stream("resample")))


@given(GAPS, st.integers(1, 5000), st.integers(0, 5))
def test_arrivals_come_in_order_within_the_recorded_span_and_are_recorded_ones(gaps, block, seed):
    arrivals = recorded(gaps)
    found = drawn(arrivals, block, seed)
    span = arrivals[-1].at + max(1, arrivals[-1].at // max(1, len(arrivals) - 1))
    assert [arrival.at for arrival in found] == sorted(arrival.at for arrival in found)
    assert all(0 <= arrival.at < span for arrival in found)
    assert {arrival.num_prompt_tokens for arrival in found} <= {arrival.num_prompt_tokens for arrival in arrivals}


@given(GAPS, st.integers(0, 5))
def test_one_block_as_long_as_the_trace_is_the_trace_turned_round(gaps, seed):
    arrivals = recorded(gaps)
    found = drawn(arrivals, 10**9, seed)
    assert Counter(a.num_prompt_tokens for a in found) == Counter(a.num_prompt_tokens for a in arrivals)


def test_a_second_copy_shares_nothing_with_the_first():
    found = drawn(recorded([10] * 40), 30)
    seen = Counter((arrival.num_prompt_tokens, arrival.prefix_hashes, arrival.session) for arrival in found)
    assert max(Counter(arrival.num_prompt_tokens for arrival in found).values()) > 1, "no copy was drawn"
    assert set(seen.values()) == {1}


def test_seeds_decide():
    arrivals = recorded([10] * 40)
    assert drawn(arrivals, 50, 1) == drawn(arrivals, 50, 1)
    assert drawn(arrivals, 50, 1) != drawn(arrivals, 50, 2)


def test_a_block_must_have_a_length():
    with pytest.raises(ConfigError, match="longer than 0"):
        drawn(recorded([1]), 0)


def test_no_arrivals_give_none():
    assert drawn([], 5) == []
