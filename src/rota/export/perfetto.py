"""Timelines as Chrome trace events, which ui.perfetto.dev and chrome://tracing open.

The format is the "Trace Event Format" of the Chromium project, as a JSON object. A resource is a process, a track is a
thread of it. Times are microseconds, as floats, since the format has no finer unit.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from rota.base.timeline import AsyncSpan, Flow, FlowEnd, Mark, Sample, Span, Timeline

_NANOSECONDS_PER_MICROSECOND = 1_000
_CATEGORY = "rota"

_encode = msgspec.json.Encoder().encode


def write_perfetto(timeline: Timeline, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the timeline to a file, one event a line. `metadata` (the provenance, say) lands under `otherData`."""
    with Path(path).open("wb") as file:
        file.write(b'{"traceEvents":[')
        separator = b"\n"
        for event in trace_events(timeline):
            file.write(separator + _encode(event))
            separator = b",\n"
        file.write(b'\n],"displayTimeUnit":"ms","otherData":' + _encode(metadata or {}) + b"}\n")


def trace_events(timeline: Timeline) -> Iterator[dict[str, Any]]:
    """The timeline's events in the trace-event format: names of processes and threads first, then items by start."""
    places = _Places(timeline)
    yield from places.names()
    num_flows = 0
    for item in timeline.by_start():
        if isinstance(item, Flow):
            yield from _flow_events(item, num_flows, places)
            num_flows += 1
        else:
            yield from _item_events(item, places)


class _Places:
    """Numbers for resources and tracks, in order of first appearance."""

    def __init__(self, timeline: Timeline) -> None:
        self.processes = {name: number for number, name in enumerate(timeline.resources(), start=1)}
        self.threads: dict[tuple[str, str], int] = {}
        for item in timeline:
            if isinstance(item, (Span, Mark)):
                self._number(item.resource, item.track)
            elif isinstance(item, Flow):
                self._number(item.source.resource, item.source.track)
                self._number(item.target.resource, item.target.track)

    def _number(self, resource: str, track: str) -> None:
        self.threads.setdefault((resource, track), len(self.threads) + 1)

    def names(self) -> Iterator[dict[str, Any]]:
        for name, pid in self.processes.items():
            yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
            yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
        for (resource, track), tid in self.threads.items():
            pid = self.processes[resource]
            yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": track}}

    def track(self, resource: str, track: str) -> dict[str, Any]:
        return {"pid": self.processes[resource], "tid": self.threads[resource, track]}


def _item_events(item: Span | AsyncSpan | Mark | Sample, places: _Places) -> Iterator[dict[str, Any]]:
    common = {"name": item.name, "cat": _CATEGORY, "ts": _microseconds(item.start)}
    if isinstance(item, Span):
        duration = _microseconds(item.end - item.start)
        place = places.track(item.resource, item.track)
        yield {"ph": "X", **common, "dur": duration, **place, "args": dict(item.args)}
    elif isinstance(item, AsyncSpan):
        # Only the pair (category, id) ties the two ends together, so the id must be told apart between resources.
        place = {"id": f"{item.resource}/{item.id}", "pid": places.processes[item.resource], "tid": 0}
        yield {"ph": "b", **common, **place, "args": dict(item.args)}
        yield {"ph": "e", **common, "ts": _microseconds(item.end), **place, "args": {}}
    elif isinstance(item, Mark):
        yield {"ph": "i", **common, "s": "t", **places.track(item.resource, item.track), "args": dict(item.args)}
    else:
        yield {"ph": "C", **common, "pid": places.processes[item.resource], "args": {item.name: item.value}}


def _flow_events(flow: Flow, number: int, places: _Places) -> Iterator[dict[str, Any]]:
    def end(phase: str, place: FlowEnd) -> dict[str, Any]:
        common = {"ph": phase, "name": flow.name, "cat": _CATEGORY, "id": number, "ts": _microseconds(place.at)}
        return {**common, **places.track(place.resource, place.track)}

    yield end("s", flow.source)
    # "e" binds the arrow to the span that is open at its end, not to the next one.
    yield {**end("f", flow.target), "bp": "e"}


def _microseconds(nanoseconds: int) -> float:
    return nanoseconds / _NANOSECONDS_PER_MICROSECOND
