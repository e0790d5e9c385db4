"""Rota's own trace format as Parquet: a column for every field of `Arrival`, for data frames and for large traces.

The rules are those of the `rota` format. An error names the row, counted from 1, and the column's number.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rota.base.errors import DataError
from rota.base.instant import Duration
from rota.base.random_streams import RandomStreams
from rota.serving.model.request import TenantId
from rota.serving.workload.arrivals import Arrival, Fact
from rota.serving.workload.formats.leniency import STRICT, Leniency, Tally
from rota.serving.workload.formats.rota import OrderRule, Problem, problem_of
from rota.serving.workload.formats.spot import data_error

if TYPE_CHECKING:
    import pyarrow as pa

MAGIC = "PAR1"
BATCH_ROWS = 4_096
"""Rows in memory at a time, and in a row group."""
COLUMNS = Arrival.__struct_fields__
_VERSION_KEY, _VERSION = b"rota-trace", b"1"


class ParquetFormat:
    """Reads and writes the format."""

    name = "parquet"
    first_line = MAGIC
    holds: frozenset[Fact] = frozenset({"prefixes", "sessions", "tenants", "priorities", "programs", "waits"})

    def __init__(self, leniency: Leniency = STRICT) -> None:
        self._is_unsorted = leniency.is_unsorted
        self.tally = Tally()

    def recognises(self, head: str) -> bool:
        return head.startswith(MAGIC)

    def read(self, path: Path, streams: RandomStreams | None = None) -> Iterator[Arrival]:
        """Yield arrivals. Raises `DataError` at the first bad row, and for a file with other columns."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rule = OrderRule(is_unsorted=self._is_unsorted)
        number = 0
        try:
            with pq.ParquetFile(path) as file:
                _check_schema(path, file.schema_arrow)
                for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(COLUMNS)):
                    for values in batch.to_pylist():
                        number += 1
                        arrival = _arrival(path, number, values)
                        problem = problem_of(arrival) or rule.problem_of(arrival)
                        if problem is not None:
                            raise _error(path, number, problem)
                        yield arrival
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:  # ValueError: names that are not UTF-8
            said = " ".join(str(error).split())
            raise data_error(path, number + 1, 1, f"not a Parquet file that can be read: {said[:200]}") from None
        if not number:
            raise data_error(path, 1, 1, "no rows")

    def write(self, path: Path, arrivals: Iterable[Arrival]) -> int:
        """Write any arrivals that keep the rule of `Arrival`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = _schema()
        rows = iter(arrivals)
        num_rows = 0
        with pq.ParquetWriter(path, schema, compression="zstd") as file:
            while batch := list(islice(rows, BATCH_ROWS)):
                columns = [[getattr(arrival, name) for arrival in batch] for name in COLUMNS]
                file.write_batch(pa.record_batch(columns, schema=schema))
                num_rows += len(batch)
        return num_rows


def _schema() -> "pa.Schema":
    import pyarrow as pa

    types = {
        "at": pa.int64(),
        "num_prompt_tokens": pa.int32(),
        "num_output_tokens": pa.int32(),
        "prefix_hashes": pa.list_(pa.uint64()),
        "hash_block_tokens": pa.int32(),
        "priority": pa.int32(),
        "after": pa.list_(pa.string()),
        "gap": pa.int64(),
    }
    may_be_null = ("session", "program", "id")
    fields = [pa.field(name, types.get(name, pa.string()), nullable=name in may_be_null) for name in COLUMNS]
    return pa.schema(fields, metadata={_VERSION_KEY: _VERSION})


def _check_schema(path: Path, found: "pa.Schema") -> None:
    expected = _schema()
    if (found.metadata or {}).get(_VERSION_KEY) != _VERSION:
        raise data_error(path, 1, 1, "a Parquet file, but not a trace that Rota wrote")
    for place, field in enumerate(expected, start=1):
        if field.name not in found.names:
            raise data_error(path, 1, place, f"{field.name}: this column is missing")
        if found.field(field.name).type != field.type:
            raise data_error(path, 1, place, f"{field.name}: of type {found.field(field.name).type}, not {field.type}")
    more = sorted(set(found.names) - set(expected.names))
    if more:
        raise data_error(path, 1, found.names.index(more[0]) + 1, f"{more[0]!r}: unknown column")


def _arrival(path: Path, number: int, values: dict[str, Any]) -> Arrival:
    for name, value in values.items():
        is_empty = value is None and name not in ("session", "program", "id")
        if is_empty or (isinstance(value, list) and None in value):
            raise _error(path, number, (name, "a value is missing", None))
    return Arrival(
        **values
        | {
            "at": Duration(values["at"]),
            "prefix_hashes": tuple(values["prefix_hashes"]),
            "tenant": TenantId(values["tenant"]),
            "after": tuple(values["after"]),
            "gap": Duration(values["gap"]),
        }
    )


def _error(path: Path, number: int, problem: Problem) -> DataError:
    name, said, hint = problem
    return data_error(path, number, COLUMNS.index(name) + 1, f"{name}: {said}", hint=hint)
