"""The event queue against a sorted list."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rota.base.errors import LawBroken
from rota.base.event_queue import EventQueue
from rota.base.random_streams import RandomStreams


class QueueAgainstList(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.queue = EventQueue(start=100)
        self.model = []
        self.handles = []
        self.now = 100

    @rule(delay=st.integers(0, 20), rank=st.integers(-2, 2))
    def push(self, delay, rank):
        item = f"item-{len(self.handles)}"
        handle = self.queue.push(self.now + delay, item, rank)
        self.model.append((self.now + delay, rank, len(self.handles), item))
        self.handles.append((handle, item))

    @rule(early=st.integers(1, 100))
    def push_into_the_past(self, early):
        with pytest.raises(LawBroken, match="before the present"):
            self.queue.push(self.now - early, "never")

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def cancel(self, data):
        handle, item = data.draw(st.sampled_from(self.handles))
        held = next((entry for entry in self.model if entry[3] == item), None)
        assert self.queue.cancel(handle) == (held and item)
        if held:
            self.model.remove(held)

    @precondition(lambda self: self.model)
    @rule()
    def pop(self):
        expected = min(self.model)
        self.model.remove(expected)
        self.now = expected[0]
        assert self.queue.pop() == (expected[0], expected[3])

    @invariant()
    def same_length_and_next_time(self):
        assert len(self.queue) == len(self.model)
        assert self.queue.peek_time() == (min(self.model)[0] if self.model else None)


QueueAgainstList.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestQueueAgainstList = QueueAgainstList.TestCase


def test_popping_an_empty_queue_is_an_index_error():
    queue = EventQueue()
    queue.cancel(queue.push(5, "gone"))
    with pytest.raises(IndexError):
        queue.pop()


def test_items_that_do_not_compare_may_tie():
    queue = EventQueue()
    for _ in range(3):
        queue.push(1, object())
    assert [queue.pop()[0] for _ in range(3)] == [1, 1, 1]


def test_cancelled_items_do_not_pile_up():
    queue = EventQueue()
    for number in range(10_000):
        queue.cancel(queue.push(1_000_000 + number, number))
    assert len(queue._heap) < 200


def test_shuffling_permutes_ties_and_nothing_else():
    def order(seed):
        queue = EventQueue(shuffle=RandomStreams(seed).stream("shuffle"))
        for number in range(60):
            queue.push(number // 30, number, rank=number % 3)
        return [queue.pop()[1] for _ in range(60)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    for seed in range(5):
        keys = [(number // 30, number % 3) for number in order(seed)]
        assert keys == sorted(keys)
