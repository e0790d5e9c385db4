"""The columns of a trace: what was written reads back equal, what is not right is named by row and column."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from tests.unit.workload.test_formats import programs

from rota.base.errors import DataError
from rota.base.instant import Duration
from rota.base.random_streams import RandomStreams
from rota.serving.workload.arrivals import Arrival
from rota.serving.workload.formats import read_trace, recognise
from rota.serving.workload.formats.parquet import BATCH_ROWS, COLUMNS, ParquetFormat

ROWS = [Arrival(Duration(number), 40, 2, (number, 7), 16, session="s") for number in range(3)]


def written(path: Path, rows: list[Arrival] = ROWS) -> pa.Table:
    ParquetFormat().write(path, rows)
    return pq.read_table(path)


@settings(max_examples=30, deadline=None)
@given(programs())
def test_what_was_written_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, rows: list[Arrival]) -> None:
    path = tmp_path_factory.mktemp("parquet") / "trace"
    assert ParquetFormat().write(path, rows) == len(rows)
    assert recognise(path).name == "parquet"
    assert list(read_trace(path, RandomStreams(0))) == rows


def test_rows_of_several_groups_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    rows = [Arrival(Duration(number), 40, 2) for number in range(BATCH_ROWS + 10)]
    rows[BATCH_ROWS + 5] = Arrival(Duration(3), 40, 2)
    ParquetFormat().write(path, rows)
    with pytest.raises(DataError) as caught:
        list(read_trace(path, RandomStreams(0)))
    assert caught.value.message.startswith(f"{path}:{BATCH_ROWS + 6}:1: at: 3 is earlier")


def cut(table: pa.Table, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (cut, ":1:1: not a Parquet file that can be read"),
        (lambda t, p: pq.write_table(t.replace_schema_metadata({}), p), ":1:1: a Parquet file, but not a trace"),
        (
            lambda t, p: pq.write_table(t.drop(["gap"]), p),
            f":1:{COLUMNS.index('gap') + 1}: gap: this column is missing",
        ),
        (
            lambda t, p: pq.write_table(t.append_column("cost", pa.array([1, 2, 3])), p),
            f":1:{len(COLUMNS) + 1}: 'cost': unknown column",
        ),
        (
            lambda t, p: pq.write_table(t.set_column(0, "at", pa.array([0.0, 1.0, 2.0])), p),
            ":1:1: at: of type double, not int64",
        ),
        (
            lambda t, p: pq.write_table(t.set_column(1, "num_prompt_tokens", pa.array([40, None, 40], pa.int32())), p),
            ":2:2: num_prompt_tokens: a value is missing",
        ),
        (
            lambda t, p: pq.write_table(t.set_column(2, "num_output_tokens", pa.array([1, 1, -1], pa.int32())), p),
            ":3:3: num_output_tokens: expected a whole number",
        ),
        (
            lambda t, p: pq.write_table(
                t.set_column(COLUMNS.index("id"), "id", pa.array(["a", "a", "a"])).set_column(
                    COLUMNS.index("after"), "after", pa.array([[], ["a"], ["b"]])
                ),
                p,
            ),
            f":2:{COLUMNS.index('id') + 1}: id: 'a' is the id of a row before",
        ),
        (
            lambda t, p: pq.write_table(
                t.set_column(3, "prefix_hashes", pa.array([[1], [1, None], [1]], pa.list_(pa.uint64()))), p
            ),
            ":2:4: prefix_hashes: a value is missing",
        ),
        (lambda t, p: pq.write_table(t.slice(0, 0), p), ":1:1: no rows"),
    ],
    ids=[
        "cut",
        "another table",
        "a column less",
        "a column more",
        "a type",
        "a hole",
        "negative",
        "ids",
        "a hole in a list",
        "empty",
    ],
)
def test_what_is_not_right_is_named(tmp_path: Path, change: object, expected: str) -> None:
    path = tmp_path / "trace"
    change(written(path), path)  # type: ignore[operator]
    with pytest.raises(DataError) as caught:
        list(read_trace(path, RandomStreams(0)))
    assert caught.value.message.startswith(f"{path}{expected}"), caught.value.message


def test_numpy_integers_do_not_get_in(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    written(path)
    first = next(iter(read_trace(path, RandomStreams(0))))
    assert type(first.at) is int and type(first.prefix_hashes) is tuple
