"""Migrations and fail-over in the cluster machine, one sentence of the contract at a time."""

import pytest

from rota.base.errors import ConfigError, PolicyError
from rota.base.instant import Duration, Instant, milliseconds, seconds
from rota.serving.api import Capability, InstanceId, Move, QueueRules, Request, RequestId, SequenceReport
from rota.serving.cluster.lifecycles import MIGRATION_LIFECYCLE
from rota.serving.cluster.machine import ClusterMachine
from rota.serving.cluster.migration import Cause, Dropped, MigrationLimits
from rota.serving.cluster.tracked import TrackedRequest
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
    InstanceReported,
    InstanceStarted,
    MigrationFailed,
    RequestArrived,
    RequestFailed,
    RequestFinished,
    RoomReserved,
)
from rota.serving.model.instance import InstanceLimits, InstanceReport, InstanceSpec
from rota.serving.policies.admission.bounded_queue import BoundedQueue
from rota.serving.policies.dispatch.least_outstanding_tokens import LeastOutstandingTokens

A, B, C = InstanceId("a"), InstanceId("b"), InstanceId("c")
R = RequestId("r")
REPLAY, HAND_OVER, COPY = Capability.RESUME_FROM_TOKENS, Capability.HAND_OVER_KV, Capability.COPY_KV
ALL = frozenset({REPLAY, HAND_OVER, COPY})


class Wishes:
    """Answers each round with what the test put in `moves`."""

    requires = frozenset()
    interval_seconds = 0.1

    def __init__(self):
        self.moves = []
        self.rounds = []

    def plan(self, cluster, moving):
        draining = [view.id for view in cluster.instances if view.is_draining]
        self.rounds.append(([view.id for view in cluster.instances], draining, set(moving)))
        moves, self.moves = self.moves, []
        return moves


class Cluster:
    """A machine with a clock that ticks a millisecond an event, checked after each."""

    def __init__(self, *instance_ids, capabilities=None, **options):
        self.wishes = Wishes()
        options.setdefault("migration", self.wishes)
        self.machine = ClusterMachine(LeastOutstandingTokens(), BoundedQueue(), **options)
        self.now = Instant(0)
        for instance_id in instance_ids:
            self.start(instance_id, capabilities=(capabilities or {}).get(instance_id, ALL))

    def start(self, instance_id, *, num_blocks=100, capabilities=ALL):
        limits = InstanceLimits(num_blocks=num_blocks, max_model_len=1000)
        return self.feed(InstanceStarted(InstanceSpec(instance_id, limits, capabilities=capabilities)))

    def feed(self, event):
        self.now = Instant(self.now + milliseconds(1))
        commands = list(self.machine.handle(event, self.now))
        self.machine.check()
        return commands

    def arrive(self, request_id=R, num_prompt_tokens=100, priority=0, movable=True):
        request = Request(
            RequestId(request_id), self.now, num_prompt_tokens, max_tokens=50, priority=priority, movable=movable
        )
        return self.feed(RequestArrived(request))

    def run(self, request_id=R, **facts):
        """Have a request arrive and run; returns where."""
        (dispatch,) = self.arrive(request_id, **facts)
        assert not self.feed(FirstTokenSeen(RequestId(request_id), dispatch.instance_id))
        return dispatch.instance_id

    def expire(self):
        self.now = self.machine.next_deadline()
        commands = list(self.machine.expire(self.now))
        self.machine.check()
        return commands

    def move(self, *moves):
        """The commands of the next round, which asks for these moves."""
        self.wishes.moves = [Move(RequestId(i), source, destination, "why not") for i, source, destination in moves]
        return self.expire()

    def reach(self, state):
        """Bring the migration of `r` from a to b as far as `state`; returns its id."""
        (migrate,) = self.move((R, A, B))
        number = migrate.migration_id
        events = [RoomReserved(number), CopyStarted(number), CopyCaughtUp(number)]
        for event in events[: ["proposed", "reserved", "copying", "handover"].index(state)]:
            self.feed(event)
        return number


STATES = ["proposed", "reserved", "copying", "handover"]


def test_a_move_step_by_step():
    cluster = Cluster(A, B)
    assert cluster.run() == A
    assert cluster.move((R, A, B)) == [Migrate(1, R, A, B, Way.COPY, "why not")]
    views = {view.id: view for view in cluster.machine.instance_views()}
    assert (views[A].num_migrations, views[B].num_migrations) == (1, 1)
    assert cluster.feed(RoomReserved(1)) == [CopyOut(1, R)]
    assert cluster.feed(CopyStarted(1)) == []
    assert cluster.feed(CopyCaughtUp(1)) == [HandOver(1, R)]
    assert cluster.machine.owner(R) == A, "until the destination runs it"
    assert cluster.feed(HandedOver(1, Duration(5), 700)) == [Commit(1, R)]
    assert cluster.machine.owner(R) == B
    assert (views[A].num_outstanding_tokens, views[B].num_outstanding_tokens) == (0, 1)
    assert (views[A].num_migrations, views[B].num_migrations) == (0, 0)
    counts = cluster.machine.migration_counts()
    assert (counts.num_started, counts.num_committed, counts.downtime, counts.num_bytes) == (1, 1, 5, 700)
    assert cluster.feed(RequestFinished(R, A)) == [], "a fact about the attempt that left"
    cluster.feed(RequestFinished(R, B))
    assert not cluster.machine.unfinished()
    assert cluster.machine.next_deadline() is None


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("late", [RoomReserved(1), CopyStarted(1), CopyCaughtUp(1), HandedOver(1, Duration(0))])
def test_what_comes_out_of_turn_changes_nothing(state, late):
    cluster = Cluster(A, B)
    cluster.run()
    assert cluster.reach(state) == 1
    turn = STATES[[RoomReserved, CopyStarted, CopyCaughtUp, HandedOver].index(type(late))]
    commands = cluster.feed(late)
    assert bool(commands) == (turn == state and state != "reserved")
    assert cluster.machine.owner(R) == (B if turn == state == "handover" else A)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    ("event", "cause", "then"),
    [
        (MigrationFailed(1, "no room"), Cause.HOST_FAILED, []),
        (RequestFinished(R, A, 7), Cause.REQUEST_ENDED, []),
        (ClientLeft(R), Cause.CLIENT_LEFT, [Abort]),
        (RequestFailed(R, A, "it died"), Cause.REQUEST_FAILED, [Fail]),
        (RequestFailed(R, A, "it died", num_output_tokens=3), Cause.REQUEST_FAILED, [Dispatch]),
        (InstanceLost(A), Cause.SOURCE_GONE, []),
        (InstanceLost(B), Cause.DESTINATION_GONE, []),
        (InstanceDraining(B), Cause.DESTINATION_GONE, []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_comes_between_ends_the_move_first(state, event, cause, then):
    cluster = Cluster(A, B)
    cluster.run()
    number = cluster.reach(state)
    commands = cluster.feed(event)
    assert isinstance(commands[0], AbortMigration)
    assert (commands[0].migration_id, commands[0].request_id) == (number, R)
    assert commands[0].reason
    assert [type(command) for command in commands[1:]] == then
    assert dict(cluster.machine.migration_counts().num_aborted) == {cause: 1}
    for late in (RoomReserved(1), CopyStarted(1), CopyCaughtUp(1), HandedOver(1, Duration(0)), MigrationFailed(1, "x")):
        assert cluster.feed(late) == []
    assert cluster.machine.migration_counts().num_committed == 0


@pytest.mark.parametrize(("state", "timeout"), list(zip(STATES, [10, 11, 12, 13], strict=True)))
def test_every_state_is_left_in_time(state, timeout):
    limits = MigrationLimits(
        reserve_timeout=seconds(10),
        copy_start_timeout=seconds(11),
        copy_timeout=seconds(12),
        hand_over_timeout=seconds(13),
    )
    cluster = Cluster(A, B, migration_limits=limits)
    cluster.run()
    cluster.reach(state)
    began_at = cluster.now
    while not (commands := cluster.expire()):
        pass
    assert commands == [AbortMigration(1, R, f"{state} for {timeout} s")]
    assert cluster.now == began_at + seconds(timeout)
    assert cluster.machine.owner(R) == A
    assert dict(cluster.machine.migration_counts().num_aborted) == {Cause.TIMEOUT: 1}


def test_every_state_of_a_move_is_drawn():
    assert "handover --> committed: handed_over" in MIGRATION_LIFECYCLE.diagram()


def test_a_draining_instance_is_forgotten_when_the_last_has_left_it():
    cluster = Cluster(A, B)
    cluster.run()
    cluster.feed(InstanceDraining(A))
    cluster.reach("handover")
    assert cluster.wishes.rounds[-1] == ([A, B], [A], set())
    assert cluster.feed(HandedOver(1, Duration(0))) == [Commit(1, R)]
    assert cluster.machine.instance_states() == {B: "ready"}


# --- which moves are begun -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("move", "reason"),
    [
        (("nobody", A, B), Dropped.NOT_RUNNING),
        (("waits", B, A), Dropped.NOT_RUNNING),
        ((R, B, A), Dropped.NOT_RUNNING),
        ((R, A, A), Dropped.SAME_INSTANCE),
        (("pinned", C, B), Dropped.PINNED),
        ((R, A, InstanceId("tiny")), Dropped.TOO_LARGE),
        ((R, A, InstanceId("drains")), Dropped.NOT_READY),
        ((R, A, InstanceId("plain")), Dropped.NO_WAY),
    ],
)
def test_a_move_that_cannot_be_is_dropped_with_its_reason(move, reason):
    cluster = Cluster(A)
    assert cluster.run(num_prompt_tokens=400) == A
    cluster.start(C)
    assert cluster.run("pinned", movable=False, num_prompt_tokens=300) == C
    cluster.start(B)
    assert cluster.arrive("waits")[0].instance_id == B
    cluster.start(InstanceId("tiny"), num_blocks=20)
    cluster.start(InstanceId("plain"), capabilities=frozenset())
    cluster.start(InstanceId("drains"))
    for request_id in ("keeps plain", "keeps it open"):
        cluster.arrive(request_id, 250)
    cluster.feed(InstanceDraining(InstanceId("drains")))
    assert cluster.machine.instance_states()[InstanceId("drains")] == "draining"
    assert cluster.move(move) == []
    assert dict(cluster.machine.migration_counts().num_dropped) == {reason: 1}


def test_one_at_a_time_from_an_instance_and_to_an_instance():
    cluster = Cluster(A, B, C)
    for request_id in ("one", "two", "three", "four", "five", "six"):
        cluster.run(request_id)
    moves = [("one", A, B), ("four", A, C), ("two", B, A), ("five", B, C), ("three", C, B), ("one", A, C)]
    begun = cluster.move(*moves)
    assert [(command.request_id, command.destination) for command in begun] == [("one", B), ("two", A)]
    assert dict(cluster.machine.migration_counts().num_dropped) == {
        Dropped.SOURCE_BUSY: 2,
        Dropped.DESTINATION_BUSY: 1,
        Dropped.MOVING: 1,
    }
    cluster.move()
    assert cluster.wishes.rounds[-1][2] == {"one", "two"}


@pytest.mark.parametrize(
    ("at_source", "at_destination", "replay_below", "way"),
    [
        (ALL, ALL, 0, Way.COPY),
        (ALL, {HAND_OVER, REPLAY}, 0, Way.HAND_OFF),
        ({HAND_OVER, COPY}, {REPLAY}, 0, Way.REPLAY),
        (set(), {REPLAY}, 0, Way.REPLAY),
        ({REPLAY}, {HAND_OVER, COPY}, 0, None),
        (ALL, ALL, 151, Way.REPLAY),
        (ALL, ALL, 150, Way.COPY),
        (ALL, {COPY, HAND_OVER}, 151, Way.COPY),
    ],
)
def test_the_way_is_chosen_by_what_both_can_do_and_by_size(at_source, at_destination, replay_below, way):
    capabilities = {A: frozenset(at_source), B: frozenset(at_destination)}
    cluster = Cluster(A, B, capabilities=capabilities, migration_limits=MigrationLimits(replay_max_tokens=replay_below))
    cluster.run()
    running = (SequenceReport(R, 150, 10),)
    cluster.feed(InstanceReported(InstanceReport(A, cluster.now, 1, 0, 50, 100, running=running)))
    commands = cluster.move((R, A, B))
    assert [command.way for command in commands] == ([] if way is None else [way])


# --- when the policy is asked ----------------------------------------------------------------------------------------


def test_the_policy_is_asked_while_there_is_something_to_move_and_somewhere_to_move_it():
    cluster = Cluster(A)
    cluster.run()
    assert cluster.machine.next_deadline() is None, "one instance"
    cluster.start(B)
    assert cluster.machine.next_deadline() == cluster.now + milliseconds(100)
    cluster.expire()
    assert cluster.machine.next_deadline() == cluster.now + milliseconds(100)
    cluster.feed(RequestFinished(R, A))
    assert cluster.machine.next_deadline() is None, "no work"
    assert len(cluster.wishes.rounds) == 1


def test_a_policy_without_an_interval_is_never_asked():
    class Never(Wishes):
        interval_seconds = 0.0

    cluster = Cluster(A, B, migration=Never())
    cluster.run()
    assert cluster.machine.next_deadline() is None


def test_the_asking_ends_when_nothing_comes_any_further():
    cluster = Cluster(A, B, patience=seconds(1))
    cluster.run()
    while cluster.machine.next_deadline() is not None:
        assert cluster.expire() == []
        at = cluster.now
        cluster.feed(InstanceReported(InstanceReport(A, at, 1, 0, 50, 100)))
    assert len(cluster.wishes.rounds) <= 12
    cluster.arrive("another")
    assert cluster.machine.next_deadline() is not None


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (["r"], "which is no Move"),
        ([Move(R, A, InstanceId("z"), "why")], "named 'z', which is not among a, b"),
        ([Move(R, InstanceId("z"), A, "why")], "named 'z', which is not among a, b"),
        ([Move(R, A, B, "")], "without a reason"),
        (None, "raised TypeError"),
    ],
)
def test_a_policy_that_breaks_its_contract_is_named_and_leaves_no_trace(answer, says):
    cluster = Cluster(A, B)
    cluster.run()
    cluster.wishes.moves = answer
    with pytest.raises(PolicyError, match=says):
        cluster.expire()
    cluster.machine.check()
    assert cluster.machine.migration_counts().num_started == 0
    assert cluster.machine.next_deadline() is None or cluster.machine.next_deadline() > cluster.now


# --- fail-over -------------------------------------------------------------------------------------------------------


def test_a_request_goes_on_elsewhere_from_the_token_that_the_client_has():
    cluster = Cluster(A, B)
    cluster.run()
    cluster.feed(InstanceLost(A, "killed"))
    (resumed,) = cluster.feed(RequestFailed(R, A, "killed", num_output_tokens=7))
    assert (resumed.instance_id, resumed.num_output_tokens, resumed.attempt) == (B, 7, 2)
    assert resumed.reason.startswith("resumption 1 of 3, after 7 tokens, since a failed (killed): ")
    (view,) = cluster.machine.instance_views()
    assert view.num_outstanding_tokens == 107
    cluster.feed(FirstTokenSeen(R, B))
    assert view.num_outstanding_tokens == 1
    assert cluster.machine.counts().num_resumed == 1
    cluster.feed(RequestFinished(R, B, 20))
    assert cluster.machine.counts().num_finished == 1


def test_an_attempt_that_fails_before_its_next_token_is_tried_again_from_the_same_token():
    cluster = Cluster(A, B, C)
    cluster.run()
    (resumed,) = cluster.feed(RequestFailed(R, A, "killed", num_output_tokens=7))
    (again,) = cluster.feed(RequestFailed(R, resumed.instance_id, "refused"))
    assert (again.num_output_tokens, again.attempt) == (7, 3)
    assert cluster.machine.counts().num_resumed == 1


def test_resumptions_are_bounded():
    cluster = Cluster(A, B, max_resumptions=2)
    at = cluster.run()
    for number in range(2):
        (dispatch,) = cluster.feed(RequestFailed(R, at, "killed", num_output_tokens=number))
        at = dispatch.instance_id
        cluster.feed(FirstTokenSeen(R, at))
    (fail,) = cluster.feed(RequestFailed(R, at, "killed", num_output_tokens=9))
    assert fail.reason == "it was resumed 2 times, and failed again (a: killed; b: killed; a: killed)"


@pytest.mark.parametrize(
    ("facts", "failure"),
    [
        ({}, {"num_output_tokens": None}),
        ({}, {"num_output_tokens": 3, "retryable": False}),
        ({"movable": False}, {"num_output_tokens": 3}),
    ],
)
def test_what_cannot_be_resumed_fails(facts, failure):
    cluster = Cluster(A, B)
    at = cluster.run(**facts)
    (fail,) = cluster.feed(RequestFailed(R, at, "killed", **failure))
    assert fail == Fail(R, "the instance failed after the first token (a: killed)")


def test_what_no_instance_could_go_on_with_fails():
    cluster = Cluster(A, B)
    at = cluster.run(num_prompt_tokens=990)
    (fail,) = cluster.feed(RequestFailed(R, at, "killed", num_output_tokens=10))
    assert fail.reason == "no instance can go on with 1000 tokens (a: killed)"


def test_only_engines_that_can_go_on_are_asked_to():
    cluster = Cluster(A, B, C, capabilities={B: frozenset({COPY}), C: frozenset({REPLAY})})
    cluster.run()
    assert cluster.feed(RequestFailed(R, A, "killed", num_output_tokens=1))[0].instance_id == C
    cluster.feed(FirstTokenSeen(R, C))
    cluster.feed(InstanceLost(A))
    cluster.feed(InstanceLost(C))
    (hold,) = cluster.feed(RequestFailed(R, C, "killed", num_output_tokens=5))
    assert hold == Hold(R, "no instance can take it: none of 1 takes 105 tokens that go on")
    assert cluster.start(A)[0].num_output_tokens == 5


def test_those_who_come_back_do_not_melt_the_rest():
    cluster = Cluster(A, max_resuming_per_instance=2, queue=QueueRules(max_held=0))
    ids = ["urgent", "one", "two", "three", "four"]
    for request_id in ids:
        cluster.run(request_id, priority=-1 if request_id == "urgent" else 0)
    cluster.start(B)
    cluster.feed(InstanceLost(A))
    for request_id in ("one", "two"):
        assert isinstance(
            cluster.feed(RequestFailed(RequestId(request_id), A, "lost", num_output_tokens=1))[0], Dispatch
        )
    for request_id in ("three", "four", "urgent"):
        (hold,) = cluster.feed(RequestFailed(RequestId(request_id), A, "lost", num_output_tokens=1))
        assert isinstance(hold, Hold), "two are waited for already"
    assert isinstance(cluster.arrive("new")[0], Dispatch), "whoever is new is not held for those who come back"
    for event, next_one in [
        (FirstTokenSeen(RequestId("one"), B), "urgent"),
        (ClientLeft(RequestId("two")), "three"),
        (RequestFinished(RequestId("urgent"), B), "four"),
    ]:
        dispatched = [command for command in cluster.feed(event) if isinstance(command, Dispatch)]
        assert [command.request_id for command in dispatched] == [next_one]


def test_those_who_come_back_go_before_those_who_are_new():
    cluster = Cluster(B)
    cluster.feed(InstanceDraining(B))
    cluster.start(A, num_blocks=10)
    cluster.arrive("large", num_prompt_tokens=500)  # came first, and has to wait for an instance of that size
    for request_id in ("b", "c"):
        cluster.run(request_id, num_prompt_tokens=20)
    cluster.feed(InstanceDraining(A))
    cluster.arrive("urgent", priority=-1)
    cluster.feed(RequestFailed(RequestId("c"), A, "lost", num_output_tokens=1))
    cluster.feed(RequestFailed(RequestId("b"), A, "lost"))
    assert [command.request_id for command in cluster.start(B)] == ["urgent", "c", "large"]


def test_waiting_with_the_rest_would_be_noticed(monkeypatch):
    by_arrival = property(lambda tracked: (tracked.request.priority, tracked.request.arrived_at))
    monkeypatch.setattr(TrackedRequest, "hold_order", by_arrival)
    with pytest.raises(AssertionError):
        test_those_who_come_back_go_before_those_who_are_new()


def test_one_who_is_held_too_long_fails():
    cluster = Cluster(A, queue=QueueRules(timeout_seconds=1.0))
    cluster.run()
    cluster.feed(InstanceLost(A))
    cluster.feed(RequestFailed(R, A, "lost", num_output_tokens=1))
    (fail,) = cluster.expire()
    assert isinstance(fail, Fail)
    assert not isinstance(fail, Reject)


@pytest.mark.parametrize("options", [{"max_resumptions": -1}, {"max_resuming_per_instance": 0}])
def test_bad_options_are_named(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Cluster(**options)
    with pytest.raises(ConfigError, match="max_migrations"):
        MigrationLimits(max_migrations=0)
