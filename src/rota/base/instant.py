"""Time as integers: nanoseconds, so that adding, comparing and journaling are exact.

Floats appear only at the edges (command line, HTTP, reports); the two helpers here are that edge.
"""

from typing import NewType

Instant = NewType("Instant", int)
"""A point in time, in nanoseconds since an origin that only the driver knows."""

Duration = NewType("Duration", int)
"""A length of time, in nanoseconds."""

NANOSECONDS_PER_SECOND = 1_000_000_000
NANOSECONDS_PER_MILLISECOND = 1_000_000


def seconds(value: float) -> Duration:
    """The duration of `value` seconds, rounded to the nearest nanosecond."""
    return Duration(round(value * NANOSECONDS_PER_SECOND))


def milliseconds(value: float) -> Duration:
    """The duration of `value` milliseconds, rounded to the nearest nanosecond."""
    return Duration(round(value * NANOSECONDS_PER_MILLISECOND))


def microseconds(value: float) -> Duration:
    """The duration of `value` microseconds, rounded to the nearest nanosecond."""
    return Duration(round(value * 1000))


def to_seconds(value: int) -> float:
    """A duration or an instant as float seconds, for display."""
    return value / NANOSECONDS_PER_SECOND


def to_milliseconds(value: int) -> float:
    """A duration as float milliseconds, for display."""
    return value / NANOSECONDS_PER_MILLISECOND


def after(instant: Instant, duration: Duration) -> Instant:
    """The instant that lies `duration` after `instant`."""
    return Instant(instant + duration)
