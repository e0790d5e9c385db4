"""When the migration policy is asked."""

from collections.abc import Sequence

from rota.base.errors import PolicyError
from rota.base.instant import Duration, Instant, after, seconds
from rota.serving.api import MigrationPolicy, Move, ReportObserver
from rota.serving.cluster.answers import ask_migration, tell_report
from rota.serving.cluster.instances import OPEN_STATES, InstanceBook
from rota.serving.cluster.ledger import InstanceLedger
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
from rota.serving.model.instance import InstanceId

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
        self._failed_ahead: PolicyError | None = None
        self._reader = policy if self.ask_every and isinstance(policy, ReportObserver) else None
        if self._reader is not None:
            instances.changed = {}

    def ask(self, now: Instant) -> Sequence[Move]:
        """What to move, if it is time to ask."""
        if self._policy is None or self.ask_at is None or self.ask_at > now:
            return ()
        self.ask_at = None
        failed, self._failed_ahead = self._failed_ahead, None
        if failed is not None:
            raise failed
        return ask_migration(self._policy, self._instances.open_views, self._migrations.moving, now)

    def keep_asking(self, event: ClusterEvent | None, has_work: bool, now: Instant) -> None:
        """Arm the timer while there is something to move and somewhere to move it; None for a deadline. After that, a
        policy that reads ahead reads what has changed."""
        if not self.ask_every:
            return
        if event is not None and not isinstance(event, _NO_PROGRESS):
            self._progressed_at = now
        is_wanted = has_work and len(self._instances.open_views) > 1
        if not is_wanted or now - self._progressed_at > self._patience:
            self.ask_at = None
        elif self.ask_at is None:
            self.ask_at = after(now, self.ask_every)
        if self._instances.changed:
            self._tell_changed(self._instances.changed)

    def _tell_changed(self, changed: dict[InstanceId, InstanceLedger]) -> None:
        assert self._reader is not None
        views = [ledger.view for ledger in changed.values() if ledger.state in OPEN_STATES]
        changed.clear()
        try:
            for view in views:
                tell_report(self._reader, view)
        except PolicyError as error:
            self._failed_ahead = error  # Raised in the next round: what this event commands must not be lost for it.
