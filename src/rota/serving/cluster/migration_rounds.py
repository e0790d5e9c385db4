"""When the migration policy is asked."""

from collections.abc import Sequence

from rota.base.instant import Duration, Instant, after, seconds
from rota.serving.api import MigrationPolicy, Move
from rota.serving.cluster.answers import ask_migration
from rota.serving.cluster.instances import InstanceBook
from rota.serving.cluster.migration import MigrationBook
from rota.serving.model.events import (
    ClusterEvent,
    CopyCaughtUp,
    CopyStarted,
    HandedOver,
    InstanceReported,
    MigrationFailed,
    RoomReserved,
    ScalingDue,
)

_NO_PROGRESS = (InstanceReported, RoomReserved, CopyStarted, CopyCaughtUp, HandedOver, MigrationFailed, ScalingDue)
"""Facts that may come for ever although no request comes any further."""


class MigrationRounds:
    """Asks the policy every `interval_seconds`, while work is unfinished and there is somewhere to move it. It is asked
    no more when for `patience` no request arrived, was heard of or ended."""

    def __init__(
        self, policy: MigrationPolicy | None, instances: InstanceBook, migrations: MigrationBook, patience: Duration
    ) -> None:
        self._policy = policy
        self._instances = instances
        self._migrations = migrations
        self._patience = patience
        self.ask_every = Duration(0) if policy is None else seconds(policy.interval_seconds)
        """0 for never."""
        self.ask_at: Instant | None = None
        self._progressed_at = Instant(0)

    def ask(self, now: Instant) -> Sequence[Move]:
        """What to move, if it is time to ask."""
        if self._policy is None or self.ask_at is None or self.ask_at > now:
            return ()
        self.ask_at = None
        return ask_migration(self._policy, self._instances.open_views, self._migrations.moving, now)

    def keep_asking(self, event: ClusterEvent | None, has_work: bool, now: Instant) -> None:
        """Arm the timer while there is something to move and somewhere to move it; None for a deadline."""
        if not self.ask_every:
            return
        if event is not None and not isinstance(event, _NO_PROGRESS):
            self._progressed_at = now
        is_wanted = has_work and len(self._instances.open_views) > 1
        if not is_wanted or now - self._progressed_at > self._patience:
            self.ask_at = None
        elif self.ask_at is None:
            self.ask_at = after(now, self.ask_every)
