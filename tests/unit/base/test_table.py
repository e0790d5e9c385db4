"""Transition tables: every pair that is not listed raises, and a table that cannot be right is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rota.base.errors import IllegalMove, LawBroken
from rota.base.table import TransitionTable

MOVES = {"queued": {"start": "running", "drop": "gone"}, "running": {"stop": "queued", "end": "gone"}}
TABLE = TransitionTable("job", MOVES, initial="queued", final=("gone",))


@given(st.sampled_from(["queued", "running", "gone"]), st.sampled_from(["start", "drop", "stop", "end", "fly"]))
def test_a_move_is_listed_or_raises(state, event):
    if event in MOVES.get(state, {}):
        assert TABLE.move(state, event) == MOVES[state][event]
    else:
        with pytest.raises(IllegalMove) as caught:
            TABLE.move(state, event)
        for word in ("job", state, event, *MOVES.get(state, {})):
            assert word in str(caught.value)


def test_unknown_states_are_named():
    with pytest.raises(IllegalMove, match="no such state"):
        TABLE.move("flying", "start")


def test_reachable():
    assert TABLE.reachable() == {"queued", "running", "gone"}
    assert TABLE.reachable("gone") == {"gone"}


def test_diagram():
    assert TABLE.diagram() == (
        "stateDiagram-v2\n"
        "    [*] --> queued\n"
        "    queued --> running: start\n"
        "    queued --> gone: drop\n"
        "    running --> queued: stop\n"
        "    running --> gone: end\n"
        "    gone --> [*]\n"
    )


@pytest.mark.parametrize(
    ("moves", "final", "complaint"),
    [
        ({"a": {"go": "b"}}, (), "has no row"),
        ({"b": {}}, (), "initial state 'a' has no row"),
        ({"a": {"go": "b"}, "b": {"back": "a"}}, ("b",), "way out"),
        ({"a": {}, "b": {"go": "a"}}, ("a",), "unreachable: b"),
        ({"a": {"go": "b", "end": "c"}, "b": {"loop": "b"}}, ("c",), "no final state can be reached from: b"),
    ],
)
def test_a_table_that_cannot_be_right_is_refused(moves, final, complaint):
    with pytest.raises(LawBroken, match=complaint):
        TransitionTable("t", moves, initial="a", final=final)
