"""A row that waits comes once, its gap after the last of what it waits for, and no sooner; none is lost."""

import heapq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.workload.test_formats import programs

from rota.base.errors import DataError
from rota.base.instant import Duration, Instant
from rota.serving.model.request import Request, RequestId
from rota.serving.workload.arrivals import Arrival, to_request
from rota.serving.workload.followers import ArrivalFlow, refuse_waiting


def build(arrival: Arrival, number: int, at: Instant | None) -> tuple[Request, int]:
    return to_request(arrival, f"r-{number}", Instant(0), max_model_len=10**9, block_size=None, arrived_at=at)


def play(arrivals: list[Arrival], services: list[int]) -> tuple[dict[str, int], dict[str, int], int]:
    """Play a trace with a service time for every request; arrival and end of each, and the most waited for at once."""
    flow = ArrivalFlow(arrivals, build)
    arrived: dict[str, int] = {}
    ended: dict[str, int] = {}
    queue: list[tuple[int, int, str]] = []

    def come(request: Request) -> None:
        assert request.id not in arrived
        arrived[request.id] = request.arrived_at
        number = int(request.id.removeprefix("r-"))
        heapq.heappush(queue, (request.arrived_at + services[number % len(services)], number, request.id))

    most = 0
    for request, _ in flow:
        while queue and queue[0][0] <= request.arrived_at:
            at, _, name = heapq.heappop(queue)
            ended[name] = at
            for follower, _ in flow.ended(RequestId(name), Instant(at)):
                come(follower)
        come(request)
        most = max(most, flow.num_waited_for)
    while queue:
        at, _, name = heapq.heappop(queue)
        ended[name] = at
        for follower, _ in flow.ended(RequestId(name), Instant(at)):
            come(follower)
    assert flow.num_waited_for == 0, "something is still waited for"
    return arrived, ended, most


@settings(max_examples=100, deadline=None)
@given(programs(), st.lists(st.integers(0, 10**12), min_size=1, max_size=5))
def test_every_row_comes_once_at_its_moment(arrivals: list[Arrival], services: list[int]) -> None:
    arrived, ended, _ = play(arrivals, services)
    assert len(arrived) == len(ended) == len(arrivals)
    names: dict[str, str] = {}
    for number, arrival in enumerate(arrivals):
        if not arrival.after:
            names.clear()
            assert arrived[f"r-{number}"] == arrival.at
        else:
            last = max(ended[names[name]] for name in arrival.after)
            assert arrived[f"r-{number}"] == last + arrival.gap
        names[str(arrival.id)] = f"r-{number}"


def test_memory_is_of_what_is_under_way() -> None:
    pair = [Arrival(Duration(0), 1, 1, id="a"), Arrival(Duration(0), 1, 1, after=("a",))]
    arrivals = [
        Arrival(Duration(number * 10), row.num_prompt_tokens, 1, id=row.id, after=row.after)
        for number in range(500)
        for row in pair
    ]
    # When an open row is handed out, the next one has been read, and with it nothing that waits for it.
    assert play(arrivals, [5])[2] <= 2
    assert play(arrivals, [5_000])[2] == 500


def test_an_unknown_id_is_refused() -> None:
    rows = [Arrival(Duration(0), 1, 1, id="a"), Arrival(Duration(0), 1, 1), Arrival(Duration(0), 1, 1, after=("a",))]
    with pytest.raises(DataError, match="row 3 of the trace waits for 'a'"):
        list(ArrivalFlow(rows, build))


def test_who_sends_each_row_at_its_own_instant_refuses_rows_that_wait() -> None:
    rows = [Arrival(Duration(0), 1, 1, id="a"), Arrival(Duration(0), 1, 1, after=("a",))]
    assert list(refuse_waiting(rows[:1])) == rows[:1]
    with pytest.raises(DataError, match="row 2 of the trace waits"):
        list(refuse_waiting(rows))
