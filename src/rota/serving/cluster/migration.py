"""Requests on their way from one instance to another: what each waits for, until when, and who owns it meanwhile.

The machine orders, the host carries out and says what came of it:

| State | The machine ordered | The host owes | Owner |
|---|---|---|---|
| proposed | `Migrate` | `RoomReserved` | source |
| reserved | `CopyOut` | `CopyStarted` | source |
| copying | | `CopyCaughtUp` | source |
| handover | `HandOver` | `HandedOver` | source |
| committed | `Commit` | nothing | destination |
| aborted | `AbortMigration` | nothing | source |

In each of the first four `MigrationFailed` will do as well, and past the deadline of the state the machine gives the
migration up. What the host says of a migration that is over, or what it said before, is ignored.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import takewhile
from types import MappingProxyType

from rota.base.errors import ConfigError, LawBroken
from rota.base.instant import Duration, Instant, after, seconds, to_seconds
from rota.serving.api import Move
from rota.serving.cluster.instances import InstanceBook
from rota.serving.cluster.ledger import InstanceLedger
from rota.serving.cluster.lifecycles import MIGRATION_LIFECYCLE, InstanceState, MigrationState, RequestState
from rota.serving.cluster.tracked import TrackedRequest
from rota.serving.model.capabilities import Capability
from rota.serving.model.commands import (
    AbortMigration,
    ClusterCommand,
    Commit,
    CopyOut,
    HandOver,
    Migrate,
    MoveRefused,
    Way,
)
from rota.serving.model.events import CopyCaughtUp, CopyStarted, HandedOver, MigrationFailed, MoveAsked, RoomReserved
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import RequestId

MigrationEvent = RoomReserved | CopyStarted | CopyCaughtUp | HandedOver | MigrationFailed


class Dropped(StrEnum):
    """Why a move that a policy wants is not begun."""

    NOT_RUNNING = "not_running"
    """It does not run at the source: it waits, has ended, or went elsewhere."""
    MOVING = "moving"
    """It is on its way already."""
    PINNED = "pinned"
    """It holds what does not travel (`Request.movable`)."""
    SAME_INSTANCE = "same_instance"
    NOT_READY = "not_ready"
    """The destination takes no requests."""
    TOO_LARGE = "too_large"
    """The destination could not take it as far as the source can."""
    SOURCE_BUSY = "source_busy"
    """As many as may be are under way from the source."""
    DESTINATION_BUSY = "destination_busy"
    """As many as may be are under way to the destination."""
    NO_WAY = "no_way"
    """The two engines have no way in common."""


class Cause(StrEnum):
    """Why a migration was given up."""

    HOST_FAILED = "host_failed"
    """`MigrationFailed`: no room, preempted, a broken link."""
    TIMEOUT = "timeout"
    REQUEST_ENDED = "request_ended"
    REQUEST_FAILED = "request_failed"
    CLIENT_LEFT = "client_left"
    SOURCE_GONE = "source_gone"
    DESTINATION_GONE = "destination_gone"


@dataclass(frozen=True, slots=True)
class MigrationLimits:
    """How many migrations may be under way, and how long each state may last.

    Published, in the code of Llumnix: one migration at a time for each instance, and 10 s for one that waits for room.
    The other times were never published.
    """

    max_migrations: int = 1
    """Under way from an instance, and so many under way to it."""
    replay_max_tokens: int = 0
    """A request with fewer tokens is replayed where its destination can, although its blocks could be had."""
    reserve_timeout: Duration = seconds(10)
    copy_start_timeout: Duration = seconds(10)
    copy_timeout: Duration = seconds(60)
    hand_over_timeout: Duration = seconds(10)
    max_after_prefill: int = 256
    """Like `max_migrations`, for requests that decode elsewhere than where their prompt was computed."""

    def __post_init__(self) -> None:
        if self.max_migrations < 1:
            raise ConfigError(f"max_migrations must be at least 1, not {self.max_migrations}")
        if self.max_after_prefill < 1:
            raise ConfigError(f"max_after_prefill must be at least 1, not {self.max_after_prefill}")

    def timeout(self, state: str) -> Duration:
        """How long a migration may be in a state."""
        return {
            MigrationState.PROPOSED: self.reserve_timeout,
            MigrationState.RESERVED: self.copy_start_timeout,
            MigrationState.COPYING: self.copy_timeout,
            MigrationState.HANDOVER: self.hand_over_timeout,
        }[MigrationState(state)]


@dataclass(frozen=True, slots=True)
class MigrationCounts:
    """What became of all migrations since the start, and of the moves that were not begun."""

    num_started: int
    num_under_way: int
    num_committed: int
    num_aborted: Mapping[Cause, int]
    num_dropped: Mapping[Dropped, int]
    downtime: Duration
    """Of those committed, added up."""
    num_bytes: int
    """Copied for those committed."""


@dataclass(slots=True)
class Migration:
    """One migration under way."""

    id: int
    tracked: TrackedRequest
    source: InstanceLedger
    destination: InstanceLedger
    way: Way
    deadline_at: Instant
    state: str = field(default=str(MIGRATION_LIFECYCLE.initial))

    @property
    def request_id(self) -> RequestId:
        return self.tracked.request.id


class MigrationBook:
    """The open migrations: at most one a request, a few an instance, each in a state with a deadline.

    Changes the number of migrations of both ledgers; on `HandedOver` it moves the request from one to the other.
    """

    def __init__(self, instances: InstanceBook, limits: MigrationLimits) -> None:
        self._instances = instances
        self._limits = limits
        self._open: dict[int, Migration] = {}
        self._id_of: dict[RequestId, int] = {}
        # The open ones by state, in the order in which they came into it, which is that of their deadlines: a state may
        # last equally long for all.
        self._in_state = {state: dict[int, Migration]() for state in _OPEN_STATES}
        self._num_started = 0
        self._num_committed = 0
        self._num_aborted: Counter[Cause] = Counter()
        self._num_dropped: Counter[Dropped] = Counter()
        self._downtime = 0
        self._num_bytes = 0

    @property
    def moving(self) -> Set[RequestId]:
        """The requests that are on their way."""
        return self._id_of.keys()

    def __iter__(self) -> Iterator[Migration]:
        return iter(self._open.values())

    def counts(self) -> MigrationCounts:
        return MigrationCounts(
            num_started=self._num_started,
            num_under_way=len(self._open),
            num_committed=self._num_committed,
            num_aborted=MappingProxyType(dict(self._num_aborted)),
            num_dropped=MappingProxyType(dict(self._num_dropped)),
            downtime=Duration(self._downtime),
            num_bytes=self._num_bytes,
        )

    # --- begin -------------------------------------------------------------------------------------------------------

    def begin_asked(self, asked: MoveAsked, tracked: TrackedRequest | None, now: Instant) -> Migrate | MoveRefused:
        """Open the migration that somebody asked for, by the same rules as one that a policy wants."""
        source = tracked.instance_id if tracked is not None else None
        move = Move(asked.request_id, source or asked.destination, asked.destination, "asked for by hand")
        begun = self.begin(move, tracked, now, way=asked.way)
        return MoveRefused(asked.request_id, _WHY_DROPPED[begun]) if isinstance(begun, Dropped) else begun

    def begin(
        self, move: Move, tracked: TrackedRequest | None, now: Instant, *, way: Way | None = None
    ) -> Migrate | Dropped:
        """Open a migration, or count why not: what was seen of the request was late. `way` is the one that was asked
        for; None takes the best."""
        found = self._way_of(move, tracked, way)
        if isinstance(found, Dropped) or tracked is None:
            self._num_dropped[Dropped(found)] += 1
            return Dropped(found)
        return self._open_one(move, tracked, found, now)

    def begin_decode(self, move: Move, tracked: TrackedRequest, now: Instant) -> Migrate | Dropped:
        """Open the migration of a request that decodes elsewhere than where its prompt was computed, or count and say
        why not. It rests already, so its blocks are handed over at once rather than copied while it decodes; computing
        the prompt a second time would defeat the purpose, so it never goes by replay."""
        way = self._way_of(move, tracked, is_after_prefill=True)
        if isinstance(way, Dropped):
            self._num_dropped[way] += 1
            return way
        return self._open_one(move, tracked, way, now)

    def _open_one(self, move: Move, tracked: TrackedRequest, way: Way, now: Instant) -> Migrate:
        self._num_started += 1
        ledgers = self._instances.ledgers
        source, destination = ledgers[move.source], ledgers[move.destination]
        deadline_at = after(now, self._limits.reserve_timeout)
        migration = Migration(self._num_started, tracked, source, destination, way, deadline_at)
        self._open[migration.id] = self._in_state[migration.state][migration.id] = migration
        self._id_of[migration.request_id] = migration.id
        source.num_leaving += 1
        destination.num_coming += 1
        return Migrate(migration.id, migration.request_id, source.id, destination.id, way, move.reason)

    def _way_of(
        self, move: Move, tracked: TrackedRequest | None, way: Way | None = None, *, is_after_prefill: bool = False
    ) -> Way | Dropped:
        """How a request would get there, or why it may not, as things are now."""
        source = self._instances.ledgers.get(move.source)
        destination = self._instances.ledgers.get(move.destination)
        if tracked is None or tracked.state != RequestState.RUNNING or tracked.instance_id != move.source:
            return Dropped.NOT_RUNNING
        if destination is None or destination.state != InstanceState.READY:
            return Dropped.NOT_READY
        if source is None or source is destination:
            return Dropped.SAME_INSTANCE
        request = tracked.request
        if request.id in self._id_of:
            return Dropped.MOVING
        if not request.movable:
            return Dropped.PINNED
        # One that is as large as it may become at its source must fit, or it would end early at its destination.
        largest = min(request.num_prompt_tokens + request.max_tokens - 1, source.max_prompt_tokens)
        if largest > destination.max_prompt_tokens:
            return Dropped.TOO_LARGE
        most = self._limits.max_migrations if not is_after_prefill else self._limits.max_after_prefill
        if source.num_leaving >= most:
            return Dropped.SOURCE_BUSY
        if destination.num_coming >= most:
            return Dropped.DESTINATION_BUSY
        if is_after_prefill:
            both = source.spec.capabilities & destination.spec.capabilities
            able = (way for way, capability in _AFTER_PREFILL if capability in both)
            return next(able, Dropped.NO_WAY)
        if way is None:
            return self._common_way(tracked, source, destination)
        need, both = _NEEDS[way], source.spec.capabilities & destination.spec.capabilities
        return way if need in (destination.spec.capabilities if way == Way.REPLAY else both) else Dropped.NO_WAY

    def _common_way(
        self, tracked: TrackedRequest, source: InstanceLedger, destination: InstanceLedger
    ) -> Way | Dropped:
        """By what both engines can do: copy before hand-off before replay, and replay first for what is small."""
        can_replay = Capability.RESUME_FROM_TOKENS in destination.spec.capabilities
        both = source.spec.capabilities & destination.spec.capabilities
        num_tokens = max(tracked.num_tokens, source.num_tokens_reported(tracked.request.id))
        if can_replay and num_tokens < self._limits.replay_max_tokens:
            return Way.REPLAY
        if Capability.COPY_KV in both:
            return Way.COPY
        if Capability.HAND_OVER_KV in both:
            return Way.HAND_OFF
        return Way.REPLAY if can_replay else Dropped.NO_WAY

    # --- what the host says ------------------------------------------------------------------------------------------

    def take(self, event: MigrationEvent, now: Instant) -> tuple[ClusterCommand, ...]:
        """Go on with a migration; a fact that is late, doubled or out of its turn changes nothing."""
        migration = self._open.get(event.migration_id)
        if migration is None:
            return ()
        if isinstance(event, MigrationFailed):
            return (self._abort(migration, Cause.HOST_FAILED, event.reason or "no reason given"),)
        step = _STEP_OF[type(event)]
        if step not in MIGRATION_LIFECYCLE.transitions[migration.state]:
            return ()
        self._leave_state(migration, step)
        if isinstance(event, HandedOver):
            return (self._commit(migration, event),)
        migration.deadline_at = after(now, self._limits.timeout(migration.state))
        self._in_state[migration.state][migration.id] = migration
        if isinstance(event, RoomReserved):
            return (CopyOut(migration.id, migration.request_id),)
        if isinstance(event, CopyCaughtUp):
            return (HandOver(migration.id, migration.request_id),)
        return ()

    def _commit(self, migration: Migration, event: HandedOver) -> Commit:
        self._num_committed += 1
        self._downtime += event.downtime
        self._num_bytes += event.num_bytes
        # The ledgers change hands before the migration is closed, which may forget a source that drained.
        migration.source.credit(migration.tracked.request)
        self._instances.assign(migration.tracked, migration.destination.id)
        self._close(migration)
        return Commit(migration.id, migration.request_id)

    # --- give up -----------------------------------------------------------------------------------------------------

    def abort_of(self, request_id: RequestId, cause: Cause, reason: str) -> list[ClusterCommand]:
        """The request ends, or its attempt does: it moves no more. After a hand-over was ordered it may be at its
        destination by now; giving up the migration takes it back from there as well."""
        migration_id = self._id_of.get(request_id)
        return [] if migration_id is None else [self._abort(self._open[migration_id], cause, reason)]

    def abort_at(self, instance_id: InstanceId, reason: str, *, as_source: bool) -> list[ClusterCommand]:
        """Nothing comes to this instance any more and, unless it only drains, nothing leaves it by itself."""
        commands: list[ClusterCommand] = []
        for migration in list(self):
            if migration.destination.id == instance_id:
                commands.append(self._abort(migration, Cause.DESTINATION_GONE, reason))
            elif as_source and migration.source.id == instance_id:
                commands.append(self._abort(migration, Cause.SOURCE_GONE, reason))
        return commands

    def expire(self, now: Instant) -> list[ClusterCommand]:
        """Give up every migration whose state lasted too long."""
        overdue = [
            migration
            for waiting in self._in_state.values()
            for migration in takewhile(lambda each: each.deadline_at <= now, waiting.values())
        ]
        return [self._abort(migration, Cause.TIMEOUT, self._overdue(migration)) for migration in overdue]

    def next_deadline(self) -> Instant | None:
        if not self._open:
            return None
        return min(next(iter(waiting.values())).deadline_at for waiting in self._in_state.values() if waiting)

    def _overdue(self, migration: Migration) -> str:
        return f"{migration.state} for {to_seconds(self._limits.timeout(migration.state)):g} s"

    def _abort(self, migration: Migration, cause: Cause, reason: str) -> AbortMigration:
        self._leave_state(migration, "aborted")
        self._num_aborted[cause] += 1
        self._instances.unbook(migration.tracked)
        self._close(migration)
        return AbortMigration(migration.id, migration.request_id, reason)

    def _leave_state(self, migration: Migration, step: str) -> None:
        del self._in_state[migration.state][migration.id]
        migration.state = MIGRATION_LIFECYCLE.move(migration.state, step)

    def _close(self, migration: Migration) -> None:
        del self._open[migration.id]
        del self._id_of[migration.request_id]
        migration.source.num_leaving -= 1
        migration.destination.num_coming -= 1
        self._instances.forget_if_over(migration.source)
        self._instances.forget_if_over(migration.destination)

    # --- laws --------------------------------------------------------------------------------------------------------

    def check(self, requests: Mapping[RequestId, TrackedRequest]) -> None:
        """Laws 1 and 12: whoever moves runs at its source, once, and no instance is part of more than it may be."""
        for migration in self:
            tracked = requests.get(migration.request_id)
            if tracked is not migration.tracked or tracked.state != RequestState.RUNNING:
                raise LawBroken(f"law 1: migration {migration.id} moves {migration.request_id}, which does not run")
            if tracked.instance_id != migration.source.id:
                raise LawBroken(
                    f"law 1: migration {migration.id} moves {migration.request_id} from {migration.source.id}, "
                    f"but its owner is {tracked.instance_id}"
                )
            if self._id_of.get(migration.request_id) != migration.id:
                raise LawBroken(f"law 1: {migration.request_id} moves twice")
            if self._in_state[migration.state].get(migration.id) is not migration:
                raise LawBroken(f"law 6: migration {migration.id} is {migration.state}, without a deadline")
        if len(self._id_of) != len(self._open):
            raise LawBroken(f"law 1: {len(self._id_of)} requests move in {len(self._open)} migrations")
        self._check_instances(self._instances.ledgers.values())

    def _check_instances(self, ledgers: Iterable[InstanceLedger]) -> None:
        leaving = Counter(migration.source.id for migration in self)
        coming = Counter(migration.destination.id for migration in self)
        for ledger in ledgers:
            recount = leaving[ledger.id], coming[ledger.id]
            if (ledger.num_leaving, ledger.num_coming) != recount:
                raise LawBroken(f"law 12: {ledger.id} counts {ledger.num_migrations} migrations, there are {recount}")
            if max(recount) > max(self._limits.max_migrations, self._limits.max_after_prefill):
                raise LawBroken(f"law 12: {ledger.id} is part of {recount} migrations, more than may be")


_OPEN_STATES = [state for state in MIGRATION_LIFECYCLE.transitions if state not in MIGRATION_LIFECYCLE.final]
_AFTER_PREFILL = ((Way.HAND_OFF, Capability.HAND_OVER_KV), (Way.COPY, Capability.COPY_KV))
_STEP_OF: Mapping[type[MigrationEvent], str] = {
    RoomReserved: "reserved",
    CopyStarted: "copying",
    CopyCaughtUp: "caught_up",
    HandedOver: "handed_over",
}
_NEEDS = {
    Way.COPY: Capability.COPY_KV,
    Way.HAND_OFF: Capability.HAND_OVER_KV,
    Way.REPLAY: Capability.RESUME_FROM_TOKENS,
}
"""What both engines must be able to do; for a replay the destination alone."""
_WHY_DROPPED = {
    Dropped.NOT_RUNNING: "it does not run: it waits for its first token, or has ended",
    Dropped.MOVING: "it is on its way already",
    Dropped.PINNED: "it holds what does not travel",
    Dropped.SAME_INSTANCE: "it is there already",
    Dropped.NOT_READY: "the destination takes no requests",
    Dropped.TOO_LARGE: "the destination could not take it as far as its source can",
    Dropped.SOURCE_BUSY: "as many as may be are on their way from its source",
    Dropped.DESTINATION_BUSY: "as many as may be are on their way to the destination",
    Dropped.NO_WAY: "the two engines do not move requests so",
}
