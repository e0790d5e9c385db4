"""Tenants take turns at the router's one thread: what a flood may take of it, and what it cannot."""

from collections.abc import Callable
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from rota.serving.frontdoor.exchange import Exchange
from rota.serving.frontdoor.turns import Turns

TURN = 0.25


class Asked:
    """A request that takes so long to look at."""

    def __init__(self, who: str | None, seconds: float, done: bool = False) -> None:
        self.who, self.seconds, self.done = who, seconds, done


class Desk:
    """Turns on a clock of their own, pass by pass."""

    def __init__(self) -> None:
        self.now = 0.0
        self.looked_at: list[Asked] = []
        self.due: list[Callable[[], None]] = []
        self.turns = Turns(self._look, turn_seconds=TURN, clock=lambda: self.now, soon=self.due.append)

    def _look(self, exchange: Exchange) -> None:
        asked = cast(Asked, exchange)
        self.looked_at.append(asked)
        self.now += asked.seconds

    def take(self, asked: Asked) -> None:
        self.turns.take(asked.who, cast(Exchange, asked))

    def next_pass(self) -> list[Asked]:
        num_before = len(self.looked_at)
        due = list(self.due)
        self.due.clear()
        assert len(due) <= 1
        for each in due:
            each()
        return self.looked_at[num_before:]


requests = st.builds(
    Asked,
    st.sampled_from(("a", "b", "c", None)),
    st.sampled_from((0.0, 1 / 64, 1 / 8, TURN, 3.0)),
    st.sampled_from((False, False, False, True)),
)


@given(arrivals=st.lists(st.lists(requests, max_size=12), max_size=8))
def test_each_request_is_looked_at_once_and_in_order_and_no_tenant_has_more_than_its_turn(
    arrivals: list[list[Asked]],
) -> None:
    desk, taken = Desk(), [asked for batch in arrivals for asked in batch]
    for batch in arrivals:
        seen = desk.next_pass()
        num_before = len(desk.looked_at)
        for asked in batch:
            desk.take(asked)
        for who in {each.who for each in taken}:
            had = [each.seconds for each in [*seen, *desk.looked_at[num_before:]] if each.who == who]
            assert sum(had[:-1]) < TURN, "only the last one may go beyond the turn"
    for _ in range(len(taken) + 1):
        desk.next_pass()
    for who in {each.who for each in taken}:
        expected = [each for each in taken if each.who == who and not each.done]
        assert [each for each in desk.looked_at if each.who == who] == expected
    assert not desk.due, "nothing is left that would wake it"
    assert not desk.turns._waiting
    assert not desk.turns._had


@given(num=st.integers(1, 300), num_floods=st.integers(1, 4))
def test_nobody_waits_behind_a_flood(num: int, num_floods: int) -> None:
    desk = Desk()
    for _ in range(num):
        for flood in range(num_floods):
            desk.take(Asked(f"flood {flood}", 0.1))
    good = [Asked("good", 0.1) for _ in range(3)]
    desk.take(good[0])
    assert desk.looked_at[-1] is good[0], "whoever has had nothing is looked at at once"
    desk.take(good[1])
    desk.take(good[2])
    desk.take(late := Asked("good", 0.1))
    assert desk.looked_at[-1] is good[2]
    before = desk.now
    assert late in desk.next_pass(), "and what is beyond a turn in the very next pass"
    assert desk.now - before <= (num_floods + 1) * (TURN + 0.1)
