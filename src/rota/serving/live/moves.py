"""Carries migrations by replay out: a stream stops at its source after the last event that its client got, and its
destination computes the tokens anew and goes on.

Nothing is copied ahead, so room is said to be there, and the copy to be ahead, at once. From `HandOver` to the first
token that the destination brings, the stream is on its way: what fails then fails the migration, and the stream goes on
at its source, by replay as well (where much of it is cached still).
"""

from typing import TYPE_CHECKING

from rota.base.instant import seconds
from rota.serving.model.commands import AbortMigration, Commit, CopyOut, HandOver, Migrate, Way
from rota.serving.model.events import (
    CopyCaughtUp,
    CopyStarted,
    HandedOver,
    MigrationFailed,
    RequestFailed,
    RoomReserved,
)
from rota.serving.model.request import RequestId

if TYPE_CHECKING:
    from rota.serving.live.cluster import LiveCluster


class ReplayMoves:
    """The migrations under way of one live cluster."""

    def __init__(self, cluster: "LiveCluster") -> None:
        self._cluster = cluster
        self._begun: dict[int, Migrate] = {}
        self._on_their_way: dict[RequestId, Migrate] = {}

    def carry_out(self, command: Migrate | CopyOut | HandOver | Commit | AbortMigration) -> None:
        """Do what the machine orders."""
        if isinstance(command, Migrate):
            self._begin(command)
        elif isinstance(command, CopyOut):
            self._cluster.tell(CopyStarted(command.migration_id))
            self._cluster.tell(CopyCaughtUp(command.migration_id))
        elif isinstance(command, HandOver):
            self._hand_over(command)
        else:
            move = self._begun.pop(command.migration_id, None)
            if isinstance(command, Commit) or move is None:
                return
            if self._on_their_way.get(move.request_id) is move:
                self._take_back(move)

    def attempt_failed(self, failed: RequestFailed) -> bool:
        """Whether the attempt was one at a destination, on the way there. Then its stream goes on at its source."""
        move = self._on_their_way.get(failed.request_id)
        if move is None:
            return False
        self._take_back(move)
        self._cluster.tell(MigrationFailed(move.migration_id, failed.reason))
        return True

    def forget(self, request_id: RequestId) -> bool:
        """The request ends. Whether it was on its way."""
        return self._on_their_way.pop(request_id, None) is not None

    def _begin(self, command: Migrate) -> None:
        why_not = self._obstacle(command)
        if why_not is None:
            self._begun[command.migration_id] = command
            self._cluster.tell(RoomReserved(command.migration_id))
        else:
            self._cluster.tell(MigrationFailed(command.migration_id, why_not))

    def _obstacle(self, command: Migrate) -> str | None:
        flight = self._cluster.flights.get(command.request_id)
        if command.way != Way.REPLAY:
            return f"this host moves by replay only, not by {command.way}"
        if flight is None or flight.attempt is None or flight.attempt.is_over:
            return "the request is not under way"
        if flight.attempt.instance_id != command.source:
            return f"the request is at {flight.attempt.instance_id}"
        resumption = flight.resumption
        if resumption is None or resumption.has_finished or resumption.num_output_tokens is None:
            return (resumption and resumption.why_not) or "the tokens of the request are not known, or it has ended"
        if not self._cluster.can_resume(command.destination):
            return f"{command.destination} is not well, or does not go on from token ids"
        return None

    def _hand_over(self, command: HandOver) -> None:
        cluster = self._cluster
        move = self._begun.get(command.migration_id)
        why_not = "the migration is over" if move is None else self._obstacle(move)
        if move is None or why_not is not None:
            cluster.tell(MigrationFailed(command.migration_id, why_not or "no reason given"))
            return
        flight = cluster.flights[command.request_id]
        assert flight.attempt is not None
        flight.attempt.over()
        cluster.engines[move.source].abort(move.request_id)
        self._on_their_way[move.request_id] = move

        def arrived(gap_seconds: float) -> None:
            self._on_their_way.pop(move.request_id, None)
            cluster.tell(HandedOver(move.migration_id, seconds(gap_seconds)))

        cluster.go_on(flight, move.destination, on_first=arrived)

    def _take_back(self, move: Migrate) -> None:
        """Stop at the destination, and go on at the source."""
        cluster = self._cluster
        del self._on_their_way[move.request_id]
        flight = cluster.flights[move.request_id]
        assert flight.attempt is not None
        flight.attempt.over()
        cluster.engines[move.destination].abort(move.request_id)
        if move.source in cluster.statuses:
            cluster.go_on(flight, move.source)
        else:
            num_tokens = None if flight.resumption is None else flight.resumption.num_output_tokens
            reason = "the instance was lost while the request was on its way from it"
            cluster.tell(RequestFailed(move.request_id, move.source, reason, num_output_tokens=num_tokens))
