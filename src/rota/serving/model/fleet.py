"""Facts about how many instances there are, and where new ones come from."""

from enum import StrEnum

import msgspec

from rota.base.instant import Duration


class StartSource(StrEnum):
    """What a new instance is started from, which decides how long that takes."""

    SPARE = "spare"
    """A process that runs already, with its weights loaded, and takes no requests yet."""
    PAGE_CACHE = "page_cache"
    """A new process on a machine that has read the weights before: they are in its memory."""
    COLD = "cold"
    """A new process that reads its weights from a disk or over a network."""


class StartOffer(msgspec.Struct, frozen=True, omit_defaults=True):
    """One way in which a host could start an instance now."""

    source: StartSource
    start_up: Duration
    """From the order until it takes requests, as the host expects it."""
    num: int | None = None
    """How many it could start so; None is any number."""


class FleetRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What bounds every scaling policy. The machine keeps to it, whatever a policy asks for."""

    min_instances: int = 1
    """At least so many are kept, those that start included."""
    max_instances: int = 8
    """At most so many exist, those that start, drain or stop included."""
    cool_down_seconds: float = 60.0
    """After one was ordered, and after it came, nobody is drained for so long. Hence the fleet turns from growing to
    shrinking at most once in so long. The default is ours."""
    start_timeout_seconds: float = 900.0
    """One that is not ready by then is stopped."""
    retry_seconds: float = 30.0
    """After a start that failed, before the next; twice as long after each in a row, at most 16 times as long."""

    def __post_init__(self) -> None:
        if self.min_instances < 1:
            raise ValueError(f"min_instances must be at least 1, not {self.min_instances}")
        if self.max_instances < self.min_instances:
            raise ValueError(
                f"max_instances ({self.max_instances}) must not be below min_instances ({self.min_instances})"
            )
        for name in ("cool_down_seconds", "start_timeout_seconds", "retry_seconds"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be at least 0, and finite, not {value}")
