"""What a scheduler sees of an arrival never tells its output length, and prefixes agree exactly where they should."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rota.base.errors import ConfigError
from rota.base.instant import Duration, Instant, seconds
from rota.base.random_streams import RandomStreams
from rota.serving.instance.ledger import BlockLedger
from rota.serving.instance.sequence import Sequence
from rota.serving.model.request import shared_prefix_blocks
from rota.serving.workload.arrivals import Arrival, to_request
from rota.serving.workload.retiming import scale_rate, take, with_poisson


@given(
    prompt=st.integers(1, 200_000),
    outputs=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    max_model_len=st.integers(2, 131_072),
)
def test_request_does_not_depend_on_the_true_length(prompt: int, outputs: tuple[int, int], max_model_len: int) -> None:
    pairs = [
        to_request(Arrival(Duration(5), prompt, output), "r", Instant(100), max_model_len=max_model_len)
        for output in outputs
    ]
    assert pairs[0][0] == pairs[1][0]
    for (request, truth), output in zip(pairs, outputs, strict=True):
        assert request.arrived_at == 105
        assert 1 <= request.max_tokens <= 4096
        assert truth == min(output, request.max_tokens)
        assert prompt + request.max_tokens <= max_model_len or request.max_tokens == 1


def test_exact_declaration_is_an_oracle() -> None:
    request, truth = to_request(Arrival(Duration(0), 10, 77), "r", Instant(0), max_model_len=4096, declare="exact")
    assert (request.max_tokens, truth) == (77, 77)


@given(
    st.lists(st.integers(0, 3), max_size=4),
    st.lists(st.integers(0, 3), max_size=4),
    st.integers(1, 511),
    st.sampled_from([16, 32, 512]),
)
def test_blocks_agree_exactly_where_the_trace_blocks_do(
    left: list[int], right: list[int], last: int, size: int
) -> None:
    arrivals = [
        Arrival(Duration(0), max(1, (len(ids) - 1) * 512 + last), 1, tuple(i * 10 + h for i, h in enumerate(ids)))
        for ids in (left, right)
    ]
    requests = [
        to_request(arrival, f"r{number}", Instant(0), max_model_len=10_000, block_size=size)[0]
        for number, arrival in enumerate(arrivals)
    ]
    sequences = [Sequence(request, size) for request in requests]
    ledger = BlockLedger(1000, size)
    for arrival, sequence in zip(arrivals, sequences, strict=True):
        assert sequence.num_hashed == (arrival.num_prompt_tokens // size if arrival.prefix_hashes else 0)
    ledger.admit(sequences[0], ledger.lookup(sequences[0], 1), requests[0].num_prompt_tokens)
    ledger.publish(sequences[0], requests[0].num_prompt_tokens)
    common = shared_prefix_blocks(arrivals[0].prefix_hashes, arrivals[1].prefix_hashes)
    expected = min(common * 512 // size, *[sequence.num_hashed for sequence in sequences])
    assert ledger.lookup(sequences[1], requests[1].num_prompt_tokens + 1).num_blocks == expected


def test_block_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="block_size 48"):
        to_request(Arrival(Duration(0), 512, 1, (1,)), "r", Instant(0), max_model_len=1000, block_size=48)


TRACE = [Arrival(seconds(i * i), i + 1, 1) for i in range(1000)]


def test_poisson_keeps_requests_and_has_the_rate() -> None:
    timed = list(with_poisson(TRACE, 8.0, RandomStreams(1).stream("workload.gaps")))
    assert timed == list(with_poisson(TRACE, 8.0, RandomStreams(1).stream("workload.gaps")))
    assert [arrival.num_prompt_tokens for arrival in timed] == [arrival.num_prompt_tokens for arrival in TRACE]
    assert all(a.at <= b.at for a, b in pairwise(timed))
    assert timed[-1].at == pytest.approx(seconds(1000 / 8.0), rel=0.15)


def test_scaling_the_rate_divides_times() -> None:
    assert [arrival.at for arrival in take(scale_rate(TRACE, 2.0), 4)] == [0, seconds(0.5), seconds(2), seconds(4.5)]


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_rates_that_are_not_positive_are_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match="positive"):
        list(scale_rate(TRACE, bad))
    with pytest.raises(ConfigError, match="positive"):
        list(with_poisson(TRACE, bad, RandomStreams(1).stream("workload.gaps")))
