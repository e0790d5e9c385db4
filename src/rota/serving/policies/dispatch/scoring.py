"""The two steps that load-aware dispatch policies share: score the load, pick the least.

A dispatch policy filters the instances, scores those that are left in [0, 1], and picks the best; ties go to the first
by id, which is the order in which instances come.
"""

from collections.abc import Sequence

from rota.serving.api import InstanceId, InstanceView

SCORES_MAX = 64
"""Of more instances none is told its score: that would take longer than the choice, and fill the journal with numbers
that nobody reads."""


def load_scores(instances: Sequence[InstanceView]) -> tuple[tuple[InstanceId, float], ...]:
    """One score an instance: 1 for the fewest outstanding tokens, 0 for the most, linear between, 1 where all are
    equal. Empty for more than `SCORES_MAX` instances."""
    if len(instances) > SCORES_MAX:
        return ()
    loads = [instance.num_outstanding_tokens for instance in instances]
    most = max(loads)
    span = most - min(loads)
    if span == 0:
        return tuple([(instance.id, 1.0) for instance in instances])
    return tuple([(instance.id, (most - load) / span) for instance, load in zip(instances, loads, strict=True)])


def least_loaded(instances: Sequence[InstanceView]) -> InstanceView:
    """The instance with the fewest outstanding tokens, the first by id among equals."""
    loads = [instance.num_outstanding_tokens for instance in instances]
    return instances[loads.index(min(loads))]


def equally_least_loaded(instances: Sequence[InstanceView]) -> list[InstanceView]:
    """All that have the fewest outstanding tokens, by id."""
    loads = [instance.num_outstanding_tokens for instance in instances]
    fewest = min(loads)
    return [instance for instance, load in zip(instances, loads, strict=True) if load == fewest]


def least_booked(instances: Sequence[InstanceView]) -> InstanceView:
    """The instance with the fewest booked tokens, the first by id among equals."""
    booked = [instance.num_booked_tokens for instance in instances]
    return instances[booked.index(min(booked))]
