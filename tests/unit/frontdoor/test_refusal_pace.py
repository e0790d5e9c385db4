"""How often somebody is refused: what comes at once, what is held, and for how long at most."""

import heapq

from hypothesis import given
from hypothesis import strategies as st

from rota.serving.frontdoor.refusal_pace import RefusalPace

gaps = st.lists(st.sampled_from((0.0, 0.0, 0.001, 0.01, 0.1, 1.0, 5.0)), max_size=300)


@given(gaps=gaps, rate=st.sampled_from((1.0, 20.0, 200.0)), burst=st.integers(1, 20), most=st.integers(0, 30))
def test_whatever_is_held_leaves_in_order_soon_and_at_the_pace(
    gaps: list[float], rate: float, burst: int, most: int
) -> None:
    pace, now = RefusalPace(rate, burst, most), 0.0
    left: list[float] = []
    for gap in gaps:
        now += gap
        held = pace.hold(now)
        assert len(pace._leave_at) <= most
        if held is None:
            assert len(pace._leave_at) == most, "cut only where no more may be held"
            continue
        assert 0 <= held <= (most + 1) / rate, "nobody waits for more than those before it"
        assert not left or now + held >= left[-1] - 1e-9
        left.append(now + held)
        since = now + held
        for num, begin in enumerate(reversed(left), 1):
            assert num <= burst + 1 + rate * (since - begin) + 0.01, "in no stretch more than the burst and the pace"
    later = now + (burst + most + 1) / rate
    assert [pace.hold(later) for _ in range(burst)] == [0.0] * burst, "a quiet while, and all is forgotten"
    assert len(pace._leave_at) == 0


@given(num=st.integers(1, 400), rate=st.sampled_from((10.0, 50.0)))
def test_who_awaits_its_answers_is_refused_at_the_pace_on_however_many_connections(num: int, rate: float) -> None:
    """Clients that ask again the moment they are refused."""
    pace = RefusalPace(rate, 20, 400)
    asking, num_refused, seconds = [0.0] * num, 0, 6.0
    while asking[0] < seconds:
        now = heapq.heappop(asking)
        held = pace.hold(now)
        assert held is not None, "each of them is answered"
        heapq.heappush(asking, now + held)
        num_refused += now + held < seconds
    assert num_refused <= 20 + 1 + seconds * rate
