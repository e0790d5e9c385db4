"""The two steps that load-aware dispatch policies share: score the load, pick the least.

A dispatch policy filters the instances, scores those that are left in [0, 1], and picks the best; ties go to the first
by id, which is the order in which instances come.
"""

from collections.abc import Sequence

from rota.serving.api import InstanceId, InstanceView


def load_scores(instances: Sequence[InstanceView]) -> tuple[tuple[InstanceId, float], ...]:
    """One score an instance: 1 for the fewest outstanding tokens, 0 for the most, linear between, 1 where all are
    equal."""
    loads = [instance.num_outstanding_tokens for instance in instances]
    most = max(loads)
    span = most - min(loads)
    if span == 0:
        return tuple([(instance.id, 1.0) for instance in instances])
    return tuple([(instance.id, (most - load) / span) for instance, load in zip(instances, loads, strict=True)])


def least_loaded(instances: Sequence[InstanceView]) -> InstanceView:
    """The instance with the fewest outstanding tokens, the first by id among equals."""
    return min(instances, key=_num_outstanding_tokens)


def _num_outstanding_tokens(instance: InstanceView) -> int:
    return instance.num_outstanding_tokens
