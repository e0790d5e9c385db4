"""What a system was told and what it ordered: append-only rows that can be hashed, read back, replayed and compared.

A row is written before its commands are carried out, so that after a crash the journal knows at least as much as the
world does. A file is JSON lines: a header, the rows, and an end mark that says whether, and why, it is complete.
"""

import hashlib
import types
from collections.abc import Iterator, Mapping, Sequence
from io import SEEK_CUR
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

import msgspec

from rota import __version__
from rota.base.config import config_hash
from rota.base.errors import DataError
from rota.base.instant import Instant

FORMAT = "rota-journal"
VERSION = 2
"""2: a command stands for one step; steps say why somebody was not served."""

RowKind = Literal["event", "deadline"]
RowTypes = Mapping[str, tuple[Any, Any]]
"""Machine name, or a prefix of it (the longest wins), to the types of its events and of its commands."""

_encode = msgspec.json.Encoder(order="deterministic").encode


class Header(msgspec.Struct, frozen=True):
    """What made this journal. Not part of the digest: the same run under another version must hash the same."""

    seed: int | None
    config_hash: str
    config: Any = None
    rota_version: str = __version__
    format: str = FORMAT
    version: int = VERSION


class Row(msgspec.Struct, frozen=True):
    """One thing that one machine was told, and the commands that it gave in answer."""

    seq: int
    """0 for the first row of a journal, one more for each."""
    machine: str
    at: Instant
    kind: RowKind
    event: Any
    """None for a deadline."""
    commands: tuple[Any, ...]


class End(msgspec.Struct, frozen=True):
    """The last line of a file."""

    end: Literal["closed", "full"]
    """`full`: the file reached its limit of bytes, and the run went on without it."""
    num_rows: int
    digest: str


def header_for(config: object, seed: int | None) -> Header:
    """The header of a run with this configuration (anything that JSON can hold)."""
    return Header(seed=seed, config_hash=config_hash(config), config=config)


class Journal:
    """Takes rows, in memory, into a file, or only into its digest.

    `max_bytes` bounds what is kept: the first row that would pass it writes an end mark that says so, `is_full` turns
    true, and only the digest goes on. Closing writes the end mark of a complete journal.
    """

    def __init__(
        self, header: Header, *, path: str | Path | None = None, keep_rows: bool = False, max_bytes: int | None = None
    ) -> None:
        self.header = header
        self.rows: list[Row] = []
        """The rows, if asked to keep them."""
        self.num_rows = 0
        self.is_full = False
        self._keep_rows = keep_rows
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._num_kept = 0
        self._hash = hashlib.sha256()
        self._file: BinaryIO | None = None
        if path is not None:
            try:
                self._file = Path(path).open("wb")  # noqa: SIM115 - closed by `close`
            except OSError as error:
                raise DataError(f"{path}: the journal cannot be written: {error.strerror}") from None
            self._file.write(_encode(header) + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def digest(self) -> str:
        """SHA-256, in hex, over every row so far."""
        return self._hash.hexdigest()

    def append(self, machine: str, at: Instant, kind: RowKind, event: object, commands: Sequence[object]) -> Row:
        """Write one row. Call it before the commands are carried out."""
        row = Row(self.num_rows, machine, at, kind, event, tuple(commands))
        line = _encode(row) + b"\n"
        self.num_rows += 1
        if not self.is_full:
            self._keep(row, line)
        self._hash.update(line)
        return row

    def flush(self) -> None:
        """Hand every row so far to the operating system, where a crash of this process cannot lose it."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Write the end mark and close the file. Closing twice is harmless."""
        if self._file is not None:
            if not self.is_full:
                self._write_end("closed")
            self._file.close()
            self._file = None

    def _keep(self, row: Row, line: bytes) -> None:
        self._num_bytes += len(line)
        if self._max_bytes is not None and self._num_bytes > self._max_bytes:
            self._write_end("full")
            self.is_full = True
            return
        self._num_kept += 1
        if self._keep_rows:
            self.rows.append(row)
        if self._file is not None:
            self._file.write(line)

    def _write_end(self, why: Literal["closed", "full"]) -> None:
        if self._file is not None:
            self._file.write(_encode(End(why, self._num_kept, self.digest)) + b"\n")


# --- reading ----------------------------------------------------------------------------------------------------------


class _RawRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    seq: int
    machine: str
    at: int
    kind: RowKind
    event: msgspec.Raw
    commands: msgspec.Raw


_parse_header = msgspec.json.Decoder(Header).decode
_parse_row = msgspec.json.Decoder(_RawRow).decode
_parse_end = msgspec.json.Decoder(End).decode


def read_journal(path: str | Path, row_types: RowTypes) -> "JournalFile":
    """Open a journal file. The header is read and checked now, the rows whenever the result is iterated over."""
    return JournalFile(path, row_types)


class JournalFile:
    """A journal on disk; iterating over it gives its rows.

    Everything that is wrong is a `DataError` with file and line: a row that cannot be read, one that is missing, a last
    line cut short, an end mark that does not match the rows.
    """

    def __init__(self, path: str | Path, row_types: RowTypes) -> None:
        self.path = Path(path)
        self.end: End | None = None
        """The end mark, after a whole iteration; None if the writer was stopped before it could write one."""
        self._types = row_types
        self._parsers: dict[str, tuple[Any, Any]] = {}
        self.header = self._read_header()

    def __iter__(self) -> Iterator[Row]:
        for row in self._rows(grows=False):
            assert row is not None
            yield row

    def follow(self) -> Iterator[Row | None]:
        """As iterating, for a file that is still being written: where it ends without an end mark, each step gives None
        until there is another whole line."""
        return self._rows(grows=True)

    def _rows(self, *, grows: bool) -> Iterator[Row | None]:
        digest = hashlib.sha256()
        num_rows = 0
        self.end = None
        with self._open() as file:
            file.readline()
            for number in count(2):
                spot = f"{self.path}:{number}"
                while not (line := file.readline()).endswith(b"\n"):
                    if self.end is not None and not line:
                        return
                    if not grows:
                        if not line:
                            return
                        raise DataError(
                            f"{spot}: the last line is cut short",
                            hint="its writer was stopped; delete that line to read the rest",
                        )
                    file.seek(-len(line), SEEK_CUR)
                    yield None
                if self.end is not None:
                    raise DataError(f"{spot}: a line after the end mark")
                if line.startswith(b'{"end"'):
                    self.end = self._read_end(line, spot, num_rows, digest.hexdigest())
                    continue
                row = self._read_row(line, spot)
                if row.seq != num_rows:
                    raise DataError(f"{spot}: row {row.seq} where row {num_rows} should be")
                num_rows += 1
                digest.update(line)
                yield row

    def _open(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise DataError(f"{self.path}: the journal cannot be read: {error.strerror}") from None

    def _read_header(self) -> Header:
        with self._open() as file:
            line = file.readline()
        try:
            header = _parse_header(line)
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise DataError(f"{self.path}:1: not the header of a journal: {error}") from None
        if header.format != FORMAT or header.version != VERSION:
            raise DataError(
                f"{self.path}:1: format {header.format!r} version {header.version}, not {FORMAT!r} version {VERSION}",
                hint=f"it was written by rota {header.rota_version}; this is rota {__version__}",
            )
        return header

    def _read_end(self, line: bytes, spot: str, num_rows: int, digest: str) -> End:
        try:
            end = _parse_end(line)
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise DataError(f"{spot}: not an end mark: {error}") from None
        if (end.num_rows, end.digest) != (num_rows, digest):
            raise DataError(
                f"{spot}: the end mark speaks of {end.num_rows} rows with digest {end.digest[:16]}…; "
                f"the file has {num_rows} with {digest[:16]}…",
                hint="the file was changed after it was written",
            )
        return end

    def _read_row(self, line: bytes, spot: str) -> Row:
        try:
            raw = _parse_row(line)
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise DataError(f"{spot}: not a journal row: {error}") from None
        parse_event, parse_commands = self._parsers_of(raw.machine, spot)
        try:
            event = parse_event(raw.event) if raw.kind == "event" else None
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise DataError(f"{spot}: not an event of {raw.machine!r}: {error}") from None
        try:
            commands = parse_commands(raw.commands)
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise DataError(f"{spot}: not commands of {raw.machine!r}: {error}") from None
        return Row(raw.seq, raw.machine, Instant(raw.at), raw.kind, event, commands)

    def _parsers_of(self, machine: str, spot: str) -> tuple[Any, Any]:
        parsers = self._parsers.get(machine)
        if parsers is None:
            prefixes = [prefix for prefix in self._types if machine.startswith(prefix)]
            if not prefixes:
                raise DataError(f"{spot}: unknown machine {machine!r}", hint=f"known: {', '.join(sorted(self._types))}")
            event_type, command_type = self._types[max(prefixes, key=len)]
            commands_type = types.GenericAlias(tuple, (command_type, ...))
            parsers = (msgspec.json.Decoder(event_type).decode, msgspec.json.Decoder(commands_type).decode)
            self._parsers[machine] = parsers
        return parsers
