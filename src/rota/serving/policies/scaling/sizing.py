"""What the scaling policies share: who serves, who is nearest to empty, and how to get to a number of instances."""

from collections.abc import Sequence

from rota.base.errors import ConfigError
from rota.base.instant import Duration, Instant, seconds
from rota.serving.api import FleetView, InstanceView, Start, Stop


def serving(fleet: FleetView) -> Sequence[InstanceView]:
    """The instances that take requests."""
    return [view for view in fleet.instances if not view.is_draining]


def num_coming(fleet: FleetView) -> int:
    """Those that serve, and those that are on their way."""
    return len(serving(fleet)) + len(fleet.starting)


def num_unfinished(fleet: FleetView) -> int:
    """Requests at instances, those that drain included, and held ones."""
    return sum(view.num_outstanding_requests for view in fleet.instances) + fleet.num_held


def bounded(num_wanted: int, fleet: FleetView) -> int:
    """The nearest number that the rules allow."""
    return min(max(num_wanted, fleet.min_instances), fleet.max_instances)


def starts(num: int, reason: str) -> list[Start | Stop]:
    return [Start(reason)] * num


def stops(fleet: FleetView, num: int, reason: str) -> list[Start | Stop]:
    """Stop those that have the fewest requests, the youngest name first among equals."""
    youngest_first = list(serving(fleet))[::-1]
    emptiest = sorted(youngest_first, key=lambda view: view.num_outstanding_requests)
    return [Stop(view.id, reason) for view in emptiest[:num]]


class Held:
    """Whether a condition has held without a break for so long."""

    def __init__(self, for_seconds: float, what: str) -> None:
        if not for_seconds >= 0:
            raise ConfigError(f"{what} must be at least 0 seconds, not {for_seconds}")
        self._for: Duration = seconds(for_seconds)
        self._since: Instant | None = None

    def told(self, is_so: bool, now: Instant) -> bool:
        """Note whether it holds now; returns whether it has for long enough."""
        if not is_so:
            self._since = None
            return False
        if self._since is None:
            self._since = now
        return now - self._since >= self._for

    def forget(self) -> None:
        """Begin to count anew."""
        self._since = None


def checked_above(name: str, value: float, least: float) -> float:
    """The parameter, if it is above `least`. Raises `ConfigError`."""
    if not least < value < float("inf"):
        raise ConfigError(f"{name} must be above {least:g}, and finite, not {value}")
    return value
