"""Azure LLM inference trace 2023: CSV with `TIMESTAMP,ContextTokens,GeneratedTokens`.

The published files have CRLF line ends, no line end after the last row, and timestamps with seven fractional digits
(100 ns), which are read as exact integers. No row of theirs has zero tokens, so zero is an error here: an answer of no
tokens has no first token to wait for.
"""

import re
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path

from rota.base.errors import DataError
from rota.base.instant import NANOSECONDS_PER_SECOND, Duration
from rota.base.random_streams import RandomStreams
from rota.serving.model.request import DEFAULT_TENANT
from rota.serving.workload.arrivals import MAX_TOKENS, Arrival
from rota.serving.workload.formats.spot import data_error, shown, text_lines

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

_TIMESTAMP = re.compile(r"([0-9]{4})-([0-9]{2})-([0-9]{2}) ([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]{1,9}))?")
_COUNT = re.compile(r"[0-9]{1,10}")
_EPOCH_DAY = date(1970, 1, 1).toordinal()


class AzureFormat:
    """Reads and writes the format. It holds times and lengths only."""

    name = "azure"
    first_line = ",".join(COLUMNS)

    def recognises(self, head: str) -> bool:
        # One known column is enough: the reader then says what is wrong with the others.
        fields = {field.strip(' "') for field in head.split("\n", 1)[0].rstrip("\r").split(",")}
        return not fields.isdisjoint(COLUMNS)

    def read(self, path: Path, streams: RandomStreams | None = None) -> Iterator[Arrival]:
        """Yield arrivals; the first row is the start of the trace. Raises `DataError` at the first bad row."""
        lines = text_lines(path)
        line, header = next(lines)
        if tuple(header.split(",")) != COLUMNS:
            raise data_error(path, line, _first_difference(header), f"expected the header {self.first_line}")
        start: int | None = None
        latest = 0
        for line, text in lines:
            fields = text.split(",")
            if len(fields) != len(COLUMNS):
                raise _wrong_width(path, line, text, fields)
            at = _timestamp(path, line, fields[0])
            column = len(fields[0]) + 2
            num_prompt_tokens = _count(path, line, column, COLUMNS[1], fields[1])
            num_output_tokens = _count(path, line, column + len(fields[1]) + 1, COLUMNS[2], fields[2])
            if start is None:
                start = latest = at
            if at < latest:
                raise data_error(path, line, 1, f"{COLUMNS[0]}: {fields[0]} is earlier than the row before")
            latest = at
            yield Arrival(Duration(at - start), num_prompt_tokens, num_output_tokens)
        if start is None:
            raise data_error(path, line + 1, 1, "no rows after the header")

    def write(self, path: Path, arrivals: Iterable[Arrival]) -> int:
        """Write arrivals with timestamps that begin at 1970-01-01, nine digits where 100 ns are too coarse.

        Raises `DataError` for an arrival with a prefix, a session, a tenant or a priority, and for a first one that
        does not lie at 0, since readers count from the first row.
        """
        num_rows = 0
        with path.open("w", encoding="utf-8", newline="") as file:
            file.write(self.first_line + "\r\n")
            for arrival in arrivals:
                _check_writable(num_rows, arrival)
                file.write(f"{_stamp(arrival.at)},{arrival.num_prompt_tokens},{arrival.num_output_tokens}\r\n")
                num_rows += 1
        return num_rows


def _first_difference(header: str) -> int:
    """Column of the first header field that is not the expected one."""
    column = 1
    for index, field in enumerate(header.split(",")):
        if index >= len(COLUMNS) or field != COLUMNS[index]:
            return column
        column += len(field) + 1
    return len(header) + 1


def _wrong_width(path: Path, line: int, text: str, fields: list[str]) -> DataError:
    if not text:
        return data_error(path, line, 1, "an empty line", hint="remove it")
    if len(fields) < len(COLUMNS):
        missing = COLUMNS[len(fields)]
        return data_error(path, line, len(text) + 1, f"{missing}: missing; expected {len(COLUMNS)} columns")
    column = len(",".join(fields[: len(COLUMNS)])) + 2
    return data_error(path, line, column, f"{len(fields)} columns; expected {','.join(COLUMNS)}")


def _timestamp(path: Path, line: int, text: str) -> int:
    match = _TIMESTAMP.fullmatch(text)
    if match is not None:
        year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
        if hour < 24 and minute < 60 and second < 60:
            try:
                days = date(year, month, day).toordinal() - _EPOCH_DAY
            except ValueError:
                pass  # No such day: the message below says what was expected.
            else:
                whole = ((days * 24 + hour) * 60 + minute) * 60 + second
                return whole * NANOSECONDS_PER_SECOND + int((match.group(7) or "").ljust(9, "0"))
    raise data_error(
        path, line, 1, f"{COLUMNS[0]}: expected a time like 2023-11-16 18:15:46.6805900, got {shown(text)}"
    )


def _count(path: Path, line: int, column: int, name: str, text: str) -> int:
    if _COUNT.fullmatch(text) is not None and 1 <= (value := int(text)) <= MAX_TOKENS:
        return value
    raise data_error(
        path, line, column, f"{name}: expected a whole number of tokens from 1 to {MAX_TOKENS}, got {shown(text)}"
    )


def _check_writable(row: int, arrival: Arrival) -> None:
    if arrival.prefix_hashes or arrival.session is not None or arrival.priority or arrival.tenant != DEFAULT_TENANT:
        raise DataError(
            f"row {row + 1}: the azure format has no column for prefixes, sessions, tenants and priorities",
            hint="write the mooncake format instead",
        )
    if row == 0 and arrival.at != 0:
        raise DataError(f"row 1: the first arrival lies at {arrival.at} ns; the azure format counts from its first row")


def _stamp(at: int) -> str:
    whole, fraction = divmod(at, NANOSECONDS_PER_SECOND)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    day = date.fromordinal(_EPOCH_DAY + days)
    digits = f"{fraction:09d}" if fraction % 100 else f"{fraction // 100:07d}"
    return f"{day.isoformat()} {hour:02d}:{minute:02d}:{second:02d}.{digits}"
