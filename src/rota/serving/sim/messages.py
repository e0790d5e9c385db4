"""What instances say to the router of requests that move: at once, or late, twice or not at all."""

from rota.base.instant import after, seconds
from rota.runtime.faults import Fault, FaultPlan
from rota.runtime.simulation import SimulationLoop
from rota.serving.assemble import CLUSTER
from rota.serving.model.instance import InstanceId
from rota.serving.sim.migration import MigrationFact

MESSAGE_FAULTS = ("late_messages", "doubled_messages", "lost_messages")
"""What an instance has to say of its moves comes late, or a second time, by `magnitude` seconds; or not at all."""

RANK_MESSAGE = 2


class Messages:
    """Carries facts to the router, and spoils them while a fault says so."""

    def __init__(self, loop: SimulationLoop, faults: FaultPlan) -> None:
        self._loop = loop
        self._faults = faults
        self._spoils = any(fault.kind in MESSAGE_FAULTS for fault in faults)

    def say(self, fact: MigrationFact, source: InstanceId, destination: InstanceId) -> None:
        """Tell the router of a move between two instances."""
        late = self._spoiled("late_messages", source, destination)
        if self._spoiled("lost_messages", source, destination) is not None:
            return
        if late is None:
            self._loop.deliver(CLUSTER, fact)
        else:
            self._say_later(fact, late)
        twice = self._spoiled("doubled_messages", source, destination)
        if twice is not None:
            self._say_later(fact, twice)

    def _say_later(self, fact: MigrationFact, fault: Fault) -> None:
        at = after(self._loop.now, seconds(fault.magnitude))
        self._loop.call_at(at, lambda _: self._loop.deliver(CLUSTER, fact), RANK_MESSAGE)

    def _spoiled(self, kind: str, *instance_ids: InstanceId) -> Fault | None:
        if not self._spoils:
            return None
        faults = [self._faults.active(kind, instance_id, self._loop.now) for instance_id in instance_ids]
        return next((fault for fault in faults if fault is not None), None)
