"""A plain model of moves and fail-over, beside a cluster machine whose host keeps to nothing: facts about migrations
come in any order, late, twice and about migrations that never were."""

from collections import Counter

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from rota.base.instant import Duration, Instant, to_seconds
from rota.serving.api import Capability, Move, QueueRules
from rota.serving.cluster.machine import ClusterMachine
from rota.serving.cluster.migration import MigrationLimits
from rota.serving.model.commands import (
    Abort,
    AbortMigration,
    Commit,
    CopyOut,
    Dispatch,
    Fail,
    HandOver,
    Hold,
    Migrate,
    Reject,
    Way,
)
from rota.serving.model.events import (
    ClientLeft,
    CopyCaughtUp,
    CopyStarted,
    FirstTokenSeen,
    HandedOver,
    InstanceDraining,
    InstanceLost,
    InstanceStarted,
    MigrationFailed,
    RequestArrived,
    RequestFailed,
    RequestFinished,
    RoomReserved,
)
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.model.request import Request, RequestId
from rota.serving.policies.admission.bounded_queue import BoundedQueue
from rota.serving.policies.dispatch.least_outstanding_tokens import LeastOutstandingTokens

INSTANCES = tuple(InstanceId(f"i{number}") for number in range(4))
REPLAY, HAND_OVER, COPY = Capability.RESUME_FROM_TOKENS, Capability.HAND_OVER_KV, Capability.COPY_KV
KINDS = {"copies": {REPLAY, HAND_OVER, COPY}, "hands over": {REPLAY, HAND_OVER}, "plain": set()}
BLOCKS = 20
LARGEST = BLOCKS * 16 - 1
MAX_TOKENS = 8
INTERVAL, HOLD, PATIENCE = 50, 400, 2_000
TIMEOUTS = {"proposed": 100, "reserved": 110, "copying": 120, "handover": 130}
MAX_MIGRATIONS, MAX_RESUMPTIONS, MAX_RESUMING, MAX_ATTEMPTS = 2, 2, 2, 2
LIMITS = MigrationLimits(MAX_MIGRATIONS, 0, *(Duration(timeout) for timeout in TIMEOUTS.values()))
NEXT = {
    ("proposed", RoomReserved): ("reserved", CopyOut),
    ("reserved", CopyStarted): ("copying", None),
    ("copying", CopyCaughtUp): ("handover", HandOver),
    ("handover", HandedOver): ("committed", Commit),
}
instance_ids = st.sampled_from(INSTANCES)


class Wishes:
    requires = frozenset()
    interval_seconds = INTERVAL / 10**9

    def __init__(self):
        self.wanted = []

    def plan(self, cluster, moving):
        shown = {view.id for view in cluster.instances}
        return [move for move in self.wanted if {move.source, move.destination} <= shown]


class Known:
    """What the model knows of one request."""

    def __init__(self, request):
        self.request = request
        self.owner = None
        self.is_running = False
        self.num_output_tokens = 0
        self.num_resumptions = 0
        self.num_attempts = 0
        self.held_until = None

    @property
    def is_resuming(self):
        return self.num_resumptions > 0 and self.owner is not None and not self.is_running

    @property
    def num_tokens(self):
        return self.request.num_prompt_tokens + self.num_output_tokens


class Moving:
    """What the model knows of one open migration."""

    def __init__(self, command, now):
        self.command = command
        self.state = "proposed"
        self.since = now


class MigrationRules(RuleBasedStateMachine):
    @initialize(kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=2, max_size=4), num_requests=st.integers(0, 8))
    def begin(self, kinds, num_requests):
        self.wishes = Wishes()
        self.machine = ClusterMachine(
            LeastOutstandingTokens(),
            BoundedQueue(),
            max_attempts=MAX_ATTEMPTS,
            queue=QueueRules(timeout_seconds=to_seconds(HOLD)),
            migration=self.wishes,
            migration_limits=LIMITS,
            max_resumptions=MAX_RESUMPTIONS,
            max_resuming_per_instance=MAX_RESUMING,
            patience=Duration(PATIENCE),
        )
        self.now = self.progressed_at = Instant(10**9)
        self.num_ids = 0
        self.open = {}
        self.states = {}
        self.kinds = {}
        self.moving = {}
        self.seen = Counter()
        for instance_id, kind in zip(INSTANCES, kinds, strict=False):
            self.instance_starts(instance_id, kind)
        for number in range(num_requests):
            self.requests_come_and_run(1, 10 * number + 1, number % 2, True)

    # --- requests -----------------------------------------------------------------------------------------------------

    @rule(
        num=st.integers(1, 4), num_prompt_tokens=st.integers(1, 60), priority=st.integers(0, 1), movable=st.booleans()
    )
    def requests_come_and_run(self, num, num_prompt_tokens, priority, movable):
        for number in range(num):
            self.num_ids += 1
            request = Request(
                RequestId(f"r{self.num_ids:04}"),
                self.now,
                num_prompt_tokens,
                MAX_TOKENS,
                priority=priority,
                movable=movable or number > 0,
            )
            self.open[request.id] = known = Known(request)
            self.feed(RequestArrived(request))
            if known.owner is not None and (number > 0 or num == 1):
                self.token_seen(known.request.id, known.owner)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), instance_id=instance_ids)
    def first_token(self, data, instance_id):
        request_id = self.some_request(data)
        self.token_seen(request_id, self.owner_or(data, request_id, instance_id))

    def token_seen(self, request_id, instance_id):
        known = self.open[request_id]
        if known.owner == instance_id:
            known.is_running = True
        self.feed(FirstTokenSeen(request_id, instance_id))

    @precondition(lambda self: self.open)
    @rule(
        data=st.data(),
        instance_id=instance_ids,
        end=st.sampled_from(["finishes", "leaves", "fails", "fails"]),
        num_more=st.sampled_from([None, 0, 1, 3]),
    )
    def a_request_ends_or_fails(self, data, instance_id, end, num_more):
        request_id = self.some_request(data)
        known = self.open[request_id]
        instance_id = self.owner_or(data, request_id, instance_id)
        if end == "fails":
            self.fails(request_id, instance_id, num_more)
        elif end == "finishes":
            if known.owner == instance_id:
                del self.open[request_id]
            self.feed(RequestFinished(request_id, instance_id, 5))
        else:
            del self.open[request_id]
            commands = self.feed(ClientLeft(request_id))
            aborted_at = [command.instance_id for command in commands if isinstance(command, Abort)]
            assert aborted_at == ([] if known.owner is None else [known.owner])

    def fails(self, request_id, instance_id, num_more):
        known = self.open[request_id]
        num_tokens = None if num_more is None else known.num_output_tokens + num_more
        was_owner, was_running, num_attempts = known.owner == instance_id, known.is_running, known.num_attempts
        if was_owner:
            known.owner, known.is_running = None, False
            if was_running:
                known.num_resumptions += 1
            known.num_output_tokens = max(known.num_output_tokens, num_tokens or 0)
        commands = self.feed(RequestFailed(request_id, instance_id, "broken pipe", True, num_tokens))
        if not was_owner:
            assert not commands
            return
        if was_running:
            goes_on = num_tokens is not None and known.request.movable and known.num_resumptions <= MAX_RESUMPTIONS
        else:
            goes_on = num_attempts - known.num_resumptions < MAX_ATTEMPTS
        assert (request_id in self.open) == goes_on
        about = [command for command in commands if command.request_id == request_id]
        assert isinstance(about[-1], Dispatch | Hold if goes_on else Fail)

    # --- instances ----------------------------------------------------------------------------------------------------

    @rule(instance_id=instance_ids, kind=st.sampled_from(sorted(KINDS)))
    def instance_starts(self, instance_id, kind):
        self.states[instance_id] = "ready"
        self.kinds[instance_id] = KINDS[kind]
        limits = InstanceLimits(num_blocks=BLOCKS, block_size=16)
        self.feed(InstanceStarted(InstanceSpec(instance_id, limits, capabilities=frozenset(KINDS[kind]))))
        assert not [each for each in self.moving.values() if instance_id in self.sides(each)]

    @precondition(lambda self: self.num_ids % 3 == 0)
    @rule(instance_id=instance_ids, reported=st.integers(0, 3))
    def instance_is_lost(self, instance_id, reported):
        if instance_id in self.states:
            self.states[instance_id] = "lost"
        self.feed(InstanceLost(instance_id, "killed"))
        assert not [each for each in self.moving.values() if instance_id in self.sides(each)]
        lost = [known.request.id for known in self.open.values() if known.owner == instance_id]
        for request_id in lost[:reported]:
            self.fails(request_id, instance_id, 1)

    @precondition(lambda self: self.num_ids % 4 == 0)
    @rule(num_arrivals=st.integers(0, 2))
    def an_outage(self, num_arrivals):
        """Everything is lost, somebody arrives meanwhile, and one instance comes back."""
        for instance_id in list(self.states):
            self.instance_is_lost(instance_id, 3)
        self.requests_come_and_run(num_arrivals, 20, 0, True)
        self.instance_starts(INSTANCES[0], "copies")

    @precondition(lambda self: self.num_ids % 3 == 1)
    @rule(instance_id=instance_ids)
    def instance_drains(self, instance_id):
        if self.states.get(instance_id) == "ready":
            self.states[instance_id] = "draining"
        self.feed(InstanceDraining(instance_id))

    # --- migrations ---------------------------------------------------------------------------------------------------

    @rule(data=st.data(), wished=st.lists(st.tuples(instance_ids, instance_ids, st.integers(0, 4)), max_size=4))
    def a_round(self, data, wished):
        """The policy wants moves: most of such as run, from where they run, and some of no sense at all."""
        running = [known for known in self.open.values() if known.is_running]
        moves = []
        for source, destination, sense in wished:
            request_id = data.draw(st.sampled_from([*self.open, RequestId("nobody")]))
            if sense and running:
                known = data.draw(st.sampled_from(running))
                request_id, source = known.request.id, known.owner
            moves.append(Move(request_id, source, destination, "why not"))
        self.wishes.wanted = moves
        commands = self.pass_time(INTERVAL)
        self.wishes.wanted = []
        assert len([command for command in commands if isinstance(command, Migrate)]) <= 2 * len(moves)

    @precondition(lambda self: self.moving)
    @rule(data=st.data(), num_steps=st.sampled_from([1, 2, 4, 4]))
    def the_host_says_what_it_owes(self, data, num_steps):
        """The next things that an open migration waits for."""
        number = data.draw(st.sampled_from(sorted(self.moving)))
        for _ in range(num_steps):
            if number in self.moving:
                state = self.moving[number].state
                self.say(number, next(kind for (where, kind) in NEXT if where == state))

    @precondition(lambda self: self.seen["Migrate"])
    @rule(
        data=st.data(),
        kind=st.sampled_from([RoomReserved, CopyStarted, CopyCaughtUp, HandedOver, MigrationFailed]),
        times=st.integers(1, 2),
    )
    def the_host_says_anything(self, data, kind, times):
        number = data.draw(st.sampled_from([*self.moving, *range(1, self.seen["Migrate"] + 2)]))
        for _ in range(times):
            self.say(number, kind)

    def say(self, number, kind):
        each = self.moving.get(number)
        extra = {HandedOver: (Duration(3), 10), MigrationFailed: ("no room",)}.get(kind, ())
        event = kind(number, *extra)
        if each is not None and kind is MigrationFailed:
            assert [type(command) for command in self.feed(event)] == [AbortMigration]
            return
        state, order = (None, None) if each is None else NEXT.get((each.state, kind), (None, None))
        if state == "committed":
            self.open[each.command.request_id].owner = each.command.destination
            del self.moving[number]
        elif state is not None:
            each.state, each.since = state, self.now
        commands = self.feed(event)
        assert [type(command) for command in commands] == ([] if order is None else [order])
        assert all(
            (command.migration_id, command.request_id) == (number, each.command.request_id) for command in commands
        )

    @rule(passed=st.sampled_from([1, 7, INTERVAL, 120, 600]))
    def time_passes(self, passed):
        self.pass_time(passed)

    def pass_time(self, passed):
        until = Instant(self.now + passed)
        told = []
        while (deadline := self.machine.next_deadline()) is not None and deadline <= until:
            self.now = deadline
            commands = self.machine.expire(deadline)
            following = self.machine.next_deadline()
            assert following is None or following > deadline, "a deadline in the past would be armed for ever"
            self.obey(commands)
            self.forget_instances()
            self.every_state_is_left_in_time()
            told += commands
        self.now = until
        return told

    # --- the model ----------------------------------------------------------------------------------------------------

    def feed(self, event):
        if isinstance(
            event,
            RequestArrived
            | FirstTokenSeen
            | RequestFinished
            | RequestFailed
            | ClientLeft
            | InstanceStarted
            | InstanceLost
            | InstanceDraining,
        ):
            self.progressed_at = self.now
        commands = self.machine.handle(event, self.now)
        self.obey(commands)
        self.forget_instances()
        return commands

    def obey(self, commands):
        """Apply what the machine ordered; every order must be one that the model allows."""
        came_back = []
        for command in commands:
            self.seen[type(command).__name__] += 1
            match command:
                case Dispatch():
                    known = self.open[command.request_id]
                    assert known.owner is None, "two owners"
                    assert not self.moves_of(command.request_id), "given up only after it was dispatched"
                    assert command.num_output_tokens == known.num_output_tokens, "tokens lost or doubled"
                    assert command.instance_id in self.places(known)
                    if known.held_until is not None:
                        came_back.append((known.request.priority, not known.num_resumptions))
                    known.owner, known.held_until = command.instance_id, None
                    known.num_attempts += 1
                    assert known.num_attempts <= MAX_ATTEMPTS + MAX_RESUMPTIONS
                    assert known.num_resumptions <= MAX_RESUMPTIONS
                case Hold():
                    assert self.open[command.request_id].owner is None
                    self.open[command.request_id].held_until = self.now + HOLD
                case Reject() | Fail():
                    assert not self.moves_of(command.request_id)
                    del self.open[command.request_id]
                case Abort():
                    assert command.request_id not in self.open
                    assert not self.moves_of(command.request_id), "the end of the request came before that of its move"
                case Migrate():
                    self.begins(command)
                case AbortMigration():
                    assert command.reason
                    assert self.moving.pop(command.migration_id).command.request_id == command.request_id
        assert came_back == sorted(came_back), "held requests go by class, those who come back first"

    def begins(self, command):
        known = self.open[command.request_id]
        assert (known.owner, known.is_running, known.request.movable) == (command.source, True, True)
        assert not self.moves_of(command.request_id), "it moves already"
        assert self.states[command.destination] == "ready"
        assert command.source != command.destination
        both = self.kinds[command.source] & self.kinds[command.destination]
        way = Way.COPY if COPY in both else Way.HAND_OFF if HAND_OVER in both else Way.REPLAY
        assert command.way == way
        assert way != Way.REPLAY or REPLAY in self.kinds[command.destination]
        assert command.migration_id == self.seen["Migrate"], "an id is used once"
        self.moving[command.migration_id] = Moving(command, self.now)

    def forget_instances(self):
        owners = {known.owner for known in self.open.values()}
        for instance_id, state in list(self.states.items()):
            if state != "ready" and instance_id not in owners:
                del self.states[instance_id]

    def places(self, known):
        """Where a request may go now."""
        ready = [each for each in sorted(self.states) if self.states[each] == "ready" and known.num_tokens <= LARGEST]
        if not known.num_resumptions:
            return ready
        waited_for = Counter(other.owner for other in self.open.values() if other.is_resuming)
        return [each for each in ready if REPLAY in self.kinds[each] and waited_for[each] < MAX_RESUMING]

    def moves_of(self, request_id):
        return [each for each in self.moving.values() if each.command.request_id == request_id]

    def sides(self, each):
        return each.command.source, each.command.destination

    def some_request(self, data):
        return data.draw(st.sampled_from(list(self.open)))

    def owner_or(self, data, request_id, instance_id):
        """Mostly the owner, at times whoever: a fact from an attempt that is over, or from a destination too early."""
        known = self.open[request_id]
        return known.owner if known.owner is not None and data.draw(st.integers(0, 3)) else instance_id

    # --- laws -------------------------------------------------------------------------------------------------------

    @invariant()
    def every_request_has_one_owner(self):
        if not hasattr(self, "machine"):
            return
        self.machine.check()
        assert list(self.machine.unfinished()) == list(self.open)
        for request_id, known in self.open.items():
            assert self.machine.owner(request_id) == known.owner
            assert (known.owner is None) == (known.held_until is not None)
        assert self.machine.instance_states() == self.states

    @invariant()
    def the_accounts_are_right(self):
        if not hasattr(self, "machine"):
            return
        sides = Counter(side for each in self.moving.values() for side in self.sides(each))
        for view in self.machine.instance_views():
            here = [known for known in self.open.values() if known.owner == view.id]
            assert view.num_outstanding_requests == len(here)
            assert view.num_outstanding_tokens == sum(1 if known.is_running else known.num_tokens for known in here)
            assert view.num_migrations == sides[view.id]
            assert sum(known.is_resuming for known in here) <= MAX_RESUMING
        for side in (0, 1):
            busiest = Counter(self.sides(each)[side] for each in self.moving.values())
            assert max(busiest.values(), default=0) <= MAX_MIGRATIONS
        counts = self.machine.migration_counts()
        assert counts.num_started == self.seen["Migrate"]
        assert counts.num_under_way == len(self.moving)
        assert counts.num_committed == self.seen["Commit"]
        assert sum(counts.num_aborted.values()) == self.seen["AbortMigration"]

    @invariant()
    def whoever_moves_runs_at_its_source_and_can_arrive(self):
        for each in getattr(self, "moving", {}).values():
            known = self.open[each.command.request_id]
            assert known.is_running
            assert known.owner == each.command.source
            assert self.states[each.command.destination] == "ready"

    @invariant()
    def every_state_is_left_in_time(self):
        if not hasattr(self, "machine"):
            return
        owed = [each.since + TIMEOUTS[each.state] for each in self.moving.values()]
        owed += [known.held_until for known in self.open.values() if known.held_until is not None]
        num_shown = sum(state in ("ready", "draining") for state in self.states.values())
        is_fresh = self.now - self.progressed_at + INTERVAL < PATIENCE
        if self.open and num_shown > 1 and is_fresh:
            owed.append(self.now + INTERVAL)
        deadline = self.machine.next_deadline()
        if owed:
            assert deadline is not None
            assert deadline <= min(owed)
        if not self.open:
            assert deadline is None, "nothing is left to wait for"

    @invariant()
    def nobody_who_comes_back_is_held_in_vain(self):
        for known in getattr(self, "open", {}).values():
            if known.held_until is not None:
                assert not self.places(known)

    def teardown(self):
        """Left alone, the machine comes to rest: every migration and every hold ends, and so does the asking."""
        self.pass_time(10 * PATIENCE)
        assert not self.moving
        assert not [known for known in self.open.values() if known.owner is None]
        assert self.machine.next_deadline() is None
        for request_id, known in list(self.open.items()):
            del self.open[request_id]
            self.feed(RequestFinished(request_id, known.owner, 5))
        assert not self.machine.unfinished()
        self.the_accounts_are_right()
