"""Timelines and tables as CSV, for spreadsheets and data frames."""

import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from rota.base.timeline import AsyncSpan, Flow, Mark, Sample, Span, Timeline

COLUMNS = ("kind", "resource", "track", "name", "id", "start_ns", "end_ns", "value", "args")


def write_timeline_csv(timeline: Timeline, path: str | Path) -> None:
    """One row an item, by start. A flow's row has its source; its target, as `resource/track`, is in `id`."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(_rows(timeline))


def write_table_csv(rows: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Rows of equal columns, with the columns of the first as the header. No rows give an empty file."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer: csv.DictWriter[str] | None = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(file, fieldnames=list(row))
                writer.writeheader()
            writer.writerow(row)


def _rows(timeline: Timeline) -> Iterator[tuple[Any, ...]]:
    for item in timeline.by_start():
        if isinstance(item, Span):
            yield "span", item.resource, item.track, item.name, "", item.start, item.end, "", _json(item.args)
        elif isinstance(item, AsyncSpan):
            yield "async_span", item.resource, "", item.name, item.id, item.start, item.end, "", _json(item.args)
        elif isinstance(item, Mark):
            yield "instant", item.resource, item.track, item.name, "", item.start, item.start, "", _json(item.args)
        elif isinstance(item, Sample):
            yield "counter", item.resource, "", item.name, "", item.start, item.start, item.value, ""
        elif isinstance(item, Flow):
            source, target = item.source, item.target
            there = f"{target.resource}/{target.track}"
            yield "flow", source.resource, source.track, item.name, there, source.at, target.at, "", ""


def _json(args: Mapping[str, Any]) -> str:
    return str(msgspec.json.encode(args), "utf-8") if args else ""
