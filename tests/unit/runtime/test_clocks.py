"""Clocks never go back, and two system clocks never agree."""

import time

import pytest

from rota.base.errors import LawBroken
from rota.runtime.clocks import SystemClock, VirtualClock

HOUR = 3_600 * 10**9


def test_a_virtual_clock_moves_only_forward():
    clock = VirtualClock(5)
    clock.advance_to(5)
    clock.advance_to(9)
    assert clock.now() == 9
    with pytest.raises(LawBroken):
        clock.advance_to(8)


def test_system_clocks_are_monotone_and_have_random_origins():
    clocks = [SystemClock() for _ in range(5)]
    assert len({clock.now() // 10**6 for clock in clocks}) == 5
    for clock in clocks:
        readings = [clock.now() for _ in range(100)]
        assert readings == sorted(readings)
        assert readings[0] >= HOUR


def test_a_system_clock_knows_the_wall_clock_for_display():
    clock = SystemClock()
    before = time.time_ns()
    assert abs(clock.to_wall(clock.now()) - before) < HOUR
