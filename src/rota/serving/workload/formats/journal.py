"""Rota's journals as traces: the requests that came to a router, with the output lengths that they turned out to have.

A request is known whole when it has ended, so that a row is held until then: memory grows with what was in flight. One
that was refused, failed or aborted never showed its output length; the reader stops there unless told to leave such
requests out. Instants are those of arrival, from the first on; what waited for what is not in a journal.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from rota.base.errors import DataError
from rota.base.instant import Duration
from rota.base.journal import FORMAT, VERSION, End, Header
from rota.base.random_streams import RandomStreams
from rota.serving.model.commands import ClusterCommand, Fail, Reject
from rota.serving.model.events import ClientLeft, ClusterEvent, RequestArrived, RequestFinished
from rota.serving.model.request import Request, RequestId
from rota.serving.workload.arrivals import MAX_TOKENS, Arrival
from rota.serving.workload.formats.leniency import SORT_HINT, STRICT, UNFINISHED_HINT, Leniency, Tally
from rota.serving.workload.formats.rota import MAX_HASH, problem_of
from rota.serving.workload.formats.spot import data_error, line_blocks, shown

CLUSTER = "cluster"
DEFAULT_BLOCK_TOKENS = 16


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    seq: int
    machine: str
    at: int
    kind: Literal["event", "deadline"]
    event: msgspec.Raw
    commands: msgspec.Raw


_parse_header = msgspec.json.Decoder(Header).decode
_parse_row = msgspec.json.Decoder(_Row).decode
_parse_end = msgspec.json.Decoder(End).decode
_parse_event = msgspec.json.Decoder(ClusterEvent).decode
_parse_commands = msgspec.json.Decoder(tuple[ClusterCommand, ...]).decode


class JournalFormat:
    """Reads the format."""

    name = "journal"
    first_line = '{"seed": …, "format": "rota-journal", …}'

    def __init__(self, leniency: Leniency = STRICT) -> None:
        self._leniency = leniency
        self.tally = Tally()

    def recognises(self, head: str) -> bool:
        return head.lstrip().startswith("{") and '"rota-journal"' in head.split("\n", 1)[0]

    def read(self, path: Path, streams: RandomStreams | None = None) -> Iterator[Arrival]:
        """Yield the requests in order of arrival. Raises `DataError` at the first row that is not right, and at the
        arrival of a request that never showed its output length."""
        lines = _Lines(path)
        ledger: _Ledger | None = None
        for line, source in lines:
            if ledger is None:
                ledger = _Ledger(path, _block_tokens(lines.header(line, source)), self._leniency, self.tally)
                continue
            row = lines.row(line, source)
            if row is not None and row.machine == CLUSTER:
                ledger.take(line, source, row)
                yield from ledger.ready()
        if ledger is not None:
            ledger.close()
            yield from ledger.ready()
            if not ledger.num_arrived:
                raise data_error(
                    path, lines.num_lines + 1, 1, "no request arrives in this journal",
                    hint="journals of rota simulate and rota serve have requests, those of a vLLM plug-in have not",
                )  # fmt: skip


class _Lines:
    """The lines of a journal; checks that it is one, and that no row of it was changed or lost."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.num_lines = 0
        self._num_rows = 0
        self._digest = hashlib.sha256()
        self._has_ended = False

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        for number, block in line_blocks(self._path):
            lines = block.split(b"\n")
            if lines[-1]:
                line = number + len(lines) - 1
                raise data_error(
                    self._path, line, len(lines[-1]) + 1, "the last line is cut short",
                    hint="its writer was stopped; delete that line to read the rest",
                )  # fmt: skip
            for line, source in enumerate(lines[:-1], start=number):
                self.num_lines = line
                yield line, source

    def header(self, line: int, source: bytes) -> Header:
        header: Header = self._parsed(_parse_header, line, source, "not the header of a journal")
        if header.format != FORMAT or header.version != VERSION:
            raise data_error(self._path, line, 1, f"a journal of version {header.version}, not {VERSION}")
        return header

    def row(self, line: int, source: bytes) -> _Row | None:
        """The next row, or None for the end mark."""
        if self._has_ended:
            raise data_error(self._path, line, 1, "a line after the end mark")
        if source.startswith(b'{"end"'):
            end: End = self._parsed(_parse_end, line, source, "not an end mark")
            if (end.num_rows, end.digest) != (self._num_rows, self._digest.hexdigest()):
                raise data_error(self._path, line, 1, "the end mark does not match the rows: the file was changed")
            self._has_ended = True
            return None
        row: _Row = self._parsed(_parse_row, line, source, "not a journal row")
        if row.seq != self._num_rows:
            raise data_error(self._path, line, 1, f"row {row.seq} where row {self._num_rows} should be")
        self._num_rows += 1
        self._digest.update(source + b"\n")
        return row

    def _parsed(self, parse: Any, line: int, source: bytes, what: str) -> Any:
        return parsed(self._path, line, source, parse, source, what)


def parsed(path: Path, line: int, source: bytes, parse: Any, part: bytes, what: str) -> Any:
    """A part of a line, parsed; an error points at the beginning of the part."""
    try:
        return parse(part)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        column = max(0, source.find(bytes(part))) + 1
        said = str(error)
        raise data_error(path, line, column, f"{what}: {said[:1].lower()}{said[1:]}") from None


class _Known:
    """A request that has arrived."""

    __slots__ = ("column", "line", "num_output_tokens", "request", "why_not")

    def __init__(self, request: Request, line: int, column: int) -> None:
        self.request, self.line, self.column = request, line, column
        self.num_output_tokens: int | None = None
        self.why_not = ""
        """Why its output length will never be known."""


class _Ledger:
    """Requests in order of arrival, until it is known how long their outputs are."""

    def __init__(self, path: Path, block_tokens: int, leniency: Leniency, tally: Tally) -> None:
        self._path, self._block_tokens = path, block_tokens
        self._leniency, self._tally = leniency, tally
        self._open: dict[RequestId, _Known] = {}
        self._in_order: deque[_Known] = deque()
        self._start: int | None = None
        self._latest = 0
        self.num_arrived = 0

    def take(self, line: int, source: bytes, row: _Row) -> None:
        """Note what a row of the router says."""
        if row.kind == "event":
            event = parsed(self._path, line, source, _parse_event, bytes(row.event), "not an event of the router")
            if isinstance(event, RequestArrived):
                self._arrive(line, source.find(bytes(row.event)) + 1, event.request)
            elif isinstance(event, RequestFinished):
                self._finish(line, event)
            elif isinstance(event, ClientLeft):
                self._give_up(event.request_id, "its client left")
        for command in parsed(self._path, line, source, _parse_commands, bytes(row.commands), "not commands"):
            if isinstance(command, Reject | Fail):
                self._give_up(command.request_id, "it was refused" if isinstance(command, Reject) else "it failed")

    def ready(self) -> Iterator[Arrival]:
        """The requests at the head of the line that are known whole."""
        line = self._in_order
        while line and (line[0].num_output_tokens is not None or line[0].why_not):
            known = line.popleft()
            if known.num_output_tokens is not None:
                yield self._arrival(known, known.num_output_tokens)
            elif self._leniency.skip_unfinished:
                self._tally.num_skipped += 1
            else:
                raise self._error(known, f"its output length is not known, as {known.why_not}", UNFINISHED_HINT)

    def close(self) -> None:
        """No more rows come."""
        for known in self._open.values():
            known.why_not = "the journal ends before it does"
        self._open.clear()

    def _arrive(self, line: int, column: int, request: Request) -> None:
        known = _Known(request, line, column)
        if request.id in self._open:
            raise self._error(known, "it arrives twice")
        self._start = request.arrived_at if self._start is None else self._start
        if request.arrived_at < self._latest and not self._leniency.is_unsorted:
            raise self._error(known, "it arrived before the request ahead of it", SORT_HINT)
        self._latest = request.arrived_at
        self._open[request.id] = known
        self._in_order.append(known)
        self.num_arrived += 1

    def _finish(self, line: int, event: RequestFinished) -> None:
        known = self._open.pop(event.request_id, None)
        if known is None:
            return  # aborted before, and the two crossed
        if event.num_output_tokens is None:
            known.why_not = "its engine did not say"
        elif not 1 <= event.num_output_tokens <= MAX_TOKENS:
            raise data_error(
                self._path, line, 1, f"{shown(event.request_id)}: an output of {event.num_output_tokens} tokens"
            )
        else:
            known.num_output_tokens = event.num_output_tokens

    def _give_up(self, request_id: RequestId, why: str) -> None:
        known = self._open.pop(request_id, None)
        if known is not None:
            known.why_not = why

    def _arrival(self, known: _Known, num_output_tokens: int) -> Arrival:
        request = known.request
        arrival = Arrival(
            Duration(request.arrived_at - (self._start or 0)),
            request.num_prompt_tokens,
            num_output_tokens,
            tuple(map(_number, request.block_hashes)),
            request.hash_block_tokens or self._block_tokens,
            session=request.session,
            tenant=request.tenant,
            priority=request.priority,
            program=request.program,
        )
        problem = problem_of(arrival)
        if problem is not None:
            raise self._error(known, f"{problem[0]}: {problem[1]}", problem[2])
        return arrival

    def _error(self, known: _Known, problem: str, hint: str | None = None) -> DataError:
        return data_error(self._path, known.line, known.column, f"{shown(known.request.id)}: {problem}", hint=hint)


def _number(block_hash: object) -> int:
    """A block's hash as a number; what is none already is hashed, since any hashable value may stand for a block."""
    if isinstance(block_hash, int) and 0 <= block_hash <= MAX_HASH:
        return block_hash
    return int.from_bytes(hashlib.blake2b(repr(block_hash).encode(), digest_size=8).digest(), "big")


def _block_tokens(header: Header) -> int:
    """How many tokens a block of the journal's requests has, from the engines that its header describes."""
    try:
        block_size = header.config["instances"][0]["limits"].get("block_size", DEFAULT_BLOCK_TOKENS)
    except (TypeError, KeyError, IndexError, AttributeError):
        return DEFAULT_BLOCK_TOKENS
    return block_size if isinstance(block_size, int) and 1 <= block_size <= MAX_TOKENS else DEFAULT_BLOCK_TOKENS
