"""The table of truth fails when a bound is missed, when a group cannot be run, and when an error is no number."""

import importlib
import json
import math

import pytest
from benchmarks.truth import __main__ as truth
from benchmarks.truth.row import TruthRow, compared, data

from rota.base.errors import DataError

HOLDS = compared("theory", "a queue", "mean wait", "s", truth=2.0, rota=2.1, bound=0.06)
MISSED = compared("theory", "a queue", "mean wait", "s", truth=2.0, rota=1.8, bound=0.06)
SHOWN = compared("theory", "a queue [1]", "mean wait", "s", truth=2.0, rota=20.0)


def table(monkeypatch, capsys, *rows_or_error, options=("--only", "theory")):
    def rows(group, cut):
        for row in rows_or_error:
            if isinstance(row, Exception):
                raise row
            yield row

    monkeypatch.setattr(truth, "_rows_of", rows)
    return truth.main(options), capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "bound", "verdict"),
    [
        (0.02, 0.02, "holds"),
        (-0.02, 0.02, "holds"),
        (-0.021, 0.02, "missed"),
        (math.nan, 0.02, "missed"),
        (None, 0.02, "missed"),
        (0.0, 0.0, "holds"),
        (9.0, None, "shown"),
    ],
)
def test_the_verdict(error, bound, verdict):
    assert TruthRow("g", "c", "q", "", 1.0, 1.0, error, bound).verdict == verdict


def test_the_error_is_signed_and_relative():
    assert HOLDS.error == pytest.approx(0.05)
    assert MISSED.error == pytest.approx(-0.1)
    assert compared("g", "c", "q", "", truth=0, rota=0, bound=0.0).verdict == "holds"
    assert compared("g", "c", "q", "", truth=0, rota=1, bound=0.5).verdict == "missed"


def test_a_table_whose_bounds_hold_is_fine(monkeypatch, capsys):
    code, out = table(monkeypatch, capsys, HOLDS, SHOWN)
    assert code == 0
    assert "1 hold, 0 missed, 1 shown" in out
    assert "a queue [1]" in out


def test_a_missed_bound_fails(monkeypatch, capsys):
    code, out = table(monkeypatch, capsys, HOLDS, MISSED)
    assert code == 1
    assert "-10.00%" in out
    assert out.splitlines()[-1].startswith("missed: theory, a queue: mean wait: -10.00%")


def test_a_group_without_its_data_fails_and_says_what_is_absent(monkeypatch, capsys):
    code, out = table(monkeypatch, capsys, HOLDS, DataError("truth/x.csv: not found", hint="set ROTA_DATA"))
    assert code == 1
    assert "theory could not be run: truth/x.csv: not found (set ROTA_DATA)" in out


def test_json_has_every_row_and_its_verdict(monkeypatch, capsys):
    code, out = table(monkeypatch, capsys, HOLDS, MISSED, options=("--only", "theory", "--json"))
    document = json.loads(out)
    assert code == 1
    assert [row["verdict"] for row in document["rows"]] == ["holds", "missed"]
    assert document["num_missed"] == 1


def test_absent_data_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("ROTA_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"truth/vllm-0\.19: not found"):
        data("truth", "vllm-0.19")


@pytest.mark.parametrize("group", truth.GROUPS)
def test_every_group_gives_rows(group):
    assert callable(importlib.import_module(f"benchmarks.truth.{group}").rows)
