"""A migration policy that reads reports ahead, in the router's machine, decides as one that reads everything anew in
each round; whatever it is shown of a report is right at every moment."""

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from rota.base.errors import PolicyError
from rota.base.instant import Duration, Instant, after, seconds
from rota.base.random_streams import Stream
from rota.serving.api import InstanceId, ReportObserver, Request, RequestId, SequenceReport
from rota.serving.cluster.ledger import InstanceLedger
from rota.serving.cluster.machine import ClusterMachine
from rota.serving.cluster.migration_rounds import MigrationRounds
from rota.serving.model.commands import Migrate
from rota.serving.model.events import (
    CopyCaughtUp,
    CopyStarted,
    FirstTokenSeen,
    HandedOver,
    InstanceDraining,
    InstanceReported,
    InstanceStarted,
    MigrationFailed,
    RequestArrived,
    RequestFinished,
    RoomReserved,
)
from rota.serving.model.instance import InstanceLimits, InstanceReport, InstanceSpec
from rota.serving.policies.admission.bounded_queue import BoundedQueue
from rota.serving.policies.dispatch.round_robin import RoundRobin
from rota.serving.policies.migration import MIGRATION

INSTANCES = [InstanceId(f"i{number}") for number in range(4)]
NAMES = [name for name in MIGRATION.names() if name != "none"]
NUM_BLOCKS = 200
QUICK = {"deadline": None, "phases": [Phase.generate], "database": None, "derandomize": True}
"""The same walks in every run, and nothing shrunk."""


class ReadsAnew:
    """A policy without the hook, and without anything that it has read before; it remembers its moves."""

    def __init__(self, policy):
        self._policy = policy
        self.requires, self.interval_seconds = policy.requires, policy.interval_seconds

    def plan(self, cluster, moving):
        self._policy._rounds.freeness._known.clear()
        return self._policy.plan(cluster, moving)


class World:
    """One machine, and a host that does what the steps say."""

    def __init__(self, policy):
        self.machine = ClusterMachine(RoundRobin(), BoundedQueue(), migration=policy)
        self.now = Instant(seconds(1))
        self.commands = []
        self.num_arrived = 0
        self.growth = {}
        for instance_id in INSTANCES:
            self.tell(InstanceStarted(InstanceSpec(instance_id, InstanceLimits(num_blocks=NUM_BLOCKS))))

    def tell(self, event):
        self.took(self.machine.handle(event, self.now))

    def took(self, commands):
        for command in commands:
            self.commands.append((self.now, command))

    def step(self, what, number):
        self.now = after(self.now, seconds(0.05))
        going = [each for each in self.machine.unfinished() if self.machine.owner(each) is not None]
        chosen = going[number % len(going)] if going else None
        instance_id = INSTANCES[number % len(INSTANCES)]
        if what == "arrive":
            self.num_arrived += 1
            num_tokens = 16 + number * 61 % 1900
            self.tell(RequestArrived(Request(RequestId(f"r{self.num_arrived:03}"), self.now, num_tokens, 500)))
        elif what == "report":
            self.tell(InstanceReported(self.report(instance_id)))
        elif what == "drain":
            self.tell(InstanceDraining(INSTANCES[-1]))
        elif chosen is not None and what == "end":
            self.tell(RequestFinished(chosen, self.machine.owner(chosen)))
        elif chosen is not None and what == "token":
            self.tell(FirstTokenSeen(chosen, self.machine.owner(chosen)))
        elif what == "settle":
            self.settle(bool(number % 2))
        deadline = self.machine.next_deadline()
        if deadline is not None and deadline <= self.now:
            self.took(self.machine.expire(self.now))
        self.machine.check()

    def settle(self, is_well):
        """Every move that was begun fails, or is over."""
        for migration_id in [each.migration_id for _, each in self.commands if isinstance(each, Migrate)][-3:]:
            if is_well:
                for passed in (RoomReserved, CopyStarted, CopyCaughtUp):
                    self.tell(passed(migration_id))
                self.tell(HandedOver(migration_id, Duration(1000)))
            self.tell(MigrationFailed(migration_id, "it broke"))

    def report(self, instance_id):
        """The first who fit run, and have grown; the others wait."""
        running, waiting, num_free = [], [], NUM_BLOCKS
        for request_id in sorted(each for each in self.machine.unfinished() if self.machine.owner(each) == instance_id):
            self.growth[request_id] = self.growth.get(request_id, 16 + int(request_id[1:]) * 97 % 900) + 5
            number = int(request_id[1:])
            num_blocks = -(-self.growth[request_id] // 16)
            if num_blocks <= num_free and not waiting:
                num_free -= num_blocks
                running.append(SequenceReport(request_id, self.growth[request_id], num_blocks, -(number % 7 == 3)))
            else:
                waiting.append(SequenceReport(request_id, self.growth[request_id], 0))
        counts = (len(running), len(waiting), num_free, NUM_BLOCKS, 0)
        return InstanceReport(instance_id, self.now, *counts, tuple(running), tuple(waiting))

    def check_shown(self):
        for ledger in self.machine._instances.ledgers.values():
            for shown, told in ((ledger.view.running, "running"), (ledger.view.waiting, "waiting")):
                reported = () if ledger.report is None else getattr(ledger.report, told)
                assert list(shown) == [each for each in reported if each.request_id in set(ledger.outstanding)]


WHAT = ("arrive", "arrive", "arrive", "token", "end", "report", "report", "report", "settle")


def walk_of(seed):
    stream = Stream(seed, "walk")
    return [(WHAT[stream.integers(0, len(WHAT))], stream.integers(0, 1000)) for _ in range(240)]


walks = st.integers(0, 10**6).map(walk_of)


def decide_alike(name, walk):
    ahead, anew = World(MIGRATION.create(name)), World(ReadsAnew(MIGRATION.create(name)))
    for what, number in [*walk[:120], ("drain", 0), *walk[120:]]:
        ahead.step(what, number)
        anew.step(what, number)
        ahead.check_shown()
    assert ahead.commands == anew.commands
    return sum(isinstance(each, Migrate) for _, each in ahead.commands)


@pytest.mark.parametrize("name", NAMES)
def test_decides_as_if_it_read_everything_anew(name):
    assert isinstance(MIGRATION.create(name), ReportObserver)
    num_moves = 0

    @settings(max_examples=5, **QUICK)
    @given(walks)
    def alike(walk):
        nonlocal num_moves
        num_moves += decide_alike(name, walk)

    alike()
    assert num_moves > 0, "nothing was decided"


def forget_nothing(self, request_id):
    """A ledger that shows those who are gone."""


def test_a_ledger_that_shows_those_who_left_is_found(monkeypatch):
    monkeypatch.setattr(InstanceLedger, "_changed", forget_nothing)

    @settings(max_examples=100, **QUICK)
    @given(walks)
    def alike(walk):
        decide_alike("balance_load", walk)

    with pytest.raises(AssertionError):
        alike()


def test_what_a_report_tells_of_is_the_same_object_until_it_changes():
    world = World(MIGRATION.create("balance_load"))
    for number in range(8):
        world.step("arrive", number)
    world.step("report", 0)
    (view, *_) = world.machine.instance_views()
    shown = view.running
    assert shown and view.running is shown
    world.step("arrive", 1)
    world.step("report", 1)
    assert view.running is shown, "another instance's report, and an arrival, change nothing"
    world.step("end", 0)
    assert view.running is not shown and len(view.running) == len(shown) - 1


class Counting:
    """Counts what it hears."""

    requires = frozenset()
    interval_seconds = 0.05

    def __init__(self):
        self.heard = []

    def instance_reported(self, instance):
        self.heard.append((instance.id, len(instance.running)))

    def plan(self, cluster, moving):
        return ()


def test_is_told_once_of_each_report_and_each_end():
    policy = Counting()
    world = World(policy)
    for number in range(4):
        world.step("arrive", number)
    assert policy.heard == [], "an arrival changes nothing that was reported"
    world.step("report", 0)
    world.step("end", 0)
    assert policy.heard == [("i0", 1), ("i0", 0)]


class FailsAhead(Counting):
    def instance_reported(self, instance):
        raise ValueError("it cannot read")


def test_a_failure_to_read_ahead_shows_in_the_round_and_costs_no_command():
    world = World(FailsAhead())
    world.step("arrive", 0)
    world.step("arrive", 1)
    world.tell(InstanceReported(world.report(INSTANCES[0])))
    world.tell(RequestFinished(RequestId("r001"), INSTANCES[0]))
    with pytest.raises(PolicyError, match="what i0 reports"):
        world.machine.expire(after(world.now, seconds(1)))
    world.machine.expire(after(world.now, seconds(2)))


def test_who_does_not_read_ahead_costs_nothing():
    machine = World(ReadsAnew(MIGRATION.create("drain"))).machine
    assert machine._instances.changed is None
    assert isinstance(machine._rounds, MigrationRounds)
