"""Timelines take only what ends after it starts, and sort outer before inner."""

import pytest

from rota.base.errors import DataError
from rota.base.timeline import Timeline


def test_nothing_ends_before_it_starts():
    timeline = Timeline()
    for add in (
        lambda: timeline.add_span("oven", "rack", "bread", 5, 4),
        lambda: timeline.add_async_span("1", "oven", "bread", 5, 4),
        lambda: timeline.add_flow("move", ("a", "t", 5), ("b", "t", 4)),
    ):
        with pytest.raises(DataError, match="1 ns before it starts"):
            add()
    assert len(timeline) == 0


def test_items_come_by_start_and_outer_before_inner():
    timeline = Timeline()
    timeline.add_span("oven", "rack", "inner", 5, 6)
    timeline.add_counter("oven", "heat", 4, 200.0)
    timeline.add_span("oven", "rack", "outer", 5, 9, {"why": "batch"})
    timeline.add_instant("shop", "door", "bell", 1)
    timeline.add_flow("sold", ("oven", "rack", 9), ("street", "cart", 12))
    assert [getattr(item, "name", None) for item in timeline.by_start()] == ["bell", "heat", "outer", "inner", "sold"]
    assert timeline.resources() == ["oven", "shop", "street"]
    assert next(iter(timeline)).name == "inner"
