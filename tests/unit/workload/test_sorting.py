"""Sorting keeps every row, keeps programs whole, and does the same in any number of runs."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.workload.test_formats import AZURE_HEAD, programs

from rota.base.instant import seconds
from rota.base.random_streams import RandomStreams
from rota.serving.workload.arrivals import Arrival
from rota.serving.workload.formats import read_trace
from rota.serving.workload.formats.leniency import Leniency
from rota.serving.workload.retiming import scale_rate, with_poisson
from rota.serving.workload.sorting import groups, in_order


@settings(max_examples=60, deadline=None)
@given(programs(), st.randoms(use_true_random=False), st.integers(1, 5))
def test_sorted_whatever_the_order_and_the_number_of_runs(rows: list[Arrival], random: object, run_rows: int) -> None:
    pieces = list(groups(rows))
    shuffled = sorted(pieces, key=lambda _: random.random())  # type: ignore[attr-defined]
    got = list(in_order([row for piece in shuffled for row in piece], run_rows=run_rows))
    assert len(got) == len(rows) and all(row in rows for row in got)
    opened = [row.at for row in got if not row.after]
    assert opened == sorted(opened)
    assert sorted(map(len, groups(got))) == sorted(map(len, pieces))
    assert got == list(in_order([row for piece in shuffled for row in piece]))


def test_rows_before_the_first_move_the_start(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("azure") / "trace"
    path.write_text(AZURE_HEAD + "2023-11-16 18:15:46,3,1\n2023-11-16 18:15:40,1,1\n2023-11-16 18:15:42,2,1\n")
    rows = list(in_order(read_trace(path, RandomStreams(0), leniency=Leniency(is_unsorted=True))))
    assert [(row.at, row.num_prompt_tokens) for row in rows] == [(0, 1), (seconds(2), 2), (seconds(6), 3)]


@settings(max_examples=40, deadline=None)
@given(programs())
def test_retiming_moves_programs_as_one(rows: list[Arrival]) -> None:
    for got in (list(scale_rate(rows, 2.0)), list(with_poisson(rows, 3.0, RandomStreams(0).stream("x")))):
        for before, after in zip(groups(rows), groups(got), strict=True):
            assert [b.at - a.at for a, b in pairwise(after)] == [b.at - a.at for a, b in pairwise(before)]
            assert [row.gap for row in after] == [row.gap for row in before]
    assert [r.at for r in scale_rate(rows, 2.0) if not r.after] == [round(r.at / 2.0) for r in rows if not r.after]
