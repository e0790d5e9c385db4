"""The simulation loop: order, deadlines, rows before deeds, and an end to every bad case."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rota.base.errors import LawBroken, StarvationError
from rota.base.journal import Journal, header_for
from rota.base.random_streams import RandomStreams
from rota.runtime.simulation import SimulationLoop


class Scripted:
    """Answers with whatever the test says, and remembers what it was told."""

    def __init__(self, answer=lambda event, now: ()):
        self.answer = answer
        self.told = []
        self.deadline = None
        self.owed = []
        self.after_expiry = None

    def handle(self, event, now):
        self.told.append((now, event))
        return self.answer(event, now)

    def next_deadline(self):
        return self.deadline

    def expire(self, now):
        self.told.append((now, "deadline"))
        self.deadline = self.after_expiry
        return ()

    def check(self):
        pass

    def unfinished(self):
        return self.owed


def nothing(name, command, now):
    pass


posts = st.lists(st.tuples(st.integers(0, 10), st.integers(-1, 1)), max_size=20)


@given(posts)
def test_events_come_by_instant_then_rank_then_order_of_posting(posts):
    loop, machine = SimulationLoop(), Scripted()
    loop.add_machine("m", machine, nothing)
    for number, (at, rank) in enumerate(posts):
        loop.post(at, "m", number, rank)
    loop.run()
    expected = sorted((at, rank, number) for number, (at, rank) in enumerate(posts))
    assert machine.told == [(at, number) for at, _, number in expected]
    assert loop.now == (max(at for at, _ in posts) if posts else 0)
    assert loop.num_events == len(posts)


def test_commands_are_carried_out_in_order_after_the_row_was_written():
    journal = Journal(header_for(None, 0), keep_rows=True)
    loop = SimulationLoop(journal=journal)
    carried_out = []
    loop.add_machine(
        "m",
        Scripted(lambda event, now: [event, event + 1]),
        lambda name, command, now: carried_out.append((name, command, now, journal.num_rows)),
    )
    loop.post(5, "m", 10)
    loop.post(6, "m", 20)
    loop.run()
    assert carried_out == [("m", 10, 5, 1), ("m", 11, 5, 1), ("m", 20, 6, 2), ("m", 21, 6, 2)]
    assert [(row.at, row.kind, row.event, row.commands) for row in journal.rows] == [
        (5, "event", 10, (10, 11)),
        (6, "event", 20, (20, 21)),
    ]


def test_a_deadline_comes_after_the_events_of_its_instant_and_may_be_moved():
    loop, machine = SimulationLoop(), Scripted()

    def answer(event, now):
        machine.deadline = event
        return ()

    machine.answer = answer
    loop.add_machine("m", machine, nothing)
    loop.post(1, "m", 10)
    loop.post(4, "m", 7)  # moves it forward
    loop.post(7, "m", 7)  # same instant: comes first, deadline stays
    loop.post(8, "m", 50)
    loop.post(9, "m", None)  # takes it back
    loop.post(60, "m", 3)  # has passed already: now
    loop.run()
    assert machine.told == [(1, 10), (4, 7), (7, 7), (7, "deadline"), (8, 50), (9, None), (60, 3), (60, "deadline")]


def test_a_deadline_that_is_there_from_the_start_is_kept():
    loop, machine = SimulationLoop(start=3), Scripted()
    machine.deadline = 5
    loop.add_machine("m", machine, nothing)
    loop.run()
    assert machine.told == [(5, "deadline")]


def test_a_deadline_that_survives_its_expiry_is_refused():
    loop, machine = SimulationLoop(), Scripted()
    machine.deadline = machine.after_expiry = 5
    loop.add_machine("m", machine, nothing)
    with pytest.raises(LawBroken, match="m: still has a deadline at 5"):
        loop.run()


def test_what_is_delivered_while_commands_are_carried_out_waits_its_turn():
    log = []
    loop = SimulationLoop()

    def first(name, command, now):
        log.append(("first", command))
        if command in (1, 2):
            loop.deliver("second", command)

    loop.add_machine("first", Scripted(lambda event, now: [1, 2, 3]), first)
    loop.add_machine("second", Scripted(lambda event, now: [event]), lambda name, c, now: log.append(("second", c)))
    loop.call_at(4, lambda now: loop.deliver("first", "go"))
    loop.post(4, "second", "later")
    loop.run()
    assert log == [("first", 1), ("first", 2), ("first", 3), ("second", 1), ("second", 2), ("second", "later")]


def test_calls_and_posts_can_be_cancelled():
    loop, machine = SimulationLoop(), Scripted()
    loop.add_machine("m", machine, nothing)
    handles = [loop.post(5, "m", "no"), loop.call_at(5, pytest.fail), loop.call_at(5, pytest.fail, background=True)]
    loop.post(6, "m", "yes")
    assert all(loop.cancel(handle) for handle in handles)
    assert not any(loop.cancel(handle) for handle in handles)
    loop.run()
    assert machine.told == [(6, "yes")]


def test_running_until_an_instant_includes_it_and_stops_there():
    loop, machine = SimulationLoop(), Scripted()
    machine.owed = ["a"]
    loop.add_machine("m", machine, nothing)
    for at in (5, 10, 11):
        loop.post(at, "m", at)
    loop.run(until=10)
    assert [at for at, _ in machine.told] == [5, 10]
    assert loop.now == 10
    with pytest.raises(LawBroken):
        loop.post(9, "m", "too late")
    machine.owed = []
    loop.run(until=100)
    assert loop.now == 100


def test_unfinished_work_without_a_wake_up_is_starvation():
    loop, machine = SimulationLoop(), Scripted()
    machine.owed = [f"job-{number}" for number in range(7)]
    loop.add_machine("fine", Scripted(), nothing)
    loop.add_machine("m", machine, nothing)
    loop.post(5, "m", "go")
    with pytest.raises(StarvationError) as caught:
        loop.run()
    message = "m at 5: 7 unfinished and no wake-up is owed to them: job-0, job-1, job-2, job-3, job-4, …"
    assert str(caught.value) == message
    assert caught.value.hint


def test_background_calls_do_not_keep_a_finished_run_alive():
    loop, machine = SimulationLoop(), Scripted()
    ticks = []

    def tick(now):
        ticks.append(now)
        loop.call_at(now + 10, tick, background=True)

    loop.add_machine("m", machine, nothing)
    loop.call_at(0, tick, background=True)
    loop.post(25, "m", "go")
    loop.run()
    assert ticks == [0, 10, 20]
    assert loop.now == 25


def test_background_calls_may_wake_unfinished_work():
    loop, machine = SimulationLoop(), Scripted()

    def report(now):
        machine.owed = []
        loop.deliver("m", "report")

    machine.owed = ["a"]
    loop.add_machine("m", machine, nothing)
    loop.call_at(40, report, background=True)
    loop.run()
    assert machine.told == [(40, "report")]


def test_background_calls_do_not_hide_starvation_for_ever():
    loop, machine = SimulationLoop(patience=100), Scripted()

    def tick(now):
        loop.call_at(now + 10, tick, background=True)

    machine.owed = ["a"]
    loop.add_machine("m", machine, nothing)
    loop.call_at(0, tick, background=True)
    loop.post(25, "m", "go")
    with pytest.raises(StarvationError, match="m at 130: 1 unfinished"):
        loop.run()


@pytest.mark.parametrize("way", ["post", "deliver", "call"])
def test_an_instant_that_never_ends_is_noticed(way):
    loop = SimulationLoop(max_events_per_instant=1_000)

    def again(name, command, now):
        if way == "post":
            loop.post(now, "m", command)
        else:
            loop.deliver("m", command)

    def call(now):
        loop.call_at(now, call)

    loop.add_machine("m", Scripted(lambda event, now: [event]), again)
    loop.post(3, "m", "ping")
    if way == "call":
        loop.call_at(2, call)
    with pytest.raises(StarvationError, match="more than 1000 events at the one instant"):
        loop.run()


def test_many_events_at_different_instants_are_no_trouble():
    loop = SimulationLoop(max_events_per_instant=10)
    machine = Scripted()
    loop.add_machine("m", machine, nothing)
    for number in range(100):
        loop.post(number // 10, "m", number)
    loop.run()
    assert len(machine.told) == 100


def test_names_are_unique_and_known():
    loop = SimulationLoop()
    loop.add_machine("m", Scripted(), nothing)
    with pytest.raises(LawBroken, match="'m' is there already"):
        loop.add_machine("m", Scripted(), nothing)
    with pytest.raises(LawBroken, match="no machine is named 'n'; there are m"):
        loop.post(1, "n", "x")


def test_shuffling_permutes_what_ties_and_nothing_else():
    def told(seed):
        loop, machine = SimulationLoop(shuffle=RandomStreams(seed).stream("shuffle")), Scripted()
        loop.add_machine("m", machine, nothing)
        for number in range(40):
            loop.post(number // 20, "m", number)
        loop.run()
        return machine.told

    assert told(1) != told(2)
    assert sorted(told(1)) == sorted(told(2))
    assert [at for at, _ in told(1)] == [0] * 20 + [1] * 20


def test_observers_hear_every_row_with_and_without_a_journal():
    class Watcher:
        def __init__(self):
            self.rows = []

        def on_row(self, row):
            self.rows.append(row)

    seen = []
    for journal in (None, Journal(header_for(None, 0))):
        watcher = Watcher()
        loop = SimulationLoop(journal=journal, observers=[watcher])
        machine = Scripted(lambda event, now: [event])
        machine.deadline = 9
        loop.add_machine("m", machine, nothing)
        loop.post(1, "m", "a")
        loop.run()
        seen.append(watcher.rows)
    assert seen[0] == seen[1]
    assert [(row.seq, row.kind) for row in seen[0]] == [(0, "event"), (1, "deadline")]
