"""Trace formats: one file each, found by what a file holds and never by its name.

A format is an object with `recognises`, `read` and, where it can be written, `write`. To add one: a file here, a line
in `FORMATS`, and a test that calls `rota.testing.formats.check_format`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from rota.base.errors import ConfigError, DataError
from rota.base.random_streams import RandomStreams
from rota.base.registry import Registry
from rota.serving.workload.arrivals import Arrival, Fact
from rota.serving.workload.formats.leniency import STRICT, Leniency, Tally
from rota.serving.workload.formats.spot import read_head


class TraceReader(Protocol):
    """What reads one format."""

    name: str
    tally: Tally
    """What the last `read` left out or changed."""
    first_line: str
    """What a file of this format begins with, for people."""

    def recognises(self, head: str) -> bool:
        """Whether a file that begins with the text `head` (64 KiB at most) is meant to be of this format, even if it
        then turns out to be a broken one."""
        ...

    def read(self, path: Path, streams: RandomStreams) -> Iterator[Arrival]:
        """Yield arrivals one by one, in order of time. Raises `DataError` naming file, line and column at the first row
        that is not right. `streams` serves formats that describe a workload rather than list it."""
        ...


class TraceWriter(Protocol):
    """What writes one format."""

    name: str
    holds: frozenset[Fact]
    """What it can say beyond times and lengths."""

    def write(self, path: Path, arrivals: Iterable[Arrival]) -> int:
        """Write arrivals, creating or replacing the file; returns how many. Raises `DataError` for one that the format
        cannot hold, rather than lose a part of it."""
        ...


FORMATS = Registry(
    "format",
    {
        "agents": "rota.serving.workload.formats.agents:AgentsFormat",
        "azure": "rota.serving.workload.formats.azure:AzureFormat",
        "burstgpt": "rota.serving.workload.formats.burstgpt:BurstgptFormat",
        "journal": "rota.serving.workload.formats.journal:JournalFormat",
        "mooncake": "rota.serving.workload.formats.mooncake:MooncakeFormat",
        "parquet": "rota.serving.workload.formats.parquet:ParquetFormat",
        "rota": "rota.serving.workload.formats.rota:RotaFormat",
        "sharegpt": "rota.serving.workload.formats.sharegpt:SharegptFormat",
        "sharegpt_lengths": "rota.serving.workload.formats.sharegpt_lengths:SharegptLengthsFormat",
        "synthetic": "rota.serving.workload.formats.synthetic:SyntheticFormat",
    },
    entry_point_group="rota.formats",
)

WRITTEN = ("agents", "azure", "burstgpt", "mooncake", "parquet", "rota")
"""Formats of the table that can be written."""

_HEAD_BYTES = 64 * 1024


def recognise(path: Path, leniency: Leniency = STRICT) -> TraceReader:
    """Which format a file is of, by its beginning. Raises `DataError` if it cannot be read or none claims it."""
    raw = read_head(path, _HEAD_BYTES)
    if not raw.strip():
        raise DataError(f"{path}:1:1: the file is empty")
    head = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    readers = []
    for name in FORMATS.names():  # one by one: a format that nobody needs is not imported
        readers.append(reader_of(name, leniency))
        if readers[-1].recognises(head):
            return readers[-1]
    known = "; ".join(f"{reader.name} begins with {reader.first_line}" for reader in readers)
    raise DataError(f"{path}:1:1: not a trace of a known format", hint=known)


def reader_of(name: str, leniency: Leniency = STRICT) -> TraceReader:
    """A format by its name."""
    reader: TraceReader = FORMATS.create(name, services={"leniency": leniency})
    return reader


def writer_of(name: str) -> TraceWriter:
    """A format that can be written, by its name."""
    writer: TraceWriter = FORMATS.create(name)
    if not hasattr(writer, "write"):
        raise ConfigError(f"the {name} format is read only", hint=f"written are {', '.join(WRITTEN)}")
    return writer


def read_trace(
    path: Path, streams: RandomStreams, *, format_name: str | None = None, leniency: Leniency = STRICT
) -> Iterator[Arrival]:
    """Read a trace of a format that is named, or else recognised."""
    reader = recognise(path, leniency) if format_name is None else reader_of(format_name, leniency)
    return reader.read(path, streams)
