"""The records of a run as a Parquet file, written while the run goes on."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rota.serving.metrics.definitions import RequestRecord

ROWS_PER_GROUP = 16_384


class RecordsFile:
    """Takes records as they end and writes them in groups, so that no more than one group is in memory.

    One row a request: `id, tenant, status, reason, instance` (texts), `priority`, `arrived_ns, first_token_ns,
    finished_ns` (instants; null where there is none), `num_prompt_tokens, num_output_tokens, num_cached_tokens,
    num_preemptions, num_migrations`, `downtime_ns`, `meets_slo`. Raises `OSError` where the file cannot be written."""

    def __init__(self, path: Path) -> None:
        # Heavy to import, and most runs write no records.
        import pyarrow as pa
        import pyarrow.parquet as pq

        texts = {name: pa.string() for name in ("id", "tenant", "status", "reason", "instance")}
        numbers = {name: pa.int64() for name in ("priority", "arrived_ns", "first_token_ns", "finished_ns")}
        counts = {
            f"num_{name}": pa.int64()
            for name in ("prompt_tokens", "output_tokens", "cached_tokens", "preemptions", "migrations")
        }
        self._schema = pa.schema({**texts, **numbers, **counts, "downtime_ns": pa.int64(), "meets_slo": pa.bool_()})
        self._table = pa.Table
        self._writer = pq.ParquetWriter(path, self._schema)
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        self._writer.close()

    def add(self, record: RequestRecord) -> None:
        """Take the record of one request that has ended."""
        self._rows.append(
            {
                "id": record.id,
                "tenant": record.tenant,
                "status": record.status,
                "reason": record.reason,
                "instance": record.instance_id,
                "priority": record.priority,
                "arrived_ns": record.arrived_at,
                "first_token_ns": record.first_token_at,
                "finished_ns": record.finished_at,
                "num_prompt_tokens": record.num_prompt_tokens,
                "num_output_tokens": record.num_output_tokens,
                "num_cached_tokens": record.num_cached_tokens,
                "num_preemptions": record.num_preemptions,
                "num_migrations": record.num_migrations,
                "downtime_ns": record.downtime,
                "meets_slo": record.meets_slo,
            }
        )
        if len(self._rows) >= ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(self._table.from_pylist(self._rows, schema=self._schema))
            self._rows = []
