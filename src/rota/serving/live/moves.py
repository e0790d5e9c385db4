"""Carries migrations out, in the two ways that there are between live engines.

* **Hand-off.** The source is told to let go of the request (`letting_go`), and the destination pulls its blocks.
* **Replay.** The stream stops at its source after the last event that its client got, and the destination computes the
  tokens anew.

Nothing is copied ahead, so room is said to be there, and the copy to be ahead, at once. From the moment at which the
source has stopped to the first token that the destination brings, the stream is on its way: what fails then fails the
migration, and the stream goes on at its source, by replay (where much of it is cached still).
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from rota.base.instant import Duration, seconds
from rota.serving.engines.engine import LetsGo
from rota.serving.engines.vllm.tickets import Ticket
from rota.serving.live.attempt import FollowedAttempt
from rota.serving.live.letting_go import LettingGo
from rota.serving.model.commands import AbortMigration, Commit, CopyOut, HandOver, Migrate, MoveRefused, Way
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
    from rota.serving.live.attempt import Flight
    from rota.serving.live.cluster import LiveCluster


class Outcome(msgspec.Struct, frozen=True):
    """What came of a migration."""

    move: Migrate
    is_committed: bool
    reason: str = ""
    """Why it was given up."""
    downtime: Duration = Duration(0)
    num_bytes: int = 0


Heard = Callable[[Outcome | str], None]
"""Told once what came of a move that was asked for; a text says why it was not begun."""


class Moves:
    """The migrations under way of one live cluster."""

    def __init__(self, cluster: "LiveCluster") -> None:
        self.on_outcome: Callable[[Outcome], None] = lambda outcome: None
        """Told of every migration that was begun, when it is over."""
        self._cluster = cluster
        self._begun: dict[int, Migrate] = {}
        self._letting_go: dict[RequestId, LettingGo] = {}
        self._on_their_way: dict[RequestId, Migrate] = {}
        self._handed_over: dict[int, HandedOver] = {}
        self._asked: dict[RequestId, Heard] = {}
        self._heard_by: dict[int, Heard] = {}

    def expect(self, request_id: RequestId, heard: Heard) -> None:
        """The machine is about to be asked to move a request; `heard` is told what comes of it."""
        self._asked[request_id] = heard

    def refused(self, request_id: RequestId, reason: str) -> None:
        """What was asked for is not begun."""
        heard = self._asked.pop(request_id, None)
        if heard is not None:
            heard(reason)

    def carry_out(self, command: Migrate | MoveRefused | CopyOut | HandOver | Commit | AbortMigration) -> None:
        """Do what the machine orders."""
        if isinstance(command, Migrate):
            self._begin(command)
        elif isinstance(command, MoveRefused):
            self.refused(command.request_id, command.reason)
        elif isinstance(command, CopyOut):
            self._cluster.tell(CopyStarted(command.migration_id))
            self._cluster.tell(CopyCaughtUp(command.migration_id))
        elif isinstance(command, HandOver):
            self._hand_over(command)
        else:
            self._end(command)

    def attempt_failed(self, failed: RequestFailed) -> bool:
        """Whether the attempt was one at a destination, on the way there. Then its stream goes on at its source."""
        move = self._on_their_way.get(failed.request_id)
        if move is None:
            self._forget_letting_go(failed.request_id)
            return False
        self._take_back(move)
        self._cluster.tell(MigrationFailed(move.migration_id, failed.reason))
        return True

    def forget(self, request_id: RequestId) -> bool:
        """The request ends. Whether it was on its way."""
        self._forget_letting_go(request_id)
        return self._on_their_way.pop(request_id, None) is not None

    def _give_up(self, request_id: RequestId, reason: str) -> None:
        letting_go = self._letting_go.get(request_id)
        if letting_go is not None and letting_go.attempt.is_over:
            self._forget_letting_go(request_id)
        elif letting_go is not None:
            letting_go.give_up(reason)

    def _forget_letting_go(self, request_id: RequestId) -> None:
        letting_go = self._letting_go.pop(request_id, None)
        if letting_go is not None:
            letting_go.forget()

    # --- begin and end -----------------------------------------------------------------------------------------------

    def _begin(self, command: Migrate) -> None:
        self._begun[command.migration_id] = command
        heard = self._asked.pop(command.request_id, None)
        if heard is not None:
            self._heard_by[command.migration_id] = heard
        why_not = self._obstacle(command)
        if why_not is None:
            self._cluster.tell(RoomReserved(command.migration_id))
        else:
            self._cluster.tell(MigrationFailed(command.migration_id, why_not))

    def _end(self, command: Commit | AbortMigration) -> None:
        move = self._begun.pop(command.migration_id, None)
        handed_over = self._handed_over.pop(command.migration_id, None)
        heard = self._heard_by.pop(command.migration_id, None)
        if move is None:
            return
        if isinstance(command, Commit):
            assert handed_over is not None, "it is the answer to it"
            outcome = Outcome(move, True, "", handed_over.downtime, handed_over.num_bytes)
        else:
            outcome = Outcome(move, False, command.reason)
            if self._on_their_way.get(move.request_id) is move:
                self._take_back(move)
            else:
                self._give_up(move.request_id, command.reason)
        self.on_outcome(outcome)
        if heard is not None:
            heard(outcome)

    def _obstacle(self, command: Migrate) -> str | None:
        cluster = self._cluster
        flight = cluster.flights.get(command.request_id)
        if flight is None or flight.attempt is None or flight.attempt.is_over:
            return "the request is not under way"
        if flight.attempt.instance_id != command.source:
            return f"the request is at {flight.attempt.instance_id}"
        resumption = flight.resumption
        if resumption is None or resumption.has_finished or resumption.num_output_tokens is None:
            return (resumption and resumption.why_not) or "the tokens of the request are not known, or it has ended"
        if command.request_id in self._letting_go:
            return "an earlier hand-off of it is not over"
        if not cluster.can_resume(command.destination):
            return f"{command.destination} is not well, or does not go on from token ids"
        if command.way == Way.HAND_OFF and not isinstance(cluster.engines[command.source], LetsGo):
            return f"{command.source} cannot be told to let go of a request"
        return f"live engines do not move requests by {command.way}" if command.way == Way.COPY else None

    # --- hand over ---------------------------------------------------------------------------------------------------

    def _hand_over(self, command: HandOver) -> None:
        move = self._begun.get(command.migration_id)
        why_not = "the migration is over" if move is None else self._obstacle(move)
        if move is None or why_not is not None:
            self._cluster.tell(MigrationFailed(command.migration_id, why_not or "no reason given"))
            return
        flight = self._cluster.flights[command.request_id]
        if move.way == Way.HAND_OFF:
            self._let_go(move, flight)
            return
        assert flight.attempt is not None
        flight.attempt.over()
        self._cluster.engines[move.source].abort(move.request_id)
        self._send_on(move, flight, asyncio.get_running_loop().time())

    def _let_go(self, move: Migrate, flight: "Flight") -> None:
        """Have the source let go; what it says decides where the request goes on."""
        attempt, request_id = flight.attempt, move.request_id
        engine = self._cluster.engines[move.source]
        assert isinstance(attempt, FollowedAttempt)
        assert isinstance(engine, LetsGo)

        def left(ticket: Ticket, stopped_at: float) -> None:
            del self._letting_go[request_id]
            attempt.settle(is_inner=True)
            if not attempt.is_over:
                attempt.over()
                self._send_on(move, flight, stopped_at, ticket)

        def stays(reason: str) -> None:
            del self._letting_go[request_id]
            self._cluster.tell(MigrationFailed(move.migration_id, reason))
            attempt.settle(is_inner=False)

        def cut(reason: str) -> None:
            # Its source stopped it, or does not say: from here on it is told anew what to do.
            del self._letting_go[request_id]
            attempt.settle(is_inner=True)
            if not attempt.is_over:
                attempt.over()
                self._cluster.engines[move.source].abort(request_id)
                self._go_on_at_source(move)
            self._cluster.tell(MigrationFailed(move.migration_id, reason))

        self._letting_go[request_id] = letting_go = LettingGo(attempt, on_left=left, on_stays=stays, on_cut=cut)
        letting_go.begin(engine, request_id)

    def _send_on(self, move: Migrate, flight: "Flight", stopped_at: float, ticket: Ticket | None = None) -> None:
        """The stream has stopped at its source: have the destination go on."""
        self._on_their_way[move.request_id] = move
        resumption = flight.resumption
        num_bytes = 0 if ticket is None or resumption is None else ticket.num_bytes(resumption.num_tokens)

        def arrived(gap_seconds: float) -> None:
            self._on_their_way.pop(move.request_id, None)
            downtime = seconds(asyncio.get_running_loop().time() - stopped_at)
            said = HandedOver(move.migration_id, downtime, num_bytes)
            if move.migration_id in self._begun:
                self._handed_over[move.migration_id] = said
            self._cluster.tell(said)

        self._cluster.go_on(flight, move.destination, on_first=arrived, ticket=ticket)

    # --- go on at the source -----------------------------------------------------------------------------------------

    def _take_back(self, move: Migrate) -> None:
        """Stop at the destination, and go on at the source."""
        del self._on_their_way[move.request_id]
        attempt = self._cluster.flights[move.request_id].attempt
        assert attempt is not None
        attempt.over()
        self._cluster.engines[move.destination].abort(move.request_id)
        self._go_on_at_source(move)

    def _go_on_at_source(self, move: Migrate) -> None:
        cluster = self._cluster
        flight = cluster.flights[move.request_id]
        if move.source in cluster.statuses:
            cluster.go_on(flight, move.source)
        else:
            num_tokens = None if flight.resumption is None else flight.resumption.num_output_tokens
            reason = "the instance was lost while the request was on its way from it"
            cluster.tell(RequestFailed(move.request_id, move.source, reason, num_output_tokens=num_tokens))
