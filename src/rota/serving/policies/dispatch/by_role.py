"""Which instances have which role, looked up once for a fleet and not for every request."""

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property

from rota.serving.api import InstanceId, InstanceView, Role


class ByRole:
    """The instances of each role, by id; remembered for as long as the same tuple of instances is shown, because to ask
    a thousand of them costs more than to choose among them. A list, which may have been made for one request, is looked
    at anew."""

    def __init__(self) -> None:
        self._instances: Sequence[InstanceView] = ()
        self._fleet = FleetRoles(())

    def of(self, instances: Sequence[InstanceView]) -> "FleetRoles":
        """The roles of the instances that are shown."""
        if not isinstance(instances, tuple):
            return FleetRoles(instances)
        if instances is not self._instances:
            self._instances, self._fleet = instances, FleetRoles(instances)
        return self._fleet


class FleetRoles:
    """The instances of each role, and of roles together, each by id."""

    def __init__(self, instances: Sequence[InstanceView]) -> None:
        self._instances = instances

    @cached_property
    def prefill(self) -> list[InstanceView]:
        return [view for view in self._instances if view.role is Role.PREFILL]

    @cached_property
    def mixed(self) -> list[InstanceView]:
        return [view for view in self._instances if view.role is Role.MIXED]

    @cached_property
    def decode(self) -> list[InstanceView]:
        return [view for view in self._instances if view.role is Role.DECODE]

    @cached_property
    def not_decode(self) -> list[InstanceView]:
        return sorted([*self.prefill, *self.mixed], key=_id_of)

    @cached_property
    def not_prefill(self) -> list[InstanceView]:
        return [view for view in self._instances if view.role is not Role.PREFILL]


def place_of(instance_id: InstanceId, instances: Sequence[InstanceView]) -> int | None:
    """Where an instance stands among instances that are ordered by id; None if it is not there."""
    place = bisect_left(instances, instance_id, key=_id_of)
    return place if place < len(instances) and instances[place].id == instance_id else None


def _id_of(view: InstanceView) -> InstanceId:
    return view.id
