"""Agent programs: CSV with one call a row, `kind,session,call,t_rel_s,gap_since_prev_call_s,input_tokens,…`.

The calls of a session stand together and follow each other: a call comes `gap_since_prev_call_s` after the previous one
has ended, which is the time of its tools, and its prompt begins with `common_prefix_tokens_with_prev` tokens of the
previous prompt. Sessions have no times of their own: they all begin at 0, for whoever plays them to spread
(`rota simulate --rate` counts sessions then). The kind becomes the tenant, the session is session and program.

The distilled traces state 0 tokens where a length was not measured; such a length is read as 1 and counted, so that the
call keeps its place in the program.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from rota.base.errors import DataError
from rota.base.instant import NANOSECONDS_PER_SECOND, Duration
from rota.base.random_streams import RandomStreams
from rota.serving.model.request import TenantId, shared_prefix_blocks
from rota.serving.workload.arrivals import Arrival, Fact, refuse_more
from rota.serving.workload.formats.columns import MAX_SPAN_SECONDS, CsvRow, decimal_seconds, header_fields, wrong_header
from rota.serving.workload.formats.leniency import STRICT, Leniency, Tally, Zero
from rota.serving.workload.formats.prefixes import PREFIX_BLOCK_TOKENS, Numbers, PrefixChain
from rota.serving.workload.formats.spot import data_error, shown, text_lines

COLUMNS = (
    "kind",
    "session",
    "call",
    "t_rel_s",
    "gap_since_prev_call_s",
    "input_tokens",
    "output_tokens",
    "common_prefix_tokens_with_prev",
)
_KIND, _SESSION, _CALL, _TIME, _GAP, _INPUT, _OUTPUT, _SHARED = range(len(COLUMNS))

_ROUNDING = 3 * NANOSECONDS_PER_SECOND // 1000
"""Times and gaps are rounded to milliseconds, each on its own."""


class AgentsFormat:
    """Reads and writes the format. It holds chains of calls."""

    name = "agents"
    first_line = ",".join(COLUMNS)
    holds: frozenset[Fact] = frozenset({"prefixes", "sessions", "tenants", "programs", "waits"})

    def __init__(self, leniency: Leniency = STRICT) -> None:
        self._zero: Zero = leniency.zero or "one"
        self.tally = Tally()

    def recognises(self, head: str) -> bool:
        return not header_fields(head).isdisjoint(COLUMNS[3:])

    def read(self, path: Path, streams: RandomStreams | None = None) -> Iterator[Arrival]:
        """Yield calls, session by session. Raises `DataError` at the first bad row."""
        numbers = Numbers()
        seen: set[tuple[str, str]] = set()
        session: _Session | None = None
        line = 1
        for line, text in text_lines(path):
            if line == 1:
                if tuple(text.split(",")) != COLUMNS:
                    raise wrong_header(path, text, COLUMNS)
                continue
            row = CsvRow(path, line, text, COLUMNS)
            key = (row.fields[_KIND], row.fields[_SESSION])
            if session is None or key != session.key:
                if key in seen:
                    raise row.error(_SESSION, f"{shown(key[1])} comes again; the calls of a session stand together")
                for index in (_KIND, _SESSION):
                    if not row.fields[index]:
                        raise row.error(index, "expected a name, got nothing")
                seen.add(key)
                session = _Session(key, numbers)
            arrival = session.call(row, self._zero, self.tally)
            if arrival is not None:
                yield arrival
        if session is None:
            raise data_error(path, line + 1, 1, "no rows after the header")

    def write(self, path: Path, arrivals: Iterable[Arrival]) -> int:
        """Write arrivals that the reader could have given: chains of calls that begin at 0, each with a session of its
        own. How the blocks of prefixes are called is not kept. Raises `DataError` for others."""
        writing = _Writing()
        num_rows = 0
        with path.open("w", encoding="utf-8", newline="") as file:
            file.write(self.first_line + "\n")
            for arrival in arrivals:
                num_rows += 1
                refuse_more(num_rows, arrival, self.name, self.holds)
                file.write(writing.row(num_rows, arrival) + "\n")
        return num_rows


class _Session:
    """The calls of one session so far."""

    def __init__(self, key: tuple[str, str], numbers: Numbers) -> None:
        self.key = key
        self._chain = PrefixChain(numbers)
        self._num_calls = 0
        self._at = 0
        """The call before, as the file has it."""
        self._num_tokens = 0
        self._last: str | None = None
        """The call that the next one waits for."""
        self._earliest = 0
        self._gap = 0
        """Since the end of that call."""

    def call(self, row: CsvRow, zero: Zero, tally: Tally) -> Arrival | None:
        if row.whole(_CALL, 0, 10**9) != self._num_calls:
            raise row.error(_CALL, f"{row.fields[_CALL]} where call {self._num_calls} should be")
        at, gap = row.seconds(_TIME), row.seconds(_GAP)
        if at > MAX_SPAN_SECONDS * NANOSECONDS_PER_SECOND:
            raise row.error(_TIME, f"{row.fields[_TIME]} s lie more than twenty years after the first call")
        if abs(at - self._at - gap) > _ROUNDING:
            raise row.error(
                _GAP,
                f"{row.fields[_GAP]} s do not lead from the call before to {row.fields[_TIME]} s",
                hint="calls stand in order of time, and both columns are in seconds",
            )
        shared = row.whole(_SHARED, 0, min(self._num_tokens, row.tokens(_INPUT, least=0)), "a number of tokens")
        lengths = row.lengths(_INPUT, _OUTPUT, zero, tally)
        self._num_tokens = row.tokens(_INPUT, least=0)
        prefix = self._chain.prompt(self._num_tokens, shared)
        self._num_calls += 1
        self._at = at
        self._gap += gap
        if lengths is None:
            return None
        self._earliest += self._gap
        arrival = Arrival(
            Duration(self._earliest if self._last is not None else 0),
            *lengths,
            prefix,
            PREFIX_BLOCK_TOKENS,
            session=self.key[1],
            tenant=TenantId(self.key[0]),
            program=f"{self.key[0]}/{self.key[1]}",
            id=str(self._num_calls - 1),
            after=() if self._last is None else (self._last,),
            gap=Duration(0 if self._last is None else self._gap),
        )
        if self._last is None:
            self._earliest = 0
        self._last, self._gap = arrival.id, 0
        return arrival


class _Writing:
    """The session that is being written."""

    def __init__(self) -> None:
        self._last: Arrival | None = None
        self._call = 0
        self._at = 0

    def row(self, number: int, arrival: Arrival) -> str:
        last, session = self._last, arrival.session
        if session is None or any(mark in session + arrival.tenant for mark in ',"\r\n\0') or not session:
            raise DataError(f"row {number}: the agents format cannot hold the session {session!r}")
        if arrival.prefix_hashes and arrival.hash_block_tokens != PREFIX_BLOCK_TOKENS:
            raise DataError(f"row {number}: the agents format wants prefix blocks of {PREFIX_BLOCK_TOKENS} tokens")
        if not arrival.after:
            if arrival.at:
                raise DataError(f"row {number}: begins at {arrival.at} ns; sessions of the agents format begin at 0")
            self._call = self._at = 0
            last = None
        elif last is None or arrival.after != (last.id,) or session != last.session or arrival.tenant != last.tenant:
            raise DataError(f"row {number}: waits for another than the call before it in its session")
        else:
            self._call += 1
            self._at += arrival.gap
        shared = 0 if last is None else shared_prefix_blocks(last.prefix_hashes, arrival.prefix_hashes)
        self._last = arrival
        return (
            f"{arrival.tenant},{session},{self._call},{decimal_seconds(self._at)},{decimal_seconds(arrival.gap)},"
            f"{arrival.num_prompt_tokens},{arrival.num_output_tokens},{shared * PREFIX_BLOCK_TOKENS}"
        )
