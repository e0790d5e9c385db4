"""Azure LLM inference traces of 2023 and 2024: CSV with `TIMESTAMP,ContextTokens,GeneratedTokens`.

The files of 2023 have CRLF line ends, no line end after the last row, and timestamps with seven fractional digits
(100 ns) and no zone; those of 2024 have six digits and `+00:00`. Both are read as exact integers; either every row of a
file has a zone or none has. No row of 2023 has zero tokens, so zero is an error unless asked otherwise: an answer of no
tokens has no first token to wait for.
"""

import re
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path

from rota.base.errors import DataError
from rota.base.instant import NANOSECONDS_PER_SECOND, Duration
from rota.base.random_streams import RandomStreams
from rota.serving.workload.arrivals import MAX_TOKENS, Arrival, Fact, refuse_more
from rota.serving.workload.formats.columns import MAX_SPAN_SECONDS, CsvRow, header_fields, wrong_header
from rota.serving.workload.formats.leniency import SORT_HINT, STRICT, Leniency, Tally
from rota.serving.workload.formats.spot import block_lines, data_error, line_blocks, shown

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

_TIMESTAMP = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2}) ([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]{1,9}))?"
    r"(Z|[+-][0-9]{2}:?[0-9]{2})?"
)
_ROW = rb"^(.{16}):([0-5][0-9])(?:\.([0-9]{1,9}))?%s,([0-9]{1,10}),([0-9]{1,10})\r?$"
_ROWS = {
    False: re.compile(_ROW % b"", re.MULTILINE),
    True: re.compile(_ROW % rb"(?:\+00:00|Z)", re.MULTILINE),
}
"""Good rows without and with a zone, up to the minute, its seconds, their fraction and the two counts."""
_SCALE = [0] + [10 ** (9 - digits) for digits in range(1, 10)]
"""Nanoseconds of the last of so many fractional digits."""
_EPOCH_DAY = date(1970, 1, 1).toordinal()
_MAX_MINUTES_KEPT = 4096


class AzureFormat:
    """Reads and writes the format. It holds times and lengths only."""

    name = "azure"
    first_line = ",".join(COLUMNS)
    holds: frozenset[Fact] = frozenset()

    def __init__(self, leniency: Leniency = STRICT) -> None:
        self._leniency = leniency
        self.tally = Tally()

    def recognises(self, head: str) -> bool:
        # One known column is enough: the reader then says what is wrong with the others.
        return not header_fields(head).isdisjoint(COLUMNS)

    def read(self, path: Path, streams: RandomStreams | None = None) -> Iterator[Arrival]:
        """Yield arrivals; the first row is the start of the trace. Raises `DataError` at the first bad row."""
        reading = _Reading(path, self._leniency, self.tally)
        for number, block in line_blocks(path):
            rows = reading.at_once(block) if reading.has_begun else None
            yield from reading.one_by_one(number, block) if rows is None else rows
        reading.finish()

    def write(self, path: Path, arrivals: Iterable[Arrival]) -> int:
        """Write arrivals with timestamps that begin at 1970-01-01, nine digits where 100 ns are too coarse.

        Raises `DataError` for an arrival with more than a time and lengths, and for a first one that does not lie at 0,
        since readers count from the first row.
        """
        num_rows = 0
        with path.open("w", encoding="utf-8", newline="") as file:
            file.write(self.first_line + "\r\n")
            for arrival in arrivals:
                num_rows += 1
                _check_writable(num_rows, arrival)
                file.write(f"{_stamp(arrival.at)},{arrival.num_prompt_tokens},{arrival.num_output_tokens}\r\n")
        return num_rows


class _Reading:
    """One pass over a file: where it began and how far it has come."""

    def __init__(self, path: Path, leniency: Leniency, tally: Tally) -> None:
        self.path = path
        self.line = 0
        self._zero = leniency.zero or "refuse"
        self._is_unsorted = leniency.is_unsorted
        self._tally = tally
        self._start: int | None = None
        self._latest = 0
        self._has_zone = False
        self._minutes: dict[bytes, int] = {}

    @property
    def has_begun(self) -> bool:
        return self._start is not None

    def at_once(self, block: bytes) -> list[Arrival] | None:
        """The rows of a block, or None if any of them needs a closer look."""
        found = _ROWS[self._has_zone].findall(block)
        # A match never crosses a line, so that as many matches as lines means that every line is a good one.
        if len(found) != block.count(b"\n") + (not block.endswith(b"\n")) or b"\0" in block or not block.isascii():
            return None
        minutes, latest = self._minutes, self._latest
        start = self._start or 0
        end = start + MAX_SPAN_SECONDS * NANOSECONDS_PER_SECOND
        rows = []
        for minute, second, fraction, prompt, output in found:
            begins = minutes.get(minute)
            if begins is None:
                begins = self._minute(minute)
                if begins is None:
                    return None
            at = begins + int(second) * 1_000_000_000
            if fraction:
                at += int(fraction) * _SCALE[len(fraction)]
            num_prompt_tokens, num_output_tokens = int(prompt), int(output)
            if (
                not latest <= at <= end
                or not 1 <= num_prompt_tokens <= MAX_TOKENS
                or not 1 <= num_output_tokens <= MAX_TOKENS
            ):
                return None
            latest = at
            rows.append(Arrival(at - start, num_prompt_tokens, num_output_tokens))  # type: ignore[arg-type]
        self._latest = latest
        return rows

    def one_by_one(self, number: int, block: bytes) -> Iterator[Arrival]:
        for line, text in block_lines(self.path, number, block):
            self.line = line
            if line == 1:
                if tuple(text.split(",")) != COLUMNS:
                    raise wrong_header(self.path, text, COLUMNS)
                continue
            row = CsvRow(self.path, line, text, COLUMNS)
            at = self._at(row)
            lengths = row.lengths(1, 2, self._zero, self._tally)
            if lengths is not None:
                yield Arrival(Duration(at), *lengths)

    def finish(self) -> None:
        if self._start is None:
            raise data_error(self.path, self.line + 1, 1, "no rows after the header")

    def _at(self, row: CsvRow) -> int:
        text = row.fields[0]
        at, has_zone = _timestamp(row)
        if self._start is None:
            self._start = self._latest = at
            self._has_zone = has_zone
        if has_zone != self._has_zone:
            raise row.error(0, f"{text} has {'a' if has_zone else 'no'} zone, unlike the rows before")
        if at < self._latest and not self._is_unsorted:
            raise row.error(0, f"{text} is earlier than the row before", hint=SORT_HINT)
        if abs(at - self._start) > MAX_SPAN_SECONDS * NANOSECONDS_PER_SECOND:
            raise row.error(0, f"{text} lies more than twenty years from the first row")
        self._latest = at
        return at - self._start

    def _minute(self, minute: bytes) -> int | None:
        match = _TIMESTAMP.fullmatch(minute.decode("ascii") + ":00")
        at = None if match is None else _nanoseconds(match)
        if at is not None:
            if len(self._minutes) >= _MAX_MINUTES_KEPT:
                self._minutes.clear()
            self._minutes[minute] = at
        return at


def _timestamp(row: CsvRow) -> tuple[int, bool]:
    """Nanoseconds since 1970 in UTC, and whether a zone was given."""
    match = _TIMESTAMP.fullmatch(row.fields[0])
    at = None if match is None else _nanoseconds(match)
    if match is None or at is None:
        raise row.error(
            0,
            f"expected a time like 2023-11-16 18:15:46.6805900 or 2024-05-10 00:00:00.009930+00:00, "
            f"got {shown(row.fields[0])}",
        )
    return at, match.group(8) is not None


def _nanoseconds(match: re.Match[str]) -> int | None:
    year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
    if hour >= 24 or minute >= 60 or second >= 60:
        return None
    try:
        days = date(year, month, day).toordinal() - _EPOCH_DAY
    except ValueError:  # no such day
        return None
    whole = ((days * 24 + hour) * 60 + minute) * 60 + second
    zone = match.group(8)
    if zone is not None and zone != "Z":
        digits = zone[1:].replace(":", "")
        if int(digits[:2]) > 14 or int(digits[2:]) > 59:
            return None
        offset = (int(digits[:2]) * 60 + int(digits[2:])) * 60
        whole += -offset if zone[0] == "+" else offset
    return whole * NANOSECONDS_PER_SECOND + int((match.group(7) or "").ljust(9, "0"))


def _check_writable(row: int, arrival: Arrival) -> None:
    refuse_more(row, arrival, AzureFormat.name, AzureFormat.holds)
    if row == 1 and arrival.at != 0:
        raise DataError(f"row 1: the first arrival lies at {arrival.at} ns; the azure format counts from its first row")


def _stamp(at: int) -> str:
    whole, fraction = divmod(at, NANOSECONDS_PER_SECOND)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    day = date.fromordinal(_EPOCH_DAY + days)
    digits = f"{fraction:09d}" if fraction % 100 else f"{fraction // 100:07d}"
    return f"{day.isoformat()} {hour:02d}:{minute:02d}:{second:02d}.{digits}"
