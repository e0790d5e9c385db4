"""The calibrated predictor: its terms, its bounds, and that it obeys the rules of all predictors."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rota.base.errors import ConfigError
from rota.serving.predictors.step_time import STEP_TIMES
from rota.serving.predictors.step_time.calibrated import CalibratedStepTime
from rota.testing.step_time import check_step_time

TERMS: dict[str, Any] = {
    "base_ms": 10.0,
    "tokens_us": [(0, 0.0), (16, 160.0), (32, 1760.0)],
    "decodes_us": [(0, 0.0), (8, 80.0)],
    "decode_kv_token_ns": 3.0,
    "prefill_us": 7.0,
    "prefill_pair_ns": 2.0,
    "prefill_context_token_ns": 5.0,
}


def test_by_hand() -> None:
    predictor = CalibratedStepTime(**TERMS)
    assert predictor.step_time(prefills=(), num_decodes=0, decode_kv_tokens=0) == 0
    # 10 ms; 4 tokens at 10 us; 4 decodes at 10 us; 1,000 context tokens at 3 ns.
    assert predictor.step_time(prefills=(), num_decodes=4, decode_kv_tokens=1000) == 10_000_000 + 40_000 + 40_000 + 3000
    # 20 tokens: 160 us and 4 at 100 us; two chunks; pairs 8 * (100 + 4) + 12 * 6 at 2 ns; 100 context tokens at 5 ns.
    expected = 10_000_000 + 160_000 + 400_000 + 14_000 + 2 * (832 + 72) + 500
    assert predictor.step_time(prefills=((8, 100), (12, 0)), num_decodes=0, decode_kv_tokens=0) == expected
    # Beyond its last point a curve goes straight on.
    far = predictor.step_time(prefills=((64, 0),), num_decodes=0, decode_kv_tokens=0)
    assert far == 10_000_000 + 1_760_000 + 3_200_000 + 7000 + 4096


def test_it_obeys_the_rules_of_all_predictors() -> None:
    check_step_time(CalibratedStepTime(**TERMS))
    check_step_time(CalibratedStepTime(base_ms=1e-6))


@settings(max_examples=40, deadline=None)
@given(
    st.floats(1e-6, 1e3),
    st.lists(st.tuples(st.integers(1, 500), st.floats(0, 1e5)), min_size=1, max_size=6),
    st.lists(st.floats(0, 1e4), min_size=5, max_size=5),
    st.integers(0, 99),
)
def test_whatever_its_terms(base_ms: float, rises: list[tuple[int, float]], weights: list[float], seed: int) -> None:
    points = [(0, 0.0)]
    for width, rise in rises:
        points.append((points[-1][0] + width, points[-1][1] + rise))
    names = ("decode_kv_token_ns", "prefill_us", "prefill_pair_ns", "prefill_context_token_ns")
    terms = dict(zip(names, weights, strict=False))
    check_step_time(
        CalibratedStepTime(base_ms=base_ms, tokens_us=points, decodes_us=points, **terms), num_steps=30, seed=seed
    )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "parameter 'base_ms' is missing"),
        ({"base_ms": 0.0}, "base_ms must be positive"),
        ({"base_ms": 1.0, "prefill_us": -1.0}, "prefill_us must be at least 0"),
        ({"base_ms": 1.0, "prefill_pair_ns": float("nan")}, "prefill_pair_ns"),
        ({"base_ms": 1.0, "tokens_us": [[0, 0.0]]}, "tokens_us must have from 2"),
        ({"base_ms": 1.0, "tokens_us": [[1, 0.0], [2, 1.0]]}, r"tokens_us must begin with the point \[0, 0.0\]"),
        ({"base_ms": 1.0, "decodes_us": [[0, 0.0], [4, 5.0], [8, 3.0]]}, r"decodes_us must rise from \[4, 5.0\]"),
        ({"base_ms": 1.0, "decodes_us": [[0, 0.0], [4, 5.0], [4, 6.0]]}, "decodes_us must rise"),
        ({"base_ms": 1.0, "tokens_us": "steep"}, "parameter 'tokens_us'"),
        ({"base_ms": 1.0, "token_us": 3}, "unknown parameter 'token_us'"),
    ],
)
def test_bad_terms_are_named(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        STEP_TIMES.create("calibrated", parameters)
