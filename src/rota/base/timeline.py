"""What ran where and when: resources × intervals, the neutral data that every Gantt chart and trace is made of.

A resource is a thing that work runs on (a machine, an oven, a link); a track is one lane of it. Exporters read this and
nothing else.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rota.base.errors import DataError
from rota.base.instant import Instant


@dataclass(slots=True)
class Span:
    """Something that took a while on one track. Spans of one track nest or follow each other; they never cross."""

    resource: str
    track: str
    name: str
    start: Instant
    end: Instant
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class AsyncSpan:
    """Something that took a while and may cross others; `id` ties together the parts of one thing."""

    id: str
    resource: str
    name: str
    start: Instant
    end: Instant
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Mark:
    """Something that took no time."""

    resource: str
    track: str
    name: str
    start: Instant
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Sample:
    """The value of a counter from here until its next sample."""

    resource: str
    name: str
    start: Instant
    value: float


@dataclass(slots=True)
class FlowEnd:
    """Where and when an arrow begins or ends. It attaches to the span that is open there."""

    resource: str
    track: str
    at: Instant


@dataclass(slots=True)
class Flow:
    """An arrow from one place and time to another."""

    name: str
    source: FlowEnd
    target: FlowEnd

    @property
    def start(self) -> Instant:
        """When the arrow leaves its source."""
        return self.source.at


TimelineItem = Span | AsyncSpan | Mark | Sample | Flow


class Timeline:
    """A list of items, in the order in which they were added. Adding an item that ends before it starts raises
    `DataError`."""

    def __init__(self) -> None:
        self.items: list[TimelineItem] = []

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[TimelineItem]:
        return iter(self.items)

    def by_start(self) -> list[TimelineItem]:
        """The items by start; longer spans come first among equals, so that an outer span precedes the inner."""
        return sorted(self.items, key=lambda item: (item.start, -_end(item)))

    def resources(self) -> list[str]:
        """Every resource that some item names, in order of first appearance."""
        names: dict[str, None] = {}
        for item in self.items:
            if isinstance(item, Flow):
                names.setdefault(item.source.resource)
                names.setdefault(item.target.resource)
            else:
                names.setdefault(item.resource)
        return list(names)

    def add_span(
        self,
        resource: str,
        track: str,
        name: str,
        start: Instant,
        end: Instant,
        args: Mapping[str, Any] | None = None,
    ) -> None:
        """Something ran on a track from `start` to `end`."""
        _must_not_end_before(name, start, end)
        self.items.append(Span(resource, track, name, start, end, args or {}))

    def add_async_span(
        self, id: str, resource: str, name: str, start: Instant, end: Instant, args: Mapping[str, Any] | None = None
    ) -> None:
        """Something went on at a resource from `start` to `end`, whatever else did."""
        _must_not_end_before(f"{name} {id}", start, end)
        self.items.append(AsyncSpan(id, resource, name, start, end, args or {}))

    def add_instant(
        self, resource: str, track: str, name: str, at: Instant, args: Mapping[str, Any] | None = None
    ) -> None:
        """Something happened on a track."""
        self.items.append(Mark(resource, track, name, at, args or {}))

    def add_counter(self, resource: str, name: str, at: Instant, value: float) -> None:
        """A counter has this value from now on."""
        self.items.append(Sample(resource, name, at, value))

    def add_flow(self, name: str, source: tuple[str, str, Instant], target: tuple[str, str, Instant]) -> None:
        """An arrow; both ends are `(resource, track, at)`."""
        _must_not_end_before(name, source[2], target[2])
        self.items.append(Flow(name, FlowEnd(*source), FlowEnd(*target)))


def _end(item: TimelineItem) -> int:
    return item.end if isinstance(item, (Span, AsyncSpan)) else item.start


def _must_not_end_before(name: str, start: Instant, end: Instant) -> None:
    if end < start:
        raise DataError(f"timeline: {name!r} ends at {end}, {start - end} ns before it starts")
