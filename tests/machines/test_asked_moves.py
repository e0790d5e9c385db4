"""Moves that somebody asks the cluster machine for."""

import pytest
from tests.machines.test_migration_cases import HAND_OVER, REPLAY, A, B, C, Cluster, R

from rota.serving.api import RequestId
from rota.serving.model.commands import AbortMigration, Migrate, MoveRefused, Way
from rota.serving.model.events import MoveAsked

WAITS = "it does not run: it waits for its first token, or has ended"


@pytest.mark.parametrize("way", [None, Way.HAND_OFF, Way.REPLAY])
def test_what_is_asked_for_by_hand_moves_without_a_policy_and_is_given_up_in_time(way):
    cluster = Cluster(A, B, migration=None, capabilities=dict.fromkeys((A, B), frozenset({REPLAY, HAND_OVER})))
    source = cluster.run()
    destination = B if source == A else A
    (migrate,) = cluster.feed(MoveAsked(R, destination, way))
    assert isinstance(migrate, Migrate)
    assert (migrate.source, migrate.destination) == (source, destination)
    assert migrate.way == (way or Way.HAND_OFF)
    assert cluster.feed(MoveAsked(R, destination)) == [MoveRefused(R, "it is on its way already")]
    (given_up,) = cluster.expire()
    assert given_up == AbortMigration(migrate.migration_id, R, "proposed for 10 s")
    assert cluster.machine.owner(R) == source
    assert cluster.machine.next_deadline() is None


def test_what_is_asked_for_by_hand_and_cannot_be_is_refused_with_the_reason():
    cluster = Cluster(A, B, migration=None, capabilities={A: frozenset({REPLAY}), B: frozenset({REPLAY, HAND_OVER})})
    assert cluster.feed(MoveAsked(R, A)) == [
        MoveRefused(R, "it does not run: it waits for its first token, or has ended")
    ]
    source = cluster.run()
    other = B if source == A else A
    why = {
        MoveAsked(R, source): "it is there already",
        MoveAsked(R, C): "the destination takes no requests",
        MoveAsked(R, other, Way.HAND_OFF): "the two engines do not move requests so",
        MoveAsked(R, other, Way.COPY): "the two engines do not move requests so",
    }
    for asked, reason in why.items():
        assert cluster.feed(asked) == [MoveRefused(R, reason)]
    cluster.run("pinned", movable=False)
    pinned = RequestId("pinned")
    there = B if cluster.machine.owner(pinned) == A else A
    assert cluster.feed(MoveAsked(pinned, there)) == [MoveRefused(pinned, "it holds what does not travel")]
