"""The laws of chance against tables, and against chance itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rota.serving.studies.statistics import beta_cdf, holm, share_interval, t_quantile, t_two_sided


@pytest.mark.parametrize(
    ("confidence", "degrees", "quantile"),
    [(0.95, 1, 12.7062), (0.95, 9, 2.26216), (0.99, 4, 4.60409), (0.9, 30, 1.69726), (0.95, 59, 2.00100)],
)
def test_student_as_in_the_tables(confidence: float, degrees: int, quantile: float) -> None:
    assert t_quantile(confidence, degrees) == pytest.approx(quantile, rel=1e-5)
    assert t_two_sided(-quantile, degrees) == pytest.approx(1 - confidence, rel=1e-4)


@pytest.mark.parametrize(
    ("hits", "tries", "low", "high"),
    [(10, 10, 0.6915, 1.0), (0, 10, 0.0, 0.3085), (7, 10, 0.3475, 0.9333), (1, 2, 0.0126, 0.9874)],
)
def test_clopper_and_pearson_as_in_the_tables(hits: int, tries: int, low: float, high: float) -> None:
    assert share_interval(hits, tries) == pytest.approx((low, high), abs=5e-5)


@given(st.floats(0, 1), st.floats(0.1, 200), st.floats(0.1, 200))
def test_the_beta_function_is_a_law_and_mirrors(x: float, a: float, b: float) -> None:
    assert -1e-12 <= beta_cdf(x, a, b) <= 1 + 1e-12
    if x in (0.0, 1.0) or 1e-9 < x < 1 - 1e-9:
        assert beta_cdf(x, a, b) + beta_cdf(1 - x, b, a) == pytest.approx(1, abs=1e-9)


@given(st.lists(st.floats(0, 1), max_size=20))
def test_holm_never_makes_a_difference_surer_and_keeps_the_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert [adjusted[i] for i in order] == sorted(adjusted)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
