"""Requests that move between simulated instances, with failures in every state: nothing is lost, and whoever gets this
wrong is caught."""

from collections import Counter
from dataclasses import replace
from unittest import mock

import msgspec
import pytest
from tests.worlds.journeys import LIMITS, ROOMY, TIMEOUTS, WAYS, play, play_alone

from rota.base.errors import ConfigError, RotaError
from rota.base.instant import Duration, Instant, milliseconds
from rota.runtime.faults import FailNth, Fault, FaultPlan
from rota.serving.api import Move
from rota.serving.assemble import SystemConfig
from rota.serving.cluster.migration import MigrationBook
from rota.serving.instance.machine import InstanceMachine
from rota.serving.instance.moving import Moving
from rota.serving.instance.steady import SteadyPass
from rota.serving.model.commands import Commit, Migrate, RoomKept, SequenceStopped
from rota.serving.model.events import HandedOver, MigrationFailed, SequenceAdopted, SequenceResumed
from rota.serving.model.instance import InstanceId, InstanceSpec
from rota.serving.sim.cluster import SimulatedCluster, WorldOptions
from rota.serving.sim.instance import SimulatedInstance
from rota.serving.sim.migration import Links, Moves, Transfer
from rota.serving.stack import StackConfig
from rota.testing.worlds import Pace

STACKS = (("fcfs", "vllm_default"), ("strict_priority", "stall_free_chunks"), ("fcfs", "prefill_first"))
NO_CACHE = msgspec.structs.replace(LIMITS, enable_prefix_caching=False)


def settings_of(seed):
    """Three engines' stacks, tight and roomy, with and without a prefix cache, in turn."""
    order, batch = STACKS[seed % 3]
    limits = (LIMITS, ROOMY, NO_CACHE, ROOMY)[seed % 4]
    return {"order": order, "batch": batch, "limits": limits}


def play_many(seeds):
    """Worlds of each way; returns what became of their migrations, added up."""
    ways, aborted, reasons, statuses = Counter(), Counter(), Counter(), Counter()
    num_committed = num_resumed = 0
    for seed in seeds:
        for way in WAYS:
            cluster, journey = play(seed, way=way, **settings_of(seed))
            ways += journey.ways
            aborted += journey.aborted_in
            reasons += journey.reasons
            num_committed += sum(journey.num_committed.values())
            statuses.update(record.status for record in cluster.records)
            num_resumed += sum(
                getattr(command, "num_output_tokens", 0) > 0 for row in journey.rows for command in row[4]
            )
    return ways, aborted, reasons, num_committed, statuses, num_resumed


def check_harm_was_done(aborted, reasons, statuses, num_resumed, at_least):
    """It went wrong in every state, and in every way in which it can."""
    for state in ("proposed", "reserved", "copying", "handover"):
        assert aborted[state] >= at_least, f"{state}: {aborted}"
    said = " | ".join(reasons)
    for why in ("slots are taken", "can be had", "it ended at its source", "was preempted", "was lost"):
        assert why in said, f"nobody was told that {why!r}: {reasons}"
    for state in ("proposed", "copying", "handover"):
        assert f"{state} for 0.0" in said, f"no message was lost in state {state}: {reasons}"
    assert "client left" in said
    assert min(statuses["aborted"], num_resumed) >= at_least
    assert statuses["finished"] > 20 * statuses["failed"]


@pytest.mark.slow
def test_nothing_is_lost_in_five_thousand_migrations():
    ways, aborted, reasons, num_committed, statuses, num_resumed = play_many(range(32))
    assert set(ways) == set(WAYS)
    assert ways.total() > 8_000 and num_committed > 5_000
    check_harm_was_done(aborted, reasons, statuses, num_resumed, 10)


@pytest.mark.parametrize("way", WAYS)
def test_a_leap_is_as_good_as_its_steps_and_as_composing_them(way, monkeypatch):
    leaps = []
    leap = InstanceMachine.leap

    def counted(self, num_steps, now):
        leaps.append(num_steps)
        return leap(self, num_steps, now)

    monkeypatch.setattr(InstanceMachine, "leap", counted)
    for seed in range(3):
        settings = settings_of(seed)
        leaping, journey = play(seed, way=way, **settings)
        silent, _ = play(seed, way=way, keeps_journal=False, **settings)
        num_leaps = len(leaps)
        stepping, steps = play(seed, way=way, leap=False, **settings)
        assert len(leaps) == num_leaps
        with mock.patch.object(SteadyPass, "of", lambda *arguments: None):
            composing, composed = play(seed, way=way, **settings)
        for row, stepped, other in zip(journey.rows, steps.rows, composed.rows, strict=True):
            assert row == stepped == other
        assert leaping.records == silent.records == stepping.records == composing.records
    assert len(leaps) > 100


# --- fail the n-th ----------------------------------------------------------------------------------------------------


def strike(cluster, how, command, journeys_of):
    """What goes wrong at a command: while it is carried out, or right after it, in the same instant."""
    now = cluster.loop.now
    if how == "is refused":
        fact = MigrationFailed(command.migration_id, "refused by the test")
        cluster.moves.request_ended(command.request_id)
        cluster.loop.deliver("cluster", fact)
        return
    source, destination = journeys_of[command.migration_id]
    if how == "client leaves":
        fault = Fault("client_leaves", command.request_id, now)
        cluster.loop.call_at(now, lambda at: cluster._leave(fault, at), 3)
        return
    fault = Fault("crash", source if how == "source dies" else destination, now, milliseconds(15))
    delay = 70_000 if how.endswith("later") else 0
    cluster.loop.call_at(now + delay, lambda at: cluster._crash(fault, at), 3)


HOWS = ("source dies", "destination dies", "destination dies a little later", "client leaves", "is refused")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", ["Migrate", "CopyOut", "HandOver", "Commit", "AbortMigration"])
def test_the_nth_command_may_fail(kind, how, way, monkeypatch):
    if how == "is refused" and kind in ("Commit", "AbortMigration"):
        pytest.skip("nothing is owed for it that could be refused")
    carry_out = SimulatedCluster._carry_out
    num_struck = 0
    for nth in range(1, 1_000):
        fail = FailNth(kind, nth)
        journeys_of = {}

        def failing(self, name, command, now, fail=fail, journeys_of=journeys_of):
            if isinstance(command, Migrate):
                journeys_of[command.migration_id] = (command.source, command.destination)
            strikes = fail.fails(command)
            if not (strikes and how == "is refused"):
                carry_out(self, name, command, now)
            if strikes:
                strike(self, how, command, journeys_of)

        monkeypatch.setattr(SimulatedCluster, "_carry_out", failing)
        play(9, way=way, num_requests=7, num_instances=2, faults=FaultPlan(), limits=NO_CACHE, interval=0.004)
        if not fail.has_struck:
            break
        num_struck += 1
    assert num_struck >= 1, f"{kind} was never ordered"


# --- planted ----------------------------------------------------------------------------------------------------------


def keep_nothing(self, request_id, num_tokens):
    if request_id not in self.rooms:
        return KEEP(self, request_id, num_tokens)
    return RoomKept(request_id, num_tokens)


def forget_the_room(self, move):
    with mock.patch.object(SimulatedInstance, "tell", lambda *arguments: None):
        DROP(self, move)
    if move.phase in ("stopping", "last", "handed"):
        move.source.tell(SequenceResumed(move.request.id))


def leave_it_at_rest(self, move):
    with mock.patch.object(SimulatedInstance, "resume", lambda *arguments: None):
        DROP(self, move)


def forget_what_came_since(self, move, num_tokens, now):
    STOPPED(self, move, move.num_tokens or num_tokens, now)


def go_on_at_once(self, move, now):
    output = move.num_tokens - move.request.num_prompt_tokens
    move.destination.tell(SequenceAdopted(move.request, output))
    COPIED(self, move, now)


def go_on_at_both(self, move):
    move.source.tell(SequenceResumed(move.request.id))
    with mock.patch("rota.serving.sim.migration.SequenceLeft", SequenceResumed):
        COMMIT(self, move)


def one_token_off(by):
    def commit(self, move):
        move.num_tokens += by
        COMMIT(self, move)

    return commit


def stop_without_waiting(self, request_id):
    sequence = self._machine.sequence(request_id)
    if sequence is None or sequence.state != "running":
        return [self._stop(request_id)]
    self._machine.take_out(sequence)
    sequence.move("stopped")
    self.resting[request_id] = sequence
    return [SequenceStopped(request_id, sequence.num_tokens)]


def crash_and_lose_a_token(self):
    return [one._replace(num_output_tokens=max(one.num_output_tokens - 1, 0)) for one in CRASH(self)]


def believe_what_is_late(self, event, now):
    """The machine takes a hand-over for good although it has given the migration up."""
    if isinstance(event, HandedOver) and event.migration_id not in self._open:
        return (Commit(event.migration_id, "r000"),)
    return TAKE(self, event, now)


KEEP, TAKE = Moving._keep_room, MigrationBook.take
DROP, STOPPED, COPIED, COMMIT = Moves._drop, Moves._stopped, Moves._all_copied, Moves._commit
CRASH = SimulatedInstance.crash
PLANTED = {
    "reserved: room does not grow": (Moving, "_keep_room", keep_nothing),
    "copying: tokens since the last stage are forgotten": (Moves, "_stopped", forget_what_came_since),
    "handover: the step in flight is not waited for": (Moving, "_ask_to_stop", stop_without_waiting),
    "handover: the destination goes on before the commit": (Moves, "_all_copied", go_on_at_once),
    "committed: it goes on at both": (Moves, "_commit", go_on_at_both),
    "committed: a token is doubled": (Moves, "_commit", one_token_off(-1)),
    "committed: a token is skipped": (Moves, "_commit", one_token_off(1)),
    "aborted: the room is kept": (Moves, "_drop", forget_the_room),
    "aborted: the source is not told to go on": (Moves, "_drop", leave_it_at_rest),
    "aborted: a late hand-over is believed": (MigrationBook, "take", believe_what_is_late),
    "a crash takes a token along": (SimulatedInstance, "crash", crash_and_lose_a_token),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug, monkeypatch):
    owner, method, planted = PLANTED[bug]
    monkeypatch.setattr(owner, method, planted)
    # Where the books of the machine itself hide behind asserts of their own, the account from the rows must see it.
    monkeypatch.setattr(InstanceMachine, "check", lambda self: None)
    with pytest.raises((AssertionError, RotaError)):
        for seed in range(12):
            for way in WAYS:
                play(seed, way=way, **settings_of(seed))


@pytest.mark.parametrize("timeout", ["reserve_timeout", "copy_start_timeout", "copy_timeout", "hand_over_timeout"])
def test_a_state_that_lasts_too_long_is_caught(timeout):
    """Where messages are lost, so that its deadline is all that ends it; some after one that came late."""
    lost = []
    for at in range(milliseconds(5), milliseconds(200), milliseconds(7)):
        for target in ("i0", "i1", "i2"):
            lost.append(Fault("late_messages", target, Instant(at - milliseconds(3)), milliseconds(3), 0.003))
            lost.append(Fault("lost_messages", target, Instant(at), milliseconds(2)))
    granted = replace(TIMEOUTS, **{timeout: milliseconds(70)})
    play(0, limits=ROOMY, faults=FaultPlan(lost))
    with pytest.raises(AssertionError, match="are allowed"):
        for seed in range(12):
            play(seed, limits=ROOMY, faults=FaultPlan(lost), granted=granted)


# --- links and downtime -----------------------------------------------------------------------------------------------


def test_copies_take_turns_at_each_end():
    links = Links(Transfer(latency=Duration(10), bytes_per_second=1e9))
    a, b, c, d = (InstanceId(name) for name in "abcd")
    assert links.send(a, b, 100, Instant(0)) == 110
    assert links.send(a, c, 100, Instant(5)) == 210, "what leaves a goes one after the other"
    assert links.send(d, c, 100, Instant(5)) == 310, "what enters c likewise"
    assert links.send(d, b, 50, Instant(1_000)) == 1_060, "an end that is free serves at once"
    assert links.send(b, a, 100, Instant(50)) == 160, "the two directions are apart"


class MovesAway:
    """Moves whoever runs at the first instance to the second."""

    requires = frozenset()
    interval_seconds = 0.05

    def plan(self, cluster, moving):
        first, second = cluster.instances
        return [Move(each.request_id, first.id, second.id, "away") for each in first.running]


def alone(way, num_prompt, transfer=Transfer()):
    """One request that moves in mid-answer between two idle instances, and the hand-over of its move."""
    cluster, journey = play_alone(way, num_prompt, transfer, "tests.worlds.test_migrations:MovesAway")
    (record,) = cluster.records
    (fact,) = [event for _, _, _, event, _ in journey.rows if isinstance(event, HandedOver)]
    assert (record.num_migrations, record.instance_id, record.num_output_tokens) == (1, "i1", 300)
    return record, fact


def test_a_copied_request_stands_still_as_briefly_however_long_it_is():
    records = {num_prompt: alone("copy", num_prompt) for num_prompt in (160, 1_600, 16_000)}
    for num_prompt, (record, fact) in records.items():
        # One stage catches up; what is left are the blocks that were produced meanwhile, and one that is not full.
        assert fact.downtime < milliseconds(1) + Duration(17 * 16 * 131_072 // 8)
        assert num_prompt * 131_072 < fact.num_bytes < (num_prompt + 400) * 131_072
        # The client also waits for the step in which it goes on.
        assert fact.downtime < record.downtime < fact.downtime + milliseconds(3)
    pulled = {num_prompt: alone("hand_off", num_prompt)[1].downtime for num_prompt in records}
    assert pulled[16_000] > 50 * pulled[160]
    replayed = {num_prompt: alone("replay", num_prompt)[0].downtime for num_prompt in records}
    assert replayed[16_000] > replayed[1_600] > replayed[160]


def test_a_request_that_never_catches_up_stops_after_three_stages():
    with mock.patch.object(Links, "send", autospec=True, side_effect=Links.send) as send:
        record, fact = alone("copy", 160, Transfer(bytes_per_second=131_072 * 2_000, last_stage_max_blocks=0))
    sizes = [call.args[3] // (16 * 131_072) for call in send.call_args_list]
    assert len(sizes) == 4 and sizes[0] >= 10 and sum(sizes) * 16 * 131_072 == fact.num_bytes
    assert fact.downtime == milliseconds(1) + Duration(sizes[3] * 16 * 500_000)
    assert record.status == "finished"


def test_vllms_scheduler_object_is_not_moved_from():
    config = SystemConfig(
        StackConfig(migration="tests.worlds.journeys:MovesAtRandom"), (InstanceSpec(InstanceId("i0"), LIMITS),)
    )
    with pytest.raises(ConfigError, match="cannot let requests go") as raised:
        SimulatedCluster(config, (), Pace(), WorldOptions(), engine="vllm")
    assert raised.value.hint


def test_reports_tell_of_sequences_only_where_a_policy_asks():
    _, journey = play(1)
    reports = [event.report for _, _, _, event, _ in journey.rows if type(event).__name__ == "InstanceReported"]
    told = [report for report in reports if report.running]
    assert told
    for report in told:
        assert len(report.running) == report.num_running
        assert len(report.waiting) == min(report.num_waiting, 16)
        assert all(each.num_blocks and each.num_tokens for each in report.running)
    _, journey = play(1, policy="none")
    assert not any(
        event.report.running for _, _, _, event, _ in journey.rows if type(event).__name__ == "InstanceReported"
    )


def test_without_resuming_a_crash_after_the_first_token_ends_a_request():
    cluster, _ = play(2, resume=False, policy="none")
    assert any(record.status == "failed" for record in cluster.records)
    again, _ = play(2, resume=True, policy="none")
    assert not any(record.status == "failed" for record in again.records)
    outlived = [record for record in again.records if record.downtime]
    assert outlived and all(record.num_migrations == 0 for record in outlived)
