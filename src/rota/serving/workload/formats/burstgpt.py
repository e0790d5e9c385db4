"""BurstGPT: CSV with `Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type`, of ChatGPT and GPT-4.

`Timestamp` is in seconds since the midnight before the trace began, in later files as a decimal. Files of the third
release have `Session ID` and `Elapsed time` after it; a session is known for conversations only, and empty otherwise.
A failed request has zero response tokens. Model, elapsed time and log type are checked for their number of columns and
not kept: an arrival has no place for them.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from rota.base.errors import DataError
from rota.base.instant import NANOSECONDS_PER_SECOND, Duration
from rota.base.random_streams import RandomStreams
from rota.serving.workload.arrivals import Arrival, Fact, refuse_more
from rota.serving.workload.formats.columns import (
    MAX_SPAN_SECONDS,
    CsvRow,
    decimal_seconds,
    header_fields,
    wrong_header,
)
from rota.serving.workload.formats.leniency import SORT_HINT, STRICT, Leniency, Tally
from rota.serving.workload.formats.spot import block_lines, data_error, line_blocks

COLUMNS = ("Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type")
SESSION_COLUMNS = ("Timestamp", "Session ID", "Elapsed time", *COLUMNS[1:])

_CONVERSATION, _CALL = "Conversation log", "API log"


class BurstgptFormat:
    """Reads and writes the format. It holds times, lengths and sessions."""

    name = "burstgpt"
    first_line = ",".join(COLUMNS)
    holds: frozenset[Fact] = frozenset({"sessions"})

    def __init__(self, leniency: Leniency = STRICT) -> None:
        self._leniency = leniency
        self.tally = Tally()

    def recognises(self, head: str) -> bool:
        return not header_fields(head).isdisjoint({"Request tokens", "Response tokens", "Log Type"})

    def read(self, path: Path, streams: RandomStreams | None = None) -> Iterator[Arrival]:
        """Yield arrivals; the first row is the start of the trace. Raises `DataError` at the first bad row."""
        columns: tuple[str, ...] = ()
        start: int | None = None
        latest = line = 0
        for number, block in line_blocks(path):
            for line, text in block_lines(path, number, block):
                if line == 1:
                    columns = _columns(path, text)
                    continue
                row = CsvRow(path, line, text, columns)
                at = row.seconds(0)
                start = at if start is None else start
                if at < latest and not self._leniency.is_unsorted:
                    raise row.error(0, f"{row.fields[0]} is earlier than the row before", hint=SORT_HINT)
                if abs(at - start) > MAX_SPAN_SECONDS * NANOSECONDS_PER_SECOND:
                    raise row.error(0, f"{row.fields[0]} s lie more than twenty years from the first row")
                latest = at
                arrival = self._arrival(row, at - start)
                if arrival is not None:
                    yield arrival
        if start is None:
            raise data_error(path, line + 1, 1, "no rows after the header")

    def write(self, path: Path, arrivals: Iterable[Arrival]) -> int:
        """Write arrivals, with the columns of sessions. Raises `DataError` for one that says more, or a first one that
        does not lie at 0."""
        num_rows = 0
        with path.open("w", encoding="utf-8", newline="") as file:
            file.write(",".join(SESSION_COLUMNS) + "\n")
            for arrival in arrivals:
                num_rows += 1
                file.write(_written(num_rows, arrival) + "\n")
        return num_rows

    def _arrival(self, row: CsvRow, at: int) -> Arrival | None:
        prompt = row.columns.index("Request tokens")
        # Both zero is how the trace marks a failure, and the total must agree in any case.
        lengths = row.tokens(prompt, least=0), row.tokens(prompt + 1, least=0)
        total = row.whole(prompt + 2, 0, 2**32)
        if total != sum(lengths):
            raise row.error(prompt + 2, f"{total} is not {lengths[0]} + {lengths[1]}")
        settled = row.lengths(prompt, prompt + 1, self._leniency.zero or "refuse", self.tally)
        if settled is None:
            return None
        session = row.fields[1] if len(row.columns) == len(SESSION_COLUMNS) else ""
        return Arrival(Duration(at), *settled, session=session or None)


def _columns(path: Path, header: str) -> tuple[str, ...]:
    columns = tuple(header.split(","))
    if columns in (COLUMNS, SESSION_COLUMNS):
        return columns
    raise wrong_header(path, header, SESSION_COLUMNS if "Session ID" in columns else COLUMNS)


def _written(row: int, arrival: Arrival) -> str:
    refuse_more(row, arrival, BurstgptFormat.name, BurstgptFormat.holds)
    if row == 1 and arrival.at:
        raise DataError(f"row 1: the first arrival lies at {arrival.at} ns; readers of the format count from it")
    session = arrival.session or ""
    if any(mark in session for mark in ',"\r\n\0') or arrival.session == "":
        raise DataError(f"row {row}: the burstgpt format cannot hold the session {arrival.session!r}")
    prompt, output = arrival.num_prompt_tokens, arrival.num_output_tokens
    kind = _CONVERSATION if session else _CALL
    return f"{decimal_seconds(arrival.at)},{session},,,{prompt},{output},{prompt + output},{kind}"
