"""Instances on their way to another role: drained, told their role when they have nothing left, and then as if new.

One at a time. The dispatch policy is asked when a report came, which is as fast as anything changes that it could go
by; so no timer is needed, and nothing waits for one."""

from rota.base.instant import Instant
from rota.serving.api import DispatchPolicy, Flip, RoleFlipper
from rota.serving.cluster.answers import ask_flip
from rota.serving.cluster.instances import InstanceBook
from rota.serving.cluster.lifecycles import InstanceState
from rota.serving.cluster.migration import MigrationBook
from rota.serving.model.commands import ClusterCommand, DrainInstance, SetRole


class RoleFlips:
    """Drains the instance that the policy names, and orders its new role. Changes its state, and gives up what was on
    its way to it; whoever runs there moves elsewhere if the migration policy says so, or ends there."""

    def __init__(self, policy: DispatchPolicy, instances: InstanceBook, migrations: MigrationBook) -> None:
        self._policy = policy if isinstance(policy, RoleFlipper) else None
        self._instances = instances
        self._migrations = migrations
        self._flip: Flip | None = None
        self._is_ordered = False

    def reported(self, now: Instant) -> list[ClusterCommand]:
        """A report came: go on with the flip that is under way, or ask for one."""
        if self._policy is None:
            return []
        flip = self._flip
        if flip is None:
            return self._begin(self._policy, now)
        ledger = self._instances.ledgers.get(flip.instance_id)
        if ledger is None or ledger.state != InstanceState.DRAINING or not ledger.is_flipping:
            self._flip = None  # It has its role, or was lost, or came back as it was.
            return []
        is_empty = not (ledger.num_outstanding_requests or ledger.num_migrations or ledger.num_expected_requests)
        if self._is_ordered or not is_empty:
            return []
        self._is_ordered = True
        return [SetRole(flip.instance_id, flip.role, flip.reason)]

    def _begin(self, policy: RoleFlipper, now: Instant) -> list[ClusterCommand]:
        ready = self._instances.ready_views
        flip = ask_flip(policy, ready, now)
        if flip is None or len(ready) < 2:
            return []
        ledger = self._instances.ledgers[flip.instance_id]
        if ledger.spec.role is flip.role:
            return []
        self._flip, self._is_ordered = flip, False
        ledger.move("draining")
        ledger.is_flipping = True
        self._instances.refresh()
        reason = f"{flip.instance_id} is to be for {flip.role}: {flip.reason}"
        commands = self._migrations.abort_at(flip.instance_id, f"{flip.instance_id} drains", as_source=False)
        return [*commands, DrainInstance(flip.instance_id, reason)]
