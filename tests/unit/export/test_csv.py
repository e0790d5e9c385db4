"""CSV files hold one row an item and read back."""

import csv
import json

from rota.base.timeline import Timeline
from rota.export.csv import COLUMNS, write_table_csv, write_timeline_csv


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_a_timeline(tmp_path):
    timeline = Timeline()
    timeline.add_span("oven", "rack", 'bread, "rye"\n', 5, 9, {"why": ["a", "b"]})
    timeline.add_async_span("7", "oven", "loaf", 1, 12)
    timeline.add_instant("shop", "door", "bell", 2)
    timeline.add_counter("oven", "heat", 3, 200.5)
    timeline.add_flow("sold", ("oven", "rack", 9), ("shop", "till", 10))
    path = tmp_path / "timeline.csv"
    write_timeline_csv(timeline, path)
    header, *rows = read(path)
    assert header == list(COLUMNS)
    assert rows == [
        ["async_span", "oven", "", "loaf", "7", "1", "12", "", ""],
        ["instant", "shop", "door", "bell", "", "2", "2", "", ""],
        ["counter", "oven", "", "heat", "", "3", "3", "200.5", ""],
        ["span", "oven", "rack", 'bread, "rye"\n', "", "5", "9", "", rows[3][8]],
        ["flow", "oven", "rack", "sold", "shop/till", "9", "10", "", ""],
    ]
    assert json.loads(rows[3][8]) == {"why": ["a", "b"]}


def test_a_table(tmp_path):
    path = tmp_path / "table.csv"
    write_table_csv([{"a": 1, "b": "x"}, {"a": 2, "b": None}], path)
    assert read(path) == [["a", "b"], ["1", "x"], ["2", ""]]
    write_table_csv([], path)
    assert read(path) == []
