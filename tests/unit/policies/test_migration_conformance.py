"""Every migration policy keeps the contract of its kind, and a broken one of each sort is caught."""

import itertools

import pytest

from rota.base.errors import LawBroken
from rota.serving.api import InstanceId, Move, RequestId
from rota.serving.policies.migration import MIGRATION
from rota.testing import check_migration_policy

PARAMETERS = {
    "balance_load": [{}, {"max_migrations": 3, "destination_above": 500.0, "source_below": 500.0}],
    "defragment": [{}, {"max_migrations": 1}],
    "defragment_plan": [{}, {"max_looks": 1, "search_limit": 0.02}],
    "drain": [{}, {"max_migrations": 8}],
    "isolate_class": [{}, {"high_priority_max": 0, "max_migrations": 3}],
    "none": [{}],
}
SOUND = [(name, parameters) for name, all_parameters in PARAMETERS.items() for parameters in all_parameters]


def test_every_policy_is_here():
    assert set(PARAMETERS) == set(MIGRATION.table)


@pytest.mark.parametrize(("name", "parameters"), SOUND, ids=[f"{name}-{len(each)}" for name, each in SOUND])
def test_keeps_the_contract(name, parameters):
    check_migration_policy(lambda: MIGRATION.create(name, parameters), max_examples=60)


class Broken:
    requires = frozenset()
    interval_seconds = 0.05

    def plan(self, cluster, moving):
        return list(self.moves(cluster, moving))[:1]

    def moves(self, cluster, moving):
        for source, destination in itertools.permutations(cluster.instances, 2):
            if not destination.is_draining:
                for sequence in source.running:
                    if sequence.request_id not in moving:
                        yield Move(sequence.request_id, source.id, destination.id, "because")


class MovesAGhost(Broken):
    def moves(self, cluster, moving):
        for move in super().moves(cluster, moving):
            yield Move(RequestId("ghost"), move.source, move.destination, "seen it once")


class MovesThoseWhoWait(Broken):
    def moves(self, cluster, moving):
        for source, destination in itertools.permutations(cluster.instances, 2):
            for sequence in source.waiting if not destination.is_draining else ():
                yield Move(sequence.request_id, source.id, destination.id, "it waits")


class MovesOneTwice(Broken):
    def plan(self, cluster, moving):
        return list(self.moves(cluster, moving))[:1] * 2


class MovesThoseOnTheWay(Broken):
    def moves(self, cluster, moving):
        return super().moves(cluster, frozenset())


class FillsTheDraining(Broken):
    def moves(self, cluster, moving):
        for source, destination in itertools.permutations(cluster.instances, 2):
            for sequence in source.running if destination.is_draining else ():
                yield Move(sequence.request_id, source.id, destination.id, "it looks so empty")


class GoesNowhere(Broken):
    def moves(self, cluster, moving):
        for move in super().moves(cluster, moving):
            yield Move(move.request_id, move.source, move.source, "it is fine here")


class GoesElsewhere(Broken):
    def moves(self, cluster, moving):
        for move in super().moves(cluster, moving):
            yield Move(move.request_id, move.source, InstanceId("elsewhere"), "greener")


class Silent(Broken):
    def moves(self, cluster, moving):
        for move in super().moves(cluster, moving):
            yield Move(move.request_id, move.source, move.destination, "")


class WritesToViews(Broken):
    def plan(self, cluster, moving):
        for instance in cluster.instances:
            instance.num_migrations = 0
        return ()


class TakesFromTheList(Broken):
    def plan(self, cluster, moving):
        cluster.instances[0].running.pop()
        return ()


class SharesItsMemory(Broken):
    turns = itertools.count()

    def plan(self, cluster, moving):
        return super().plan(cluster, moving) if next(self.turns) % 2 else ()


class ByTheDateOfRelease(Broken):
    def plan(self, cluster, moving):
        return super().plan(cluster, moving) if cluster.now < 10**15 else ()


class ToAndFro(Broken):
    """Balances by requests, and overshoots when the numbers differ by one."""

    def moves(self, cluster, moving):
        for move in super().moves(cluster, moving):
            instances = {instance.id: len(instance.running) for instance in cluster.instances}
            if instances[move.source] > instances[move.destination]:
                yield move


class BelievesWhatItRead(Broken):
    """Reads ahead, and does not look whether it still holds."""

    def __init__(self):
        self.read = {}

    def instance_reported(self, instance):
        self.read[instance.id] = len(instance.running)

    def moves(self, cluster, moving):
        for move in super().moves(cluster, moving):
            here = next(each for each in cluster.instances if each.id == move.source)
            if self.read.get(move.source, len(here.running)) % 2:
                yield move


class MagicNeeded(Broken):
    requires = frozenset({"magic"})


class NeverSaysWhen(Broken):
    interval_seconds = -1.0


BROKEN = {
    MovesAGhost: "does not run at its source",
    MovesThoseWhoWait: "does not run at its source|nobody runs",
    MovesOneTwice: "second of the same request",
    MovesThoseOnTheWay: "on its way already",
    FillsTheDraining: "drains",
    GoesNowhere: "goes nowhere",
    GoesElsewhere: "not among",
    Silent: "law 11",
    WritesToViews: "law 13",
    TakesFromTheList: "law 13",
    SharesItsMemory: "law 8",
    ByTheDateOfRelease: "law 8: at another time",
    ToAndFro: "law 7",
    BelievesWhatItRead: "law 8: having read ahead",
    MagicNeeded: "Capability values",
    NeverSaysWhen: "interval_seconds",
}
FOUND_LATE = {ToAndFro, BelievesWhatItRead}


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize(
    "broken", [pytest.param(each, marks=[pytest.mark.slow] * (each in FOUND_LATE)) for each in BROKEN]
)
def test_a_broken_policy_is_caught(broken):
    with pytest.raises(LawBroken, match=BROKEN[broken]):
        check_migration_policy(broken, max_examples=300)
