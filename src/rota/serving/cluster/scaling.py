"""The fleet: which instances are wanted, which are on their way, and which are to go, within its rules.

A scaling policy says what it wishes; what is done about it is decided here. An instance that is not wanted any more is
drained: it is given nothing new, what it has moves elsewhere or ends there, and only when it has nothing left is the
host told to stop it. So no drain loses a request, however long it takes.

**The bound on flapping.** From the moment at which an instance was last ordered, got ready or was kept after all,
nobody is drained for `cool_down_seconds`, nor while one is on its way. So between two turns from growing to shrinking
there is at least that much time, and in any stretch of T seconds there are at most T / cool_down + 1 of them, and of
the turns back one more. Growing is never delayed: a fleet that is too small costs more than one that is too large.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from rota.base.errors import LawBroken
from rota.base.instant import Duration, Instant, after, seconds, to_seconds
from rota.serving.api import (
    FleetRules,
    InstanceView,
    Outcome,
    ScalingPolicy,
    Start,
    StartingInstance,
    StartOffer,
    StartSource,
    Stop,
    WorkTotals,
)
from rota.serving.cluster.answers import ask_scaling
from rota.serving.cluster.demand import DemandBook
from rota.serving.cluster.instances import InstanceBook
from rota.serving.cluster.lifecycles import MEMBER_LIFECYCLE, InstanceState, MemberState, RequestState
from rota.serving.cluster.tracked import TrackedRequest
from rota.serving.model.commands import ClusterCommand, DrainInstance, KeepInstance, StartInstance, StopInstance
from rota.serving.model.events import (
    ClusterEvent,
    InstanceLost,
    InstanceStarted,
    InstanceStarting,
    InstanceStopped,
    ScalingDue,
    StartFailed,
)
from rota.serving.model.instance import InstanceId

FleetCommand = StartInstance | DrainInstance | KeepInstance | StopInstance

_RETRY_FACTOR_MAX = 16
_WITHOUT_TOKEN = (RequestState.QUEUED, RequestState.ASSIGNED)


class Barred(StrEnum):
    """Why a wish of the policy was not granted."""

    AT_MOST = "at_most"
    """There are as many instances as may be."""
    AT_LEAST = "at_least"
    """There are no more than must be."""
    COOL_DOWN = "cool_down"
    """One came not long ago."""
    ON_ITS_WAY = "on_its_way"
    """One is starting: first it should be seen what it changes."""
    RETRY = "retry"
    """A start failed not long ago."""
    NOT_SERVING = "not_serving"
    """It drains already, or is lost."""


@dataclass(frozen=True, slots=True)
class FleetCounts:
    """What became of the fleet since the start."""

    num_members: int
    """Now: ordered, serving, leaving and stopping."""
    num_ordered: int
    """Starts that were ordered."""
    num_failed: int
    """Of those, starts that came to nothing."""
    num_drained: int
    num_kept: int
    """Drains that were called off."""
    num_stopped: int
    num_turns: int
    """Times that the fleet began to shrink after it had grown."""
    num_barred: Mapping[Barred, int]
    """Wishes that were not granted."""
    instance_seconds: float
    """Paid for: of each instance from its order (or from when it was first heard of) until it was gone."""


class Member:
    """One instance of the fleet."""

    __slots__ = ("id", "ordered_at", "source", "state")

    def __init__(self, instance_id: InstanceId, source: StartSource | None, now: Instant) -> None:
        self.id = instance_id
        self.source = source
        self.ordered_at = now
        self.state = str(MEMBER_LIFECYCLE.initial)

    def move(self, event: str) -> None:
        self.state = MEMBER_LIFECYCLE.move(self.state, event)


class FleetBook:
    """The members of the fleet. Written by the cluster machine alone."""

    def __init__(self, policy: ScalingPolicy, rules: FleetRules, instances: InstanceBook) -> None:
        self.demand = DemandBook()
        self.scale_every = seconds(policy.interval_seconds)
        self._policy = policy
        self._rules = rules
        self._cool_down = seconds(rules.cool_down_seconds)
        self._instances = instances
        self._members: dict[InstanceId, Member] = {}
        self._num_named = 0
        self._num_failed_in_a_row = 0
        self._retry_at = Instant(0)
        self._grown_at: Instant | None = None
        self._is_growing = True
        self._turns: tuple[Instant, ...] = ()
        """The last two turns from growing to shrinking."""
        self._counts: Counter[str] = Counter()
        self._num_barred: Counter[Barred] = Counter()
        self._paid = 0

    # --- what the machine asks ---------------------------------------------------------------------------------------

    def is_unwanted(self, instance_id: InstanceId) -> bool:
        """Whether an instance is to go, so that it takes no requests, whatever it says of itself."""
        member = self._members.get(instance_id)
        return member is not None and member.state in (MemberState.LEAVING, MemberState.STOPPING)

    def counts(self, now: Instant) -> FleetCounts:
        counts = self._counts
        paid = self._paid + sum(now - member.ordered_at for member in self._members.values())
        return FleetCounts(
            num_members=len(self._members),
            num_ordered=counts["ordered"],
            num_failed=counts["failed"],
            num_drained=counts["drained"],
            num_kept=counts["kept"],
            num_stopped=counts["stopped"],
            num_turns=counts["turns"],
            num_barred=MappingProxyType(dict(self._num_barred)),
            instance_seconds=to_seconds(paid),
        )

    def states(self) -> Mapping[InstanceId, MemberState]:
        """Every member and its state, in the order in which they came."""
        return {member.id: MemberState(member.state) for member in self._members.values()}

    def ordered(self) -> Iterator[StartingInstance]:
        """Those that were ordered and are not ready yet, the oldest order first."""
        return (StartingInstance(each.id, each.source, each.ordered_at) for each in self._of(MemberState.ORDERED))

    # --- facts -------------------------------------------------------------------------------------------------------

    def heard(self, event: ClusterEvent | None, now: Instant) -> list[ClusterCommand]:
        """Take in what an event says of members, after the machine has; None for a deadline. Returns the orders to
        stop those who are empty or lost."""
        commands: list[ClusterCommand] = []
        match event:
            case InstanceStarting():
                if event.instance_id not in self._members:
                    self._members[event.instance_id] = Member(event.instance_id, None, now)
            case InstanceStarted():
                self._started(event.spec.id, now)
            case InstanceLost():
                member = self._members.get(event.instance_id)
                if member is not None and member.state == MemberState.LEAVING:
                    member.move("lost")
                    commands.append(StopInstance(member.id, f"it was lost while it drained: {event.reason}"))
            case StartFailed():
                self._start_failed(event.instance_id, now)
            case InstanceStopped():
                self._gone(event.instance_id, now)
            case _:
                pass
        for member in list(self._of(MemberState.LEAVING)):
            ledger = self._instances.ledgers.get(member.id)
            if ledger is None:
                member.move("empty")
                commands.append(StopInstance(member.id, "it has drained"))
        return commands

    def _started(self, instance_id: InstanceId, now: Instant) -> None:
        member = self._members.get(instance_id)
        if member is None:
            # The host's own, of which it said nothing before.
            member = self._members[instance_id] = Member(instance_id, None, now)
        if member.state == MemberState.ORDERED:
            member.move("started")
            self._num_failed_in_a_row = 0
            self._grown_at = now

    def _start_failed(self, instance_id: InstanceId, now: Instant) -> None:
        member = self._members.get(instance_id)
        if member is not None and member.state == MemberState.ORDERED:
            self._note_failure(now)
            self._gone(instance_id, now)

    def _note_failure(self, now: Instant) -> None:
        self._counts["failed"] += 1
        factor = min(2**self._num_failed_in_a_row, _RETRY_FACTOR_MAX)
        self._num_failed_in_a_row = min(self._num_failed_in_a_row + 1, _RETRY_FACTOR_MAX)
        self._retry_at = after(now, seconds(self._rules.retry_seconds * factor))

    def _gone(self, instance_id: InstanceId, now: Instant) -> None:
        member = self._members.pop(instance_id, None)
        if member is not None:
            self._counts["stopped"] += member.state == MemberState.STOPPING
            member.move("gone")
            self._paid += now - member.ordered_at

    # --- decisions ---------------------------------------------------------------------------------------------------

    def look(self, due: ScalingDue, requests: Collection[TrackedRequest], now: Instant) -> list[FleetCommand]:
        """Ask the policy, and say what is done about its wishes. The machine has instances drain and kept
        accordingly."""
        view = FleetReading(self, self._instances, self._rules, due.offers, requests, now)
        # First, so that a policy that raises leaves no trace but that it was asked.
        wishes = ask_scaling(self._policy, view)
        commands = self._give_up_late(now)
        offers = [offer.source for offer in due.offers for _ in range(_most(offer, self._rules))]
        sources = iter(offers)
        for wish in wishes:
            done = self._start(wish, sources, now) if isinstance(wish, Start) else self._drain(wish, now)
            if isinstance(done, Barred):
                self._num_barred[done] += 1
            else:
                commands.append(done)
        wanted = Start(f"at least {self._rules.min_instances} are kept")
        while self._num_wanted() < self._rules.min_instances:
            done = self._start(wanted, sources, now)
            if isinstance(done, Barred):
                break
            commands.append(done)
        return commands

    def _give_up_late(self, now: Instant) -> list[FleetCommand]:
        late: list[FleetCommand] = []
        timeout = seconds(self._rules.start_timeout_seconds)
        for member in self._of(MemberState.ORDERED):
            if now - member.ordered_at >= timeout:
                member.move("late")
                self._note_failure(now)
                late.append(StopInstance(member.id, f"it was not ready within {to_seconds(timeout):g} s"))
        return late

    def _start(
        self, wish: Start, sources: Iterator[StartSource], now: Instant
    ) -> StartInstance | KeepInstance | Barred:
        leaving = [self._instances.ledgers[member.id] for member in self._of(MemberState.LEAVING)]
        if leaving:
            # The one that has most left: the others are sooner gone.
            ledger = max(leaving, key=lambda each: (each.num_outstanding_requests, each.id))
            self._members[ledger.id].move("kept")
            self._counts["kept"] += 1
            self._is_growing, self._grown_at = True, now
            return KeepInstance(ledger.id, wish.reason)
        if len(self._members) >= self._rules.max_instances:
            return Barred.AT_MOST
        if now < self._retry_at:
            return Barred.RETRY
        source = next(sources, StartSource.COLD)
        member = Member(self._new_id(), source, now)
        self._members[member.id] = member
        self._counts["ordered"] += 1
        self._is_growing, self._grown_at = True, now
        return StartInstance(member.id, source, wish.reason)

    def _drain(self, wish: Stop, now: Instant) -> DrainInstance | Barred:
        member = self._members.get(wish.instance_id)
        ready = {ledger.id for ledger in self._instances.ready if not self.is_unwanted(ledger.id)}
        if member is None or member.state != MemberState.SERVING or member.id not in ready:
            return Barred.NOT_SERVING
        if len(ready) <= self._rules.min_instances:
            return Barred.AT_LEAST
        if any(True for _ in self._of(MemberState.ORDERED)):
            return Barred.ON_ITS_WAY
        if self._grown_at is not None and now - self._grown_at < self._cool_down:
            return Barred.COOL_DOWN
        if self._is_growing:
            self._turns = (*self._turns[-1:], now)
            self._counts["turns"] += 1
            self._is_growing = False
        member.move("drained")
        self._counts["drained"] += 1
        return DrainInstance(member.id, wish.reason)

    def _new_id(self) -> InstanceId:
        while True:
            self._num_named += 1
            instance_id = InstanceId(f"scaled-{self._num_named}")
            if instance_id not in self._members and instance_id not in self._instances.ledgers:
                return instance_id

    def _of(self, state: MemberState) -> Iterator[Member]:
        return (member for member in self._members.values() if member.state == state)

    def _num_wanted(self) -> int:
        return sum(member.state in (MemberState.ORDERED, MemberState.SERVING) for member in self._members.values())

    # --- laws --------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """No more members than may be, nobody forgotten that leaves, and turns apart by the cool-down."""
        num_ours = sum(member.source is not None for member in self._members.values())
        if num_ours > self._rules.max_instances:
            raise LawBroken(f"law 12: {num_ours} instances were started, {self._rules.max_instances} may be")
        for member in self._of(MemberState.LEAVING):
            ledger = self._instances.ledgers.get(member.id)
            if ledger is None or ledger.state == InstanceState.READY:
                raise LawBroken(f"law 1: {member.id} is to go, but it is {'unknown' if ledger is None else 'ready'}")
        for member in self._of(MemberState.STOPPING):
            ledger = self._instances.ledgers.get(member.id)
            if ledger is not None and ledger.state != InstanceState.LOST:
                raise LawBroken(f"law 1: {member.id} was told to stop with {ledger.num_outstanding_requests} requests")
        if len(self._turns) == 2 and self._turns[1] - self._turns[0] < self._cool_down:
            raise LawBroken(f"the fleet turned at {self._turns[0]} and {self._turns[1]}, within one cool-down")


class FleetReading:
    """The `FleetView` of one decision."""

    def __init__(
        self,
        fleet: FleetBook,
        instances: InstanceBook,
        rules: FleetRules,
        offers: Sequence[StartOffer],
        requests: Collection[TrackedRequest],
        now: Instant,
    ) -> None:
        states = fleet.states()
        open_ids = {view.id for view in instances.open_views}
        self.now = now
        self.instances: Sequence[InstanceView] = instances.open_views
        self.starting: Sequence[StartingInstance] = tuple(fleet.ordered())
        self.num_aside = sum(
            state == MemberState.SERVING and instance_id not in open_ids for instance_id, state in states.items()
        )
        self.offers = offers
        self.min_instances = rules.min_instances
        self.max_instances = rules.max_instances
        self.num_held = sum(each.state == RequestState.QUEUED for each in requests)
        self.waits: Sequence[Duration] = [
            Duration(now - each.request.arrived_at) for each in requests if each.state in _WITHOUT_TOKEN
        ]
        self.outcomes: Sequence[Outcome] = fleet.demand.read_outcomes()
        self.totals: WorkTotals = fleet.demand.totals

    def __iter__(self) -> Iterator[InstanceView]:
        return iter(self.instances)


def _most(offer: StartOffer, rules: FleetRules) -> int:
    return rules.max_instances if offer.num is None else min(offer.num, rules.max_instances)
