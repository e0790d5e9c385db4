"""An instance whose requests come and go: room that is kept, sequences that rest, and what becomes of both whatever a
host may say in whatever order."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule
from tests.machines.hunting import hunt
from tests.machines.test_instance import BLOCK, InstanceRules

from rota.base.errors import LawBroken, RotaError
from rota.base.instant import Instant
from rota.serving.instance.ledger import BlockLedger
from rota.serving.instance.machine import InstanceMachine
from rota.serving.instance.moving import Moving
from rota.serving.model.commands import RejectSequence, RoomKept, RoomRefused, RunStep, SequenceStopped, StopRefused
from rota.serving.model.events import (
    RoomAsked,
    RoomGivenUp,
    SequenceAborted,
    SequenceAdopted,
    SequenceArrived,
    SequenceLeft,
    SequenceResumed,
    StepFinished,
    StopAsked,
)
from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import Request, RequestId
from rota.serving.policies.batch.vllm_default import VllmDefault
from rota.serving.policies.memory.recompute_lowest import RecomputeLowest
from rota.serving.policies.order.fcfs import Fcfs


class MovingRules(InstanceRules):
    """As any host, and requests move: the host never adopts without room, and asks whom it likes to stop."""

    def tell(self, event):
        commands = super().tell(event)
        for command in commands:
            if isinstance(command, SequenceStopped | StopRefused):
                assert command.request_id in self.asked, "an answer that nobody asked for"
                self.asked.remove(command.request_id)
            if isinstance(command, SequenceStopped):
                self.resting[command.request_id] = command.num_tokens
        return commands

    def __init__(self):
        super().__init__()
        self.rooms = {}
        self.resting = {}
        self.asked = []

    @rule(num_prompt=st.integers(1, 40), num_output=st.integers(1, 12), family=st.integers(0, 2))
    def replay(self, num_prompt, num_output, family):
        request = self.request(num_prompt, num_output, family)
        commands = self.tell(SequenceArrived(request, num_output))
        if num_prompt + num_output >= self.longest:
            assert [type(command) for command in commands] == [RejectSequence]
        else:
            self.alive.append(request.id)

    @rule(num_prompt=st.integers(1, 40), num_output=st.integers(1, 12), family=st.integers(0, 2))
    def ask_for_room(self, num_prompt, num_output, family):
        request = self.request(num_prompt, num_output, family)
        if isinstance(self.tell(RoomAsked(request.id, num_prompt + num_output))[0], RoomKept):
            self.rooms[request.id] = (request, num_output)

    @precondition(lambda self: self.rooms)
    @rule(data=st.data(), num_more=st.integers(1, 12))
    def ask_for_more(self, data, num_more):
        request_id = data.draw(st.sampled_from(list(self.rooms)))
        request, num_output = self.rooms[request_id]
        answer = self.tell(RoomAsked(request_id, request.num_prompt_tokens + num_output + num_more))[0]
        if isinstance(answer, RoomKept):
            self.rooms[request_id] = (request, num_output + num_more)
        else:
            assert isinstance(answer, RoomRefused) and answer.reason
            del self.rooms[request_id]

    @precondition(lambda self: self.rooms)
    @rule(data=st.data(), comes=st.sampled_from([True, True, False]), less=st.integers(0, 5))
    def come_or_not(self, data, comes, less):
        request_id = data.draw(st.sampled_from(list(self.rooms)))
        request, num_output = self.rooms.pop(request_id)
        if comes:
            self.alive.append(request_id)
            self.tell(SequenceAdopted(request, max(1, num_output - less)))
        else:
            self.tell(RoomGivenUp(request_id))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), runs=st.sampled_from([True, True, False]), ends=st.booleans(), stays=st.integers(0, 2))
    def ask_to_stop(self, data, runs, ends, stays):
        """Anybody, or one that runs; and what a host may say next of one that rests."""
        running = [sequence.id for sequence in self.machine.running] if runs else []
        request_id = data.draw(st.sampled_from(running or self.alive))
        if request_id not in self.asked and request_id not in self.resting:
            self.asked.append(request_id)
            self.tell(StopAsked(request_id))
            if ends and self.step is not None:
                self.end_step(0.0, lambda request_id: False)
        if request_id in self.resting and stays == 1:
            self.let_go(request_id)
        elif request_id in self.resting and stays == 2:
            self.abort(request_id)

    @precondition(lambda self: self.asked or self.resting)
    @rule(data=st.data())
    def go_on(self, data):
        request_id = data.draw(st.sampled_from([*self.asked, *self.resting]))
        if request_id in self.asked:
            self.asked.remove(request_id)
        self.resting.pop(request_id, None)
        self.tell(SequenceResumed(request_id))

    @precondition(lambda self: self.resting)
    @rule(data=st.data())
    def leave(self, data):
        self.let_go(data.draw(st.sampled_from(list(self.resting))))

    def let_go(self, request_id):
        del self.resting[request_id]
        self.alive.remove(request_id)
        self.tell(SequenceLeft(request_id))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def client_leaves(self, data):
        self.abort(data.draw(st.sampled_from(self.alive)))

    def abort(self, request_id):
        self.alive.remove(request_id)
        self.resting.pop(request_id, None)
        self.tell(SequenceAborted(request_id))
        assert request_id not in self.asked, "who waits for an answer got none"

    @rule()
    def unknown_ids_are_ignored(self):
        for event in (RoomGivenUp, SequenceResumed, SequenceLeft, SequenceAborted):
            self.tell(event(RequestId("nobody")))

    def request(self, num_prompt, num_output, family):
        self.num_requests += 1
        hashes = tuple((family, block) for block in range(num_prompt // BLOCK)) if family else ()
        request_id = RequestId(f"r{self.num_requests}")
        return Request(request_id, Instant(self.now), num_prompt, num_output + 30, block_hashes=hashes)

    @invariant()
    def nothing_is_lost(self):
        if not hasattr(self, "machine"):
            return
        machine = self.machine
        assert sorted(machine.unfinished()) == sorted(self.alive)
        assert machine.moving.resting.keys() == self.resting.keys()
        assert machine.moving.rooms.keys() == self.rooms.keys()
        for request_id, num_tokens in self.resting.items():
            sequence = machine.sequence(request_id)
            assert (sequence.num_tokens, sequence.num_computed_tokens) == (num_tokens, num_tokens - 1)
            assert sequence.num_blocks == -(-(num_tokens - 1) // BLOCK), "it rests without its blocks"
        if len(self.alive) > len(self.resting) and not self.rooms and not self.resting:
            assert self.step is not None, "law 6: unfinished work, and no step to wake it up"
        if not self.alive and not self.rooms:
            assert machine.num_free_blocks == self.limits.num_blocks, "law 3: blocks are held for nobody"
        admissions = [sequence.admitted_seq for sequence in machine.running]
        assert admissions == sorted(set(admissions))

    def teardown(self):
        """Whoever rests goes on, nobody comes any more: then everything ends soon."""
        if not hasattr(self, "machine"):
            return
        for request_id in list(self.rooms):
            del self.rooms[request_id]
            self.tell(RoomGivenUp(request_id))
        for request_id in list(self.resting):
            del self.resting[request_id]
            self.tell(SequenceResumed(request_id))
        for _ in range(2_000):
            for request_id in list(self.resting):  # asked to stop before
                del self.resting[request_id]
                self.tell(SequenceResumed(request_id))
            if self.step is None:
                break
            self.end_step(0.0, lambda request_id: True)
        assert not self.alive
        assert not self.asked
        self.nothing_is_lost()


TestMovingRules = MovingRules.TestCase
TestMovingRules.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


# --- by hand ----------------------------------------------------------------------------------------------------------

LIMITS = InstanceLimits(num_blocks=8, block_size=4, max_num_seqs=3, max_num_batched_tokens=32)


def build(limits=LIMITS, *, steady=True):
    return InstanceMachine(limits, order=Fcfs(), batch=VllmDefault(), memory=RecomputeLowest(), steady=steady)


def request(name, num_prompt=5, max_tokens=20, hashes=()):
    return Request(RequestId(name), Instant(0), num_prompt, max_tokens, block_hashes=hashes)


def end_step(machine, *finished):
    return machine.handle(StepFinished(machine._in_flight.step_id, finished), Instant(0))


def tell(machine, event):
    return list(machine.handle(event, Instant(0)))


def step_of(commands):
    (step,) = [command for command in commands if isinstance(command, RunStep)]
    return step


def grants(commands):
    return [tuple(grant) for grant in step_of(commands).grants]


@pytest.mark.parametrize("steady", [True, False])
def test_a_stop_waits_for_the_step_in_flight_and_others_go_on(steady):
    machine = build(steady=steady)
    tell(machine, SequenceArrived(request("a")))
    tell(machine, SequenceArrived(request("b")))
    end_step(machine)
    end_step(machine)
    assert tell(machine, StopAsked("a")) == []
    stopped, step = end_step(machine)
    assert stopped == SequenceStopped("a", 8)
    assert grants([step]) == [("b", 1)]
    assert machine.sequence("a").num_blocks == 2
    # It goes on where it stood: ahead of b, with the token that it had known.
    tell(machine, SequenceResumed("a"))
    assert grants(end_step(machine)) == [("a", 1), ("b", 1)]
    assert machine.sequence("a").num_tokens == 8
    end_step(machine)
    assert machine.sequence("a").num_tokens == 9


def test_who_cannot_stop_is_refused_with_a_reason():
    machine = build()
    assert tell(machine, StopAsked("nobody")) == [StopRefused("nobody", "it has ended")]
    tell(machine, SequenceArrived(request("a", 5)))
    tell(machine, SequenceArrived(request("b", 6)))
    assert tell(machine, StopAsked("b")) == [StopRefused("b", "it waits")]
    tell(machine, StopAsked("a"))
    # a ends with the very step after which it was to rest.
    refused, _ = end_step(machine, "a")
    assert refused == StopRefused("a", "it has ended")
    tell(machine, StopAsked("b"))
    assert tell(machine, SequenceAborted("b")) == [StopRefused("b", "it was aborted")]


def test_a_prefill_in_mid_prompt_does_not_stop():
    machine = build(InstanceLimits(num_blocks=8, block_size=4, max_num_batched_tokens=4))
    tell(machine, SequenceArrived(request("a", 10)))
    tell(machine, StopAsked("a"))
    refused, _ = end_step(machine)
    assert isinstance(refused, StopRefused) and "6 of its tokens" in refused.reason


def test_room_is_counted_and_kept_from_others():
    machine = build()
    assert tell(machine, RoomAsked("m", 9)) == [RoomKept("m", 9)]
    assert machine.num_free_blocks == 5
    assert tell(machine, RoomAsked("m", 17)) == [RoomKept("m", 17)]
    assert machine.num_free_blocks == 3
    machine.check()
    # 13 tokens do not fit beside it, and nobody else is there: no step, until the room is given up.
    assert tell(machine, SequenceArrived(request("a", 13))) == []
    assert grants(tell(machine, RoomGivenUp("m"))) == [("a", 13)]
    assert isinstance(tell(machine, RoomAsked("m", 17))[0], RoomRefused)


def test_room_that_cannot_grow_is_given_up():
    machine = build()
    tell(machine, RoomAsked("m", 9))
    (refused,) = tell(machine, RoomAsked("m", 31 + 4))
    assert isinstance(refused, RoomRefused)
    assert machine.num_free_blocks == 8


def test_slots_are_kept_too():
    machine = build()
    for name in "xyz":
        assert tell(machine, RoomAsked(name, 4)) == [RoomKept(name, 4)]
    (refused,) = tell(machine, RoomAsked("u", 4))
    assert refused == RoomRefused("u", "all 3 slots are taken")
    assert tell(machine, SequenceArrived(request("a"))) == []
    tell(machine, RoomGivenUp("x"))
    assert machine.sequence("a").state == "running"
    machine.check()


@pytest.mark.parametrize("num_output", [3, 4, 5])
def test_an_adopted_sequence_decodes_from_where_it_was(num_output):
    """At every place in a block; the blocks that it holds are those of what is computed."""
    machine = build()
    tell(machine, RoomAsked("m", 5 + num_output))
    commands = tell(machine, SequenceAdopted(request("m"), num_output))
    assert grants(commands) == [("m", 1)]
    sequence = machine.sequence("m")
    assert (sequence.num_tokens, sequence.num_computed_tokens) == (5 + num_output, 5 + num_output)
    assert sequence.num_blocks == -(-(5 + num_output) // 4)
    machine.check()
    end_step(machine)
    assert sequence.num_output_tokens == num_output + 1
    end_step(machine, "m")
    assert machine.num_free_blocks == 8


def test_the_prefix_of_an_adopted_sequence_can_be_found():
    machine = build()
    hashes = ("h0", "h1")
    tell(machine, RoomAsked("m", 11))
    tell(machine, SequenceAdopted(request("m", 9, hashes=hashes), 2))
    tell(machine, SequenceArrived(request("a", 9, hashes=hashes)))
    assert grants(end_step(machine)) == [("m", 1), ("a", 1)]


def test_nobody_is_adopted_without_room():
    machine = build()
    with pytest.raises(LawBroken, match="law 3"):
        tell(machine, SequenceAdopted(request("m"), 3))
    tell(machine, RoomAsked("m", 8))
    with pytest.raises(LawBroken, match="law 3"):
        tell(machine, SequenceAdopted(request("m"), 9))


def test_a_replayed_sequence_computes_what_it_knows_and_is_no_news_to_the_statistics():
    machine = build()
    assert grants(tell(machine, SequenceArrived(request("a", 5), 7))) == [("a", 12)]
    end_step(machine)
    assert machine.sequence("a").num_output_tokens == 8
    assert machine.statistics().num_prompt_tokens == 0
    (rejected,) = tell(machine, SequenceArrived(request("b", 5), 27))
    assert rejected.reason == "it has 32 tokens already, and this instance takes 31 at most"


def test_one_who_left_leaves_its_prefix_behind():
    machine = build()
    hashes = ("h0", "h1")
    tell(machine, SequenceArrived(request("a", 9, hashes=hashes)))
    end_step(machine)
    tell(machine, StopAsked("a"))
    assert end_step(machine) == [SequenceStopped("a", 11)]
    assert not machine.running and machine.unfinished() == ["a"]
    assert tell(machine, SequenceLeft("a")) == []
    assert not machine.unfinished()
    assert machine.num_free_blocks == 8
    assert grants(tell(machine, SequenceArrived(request("b", 9, hashes=hashes)))) == [("b", 1)]


def test_who_rests_is_no_victim():
    machine = build()
    tell(machine, SequenceArrived(request("a", 12)))
    tell(machine, SequenceArrived(request("b", 11)))
    end_step(machine)
    tell(machine, StopAsked("a"))
    end_step(machine)
    for _ in range(5):
        commands = end_step(machine)
        machine.check()
    # b has four blocks, needs a fifth and finds nobody but itself: no step can be ordered, and that is no starvation.
    assert not commands
    assert machine.sequence("b").state == "preempted"
    assert machine.sequence("a").num_blocks == 4
    # The step that comes of it says who was preempted on the way.
    step = step_of(tell(machine, SequenceLeft("a")))
    assert (step.preempted, step.reasons[0].choice) == (("b",), "preempted")


# --- planted ----------------------------------------------------------------------------------------------------------


def forget_the_slot(self):
    return len(self.resting)


def drop_the_room(self, request_id):
    self.rooms.pop(request_id, None)


def stop_at_once(self, request_id):
    sequence = self._machine.sequence(request_id)
    if sequence is None or sequence.state != "running":
        return [StopRefused(request_id, "it does not run")]
    self._machine.take_out(sequence)
    sequence.move("stopped")
    self.resting[request_id] = sequence
    return [SequenceStopped(request_id, sequence.num_tokens)]


def resume_as_new(self, request_id):
    sequence = self.resting.get(request_id)
    RESUME(self, request_id)
    if sequence is not None:
        sequence.num_tokens -= 1


def leave_with_the_blocks(self, request_id):
    sequence = self.resting.pop(request_id, None)
    if sequence is not None:
        self._machine.forget(sequence)


def abort_at_rest(self, sequence):
    self.resting.pop(sequence.id, None)
    return ABORTED(self, sequence)


PLANTED = {
    "kept room takes no slot": (Moving, "num_slots", property(forget_the_slot)),
    "room is given up, and its blocks are not": (Moving, "_give_up_room", drop_the_room),
    "a stop does not wait for the step": (Moving, "_ask_to_stop", stop_at_once),
    "one who goes on has lost a token": (Moving, "_resume", resume_as_new),
    "one who left keeps its blocks": (Moving, "_let_go", leave_with_the_blocks),
    "one aborted at rest keeps its blocks": (Moving, "aborted", abort_at_rest),
    "an adopted one has a block too many": (BlockLedger, "trim", lambda self, holding, num_tokens: None),
}
RESUME, ABORTED = Moving._resume, Moving.aborted


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(monkeypatch, bug):
    owner, method, planted = PLANTED[bug]
    monkeypatch.setattr(owner, method, planted)
    with pytest.raises((RotaError, AssertionError)):
        hunt(MovingRules)
