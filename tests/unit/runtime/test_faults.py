"""Fault plans repeat from their seed and stay within what they were told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rota.base.errors import ConfigError
from rota.base.random_streams import RandomStreams
from rota.runtime.faults import FailNth, Fault, FaultKind, FaultPlan, random_plan

KINDS = [FaultKind("stop", duration=(5, 9)), FaultKind("slow", duration=(1, 1), magnitude=(1.5, 4.0))]


def plan(seed, num_faults, horizon=1_000):
    return random_plan(RandomStreams(seed).stream("faults"), KINDS, ["a", "b"], horizon, num_faults, start=70)


@given(st.integers(), st.integers(0, 20), st.integers(1, 10_000))
def test_a_plan_repeats_and_stays_within_bounds(seed, num_faults, horizon):
    faults = list(plan(seed, num_faults, horizon))
    assert faults == list(plan(seed, num_faults, horizon))
    assert len(faults) == num_faults
    assert faults == sorted(faults, key=lambda fault: fault.at)
    for fault in faults:
        assert 70 <= fault.at < 70 + horizon
        assert fault.target in ("a", "b")
        if fault.kind == "stop":
            assert 5 <= fault.duration <= 9
            assert fault.magnitude == 1.0
        else:
            assert fault.duration == 1
            assert 1.5 <= fault.magnitude <= 4.0


def test_different_seeds_break_different_things():
    assert list(plan(1, 5)) != list(plan(2, 5))


def test_what_is_active_when():
    first, second, other = Fault("slow", "a", 10, 20, 2.0), Fault("slow", "a", 15, 5, 3.0), Fault("stop", "a", 12, 1)
    faults = FaultPlan([second, other, first])
    assert [fault.at for fault in faults] == [10, 12, 15]
    expected = {9: None, 10: first, 14: first, 15: second, 19: second, 20: first, 29: first, 30: None}
    assert {at: faults.active("slow", "a", at) for at in expected} == expected
    assert faults.active("slow", "b", 15) is None
    assert len(FaultPlan()) == 0


def test_a_plan_of_nothing_is_refused():
    with pytest.raises(ConfigError):
        random_plan(RandomStreams(1).stream("faults"), KINDS, [], 100, 1)


class Push:
    pass


class Pull:
    pass


def test_the_nth_of_a_kind_fails_and_no_other():
    fail = FailNth("Push", 3)
    failed = [fail.fails(command) for command in (Push(), Pull(), Push(), Pull(), Push(), Push())]
    assert failed == [False, False, False, False, True, False]
    assert fail.has_struck
    assert not FailNth("Push", 1).has_struck
