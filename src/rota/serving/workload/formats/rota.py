"""Rota's own trace format, which holds everything that an arrival can say: JSON lines after a line that names it.

`{"format":"rota-trace","version":1}`, then a row a line with the fields of `Arrival`; a field at its default is left
out. Instants and gaps are integer nanoseconds. Rows are checked as the rule of `Arrival` has it: open rows in order of
time, rows that wait after those that they wait for and before the next open row, ids unique in between.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from rota.base.instant import NANOSECONDS_PER_SECOND
from rota.base.random_streams import RandomStreams
from rota.serving.workload.arrivals import MAX_HASH_BLOCK_TOKENS, MAX_SHARED_TOKENS, MAX_TOKENS, Arrival, Fact
from rota.serving.workload.formats.columns import MAX_SPAN_SECONDS
from rota.serving.workload.formats.leniency import SORT_HINT, STRICT, Leniency, Tally
from rota.serving.workload.formats.spot import block_lines, data_error, line_blocks, shown

HEADER = b'{"format":"rota-trace","version":1}'
MAX_HASH = 2**64 - 1
MAX_PRIORITY = 2**31 - 1
MAX_SPAN = MAX_SPAN_SECONDS * NANOSECONDS_PER_SECOND

_encode = msgspec.json.Encoder().encode
_parse = msgspec.json.Decoder(Arrival).decode
_BYTE = re.compile(r"\(byte (\d+)\)")
_KEY = re.compile(r"at `\$\.(\w+)|unknown field `(.*)`", re.DOTALL)


class RotaFormat:
    """Reads and writes the format."""

    name = "rota"
    first_line = HEADER.decode()
    holds: frozenset[Fact] = frozenset({"prefixes", "sessions", "tenants", "priorities", "programs", "waits"})

    def __init__(self, leniency: Leniency = STRICT) -> None:
        self._is_unsorted = leniency.is_unsorted
        self.tally = Tally()

    def recognises(self, head: str) -> bool:
        return head.lstrip().startswith("{") and '"rota-trace"' in head.split("\n", 1)[0]

    def read(self, path: Path, streams: RandomStreams | None = None) -> Iterator[Arrival]:
        """Yield arrivals. Raises `DataError` at the first bad row."""
        rule = OrderRule(is_unsorted=self._is_unsorted)
        line = 1
        for number, block in line_blocks(path):
            for line, text in block_lines(path, number, block):
                if line == 1:
                    if text.encode() != HEADER:
                        raise data_error(path, 1, 1, f"expected {self.first_line}, got {shown(text)}")
                    continue
                arrival = _parsed(path, line, text)
                problem = problem_of(arrival) or rule.problem_of(arrival)
                if problem is not None:
                    _fail(path, line, text, *problem)
                yield arrival
        if line == 1:
            raise data_error(path, 2, 1, "no rows after the header")

    def write(self, path: Path, arrivals: Iterable[Arrival]) -> int:
        """Write any arrivals that keep the rule of `Arrival`."""
        num_rows = 0
        with path.open("wb") as file:
            file.write(HEADER + b"\n")
            for arrival in arrivals:
                num_rows += 1
                file.write(_encode(arrival) + b"\n")
        return num_rows


Problem = tuple[str, str, str | None]
"""Of which field, what is wrong, and a hint."""


def problem_of(arrival: Arrival) -> Problem | None:
    """What is wrong with a row on its own."""
    ranges = (
        ("num_prompt_tokens", 1, MAX_TOKENS),
        ("num_output_tokens", 1, MAX_TOKENS),
        ("hash_block_tokens", 1, MAX_HASH_BLOCK_TOKENS),
        ("priority", -MAX_PRIORITY, MAX_PRIORITY),
        ("at", -MAX_SPAN, MAX_SPAN),
        ("gap", 0, MAX_SPAN),
    )
    for name, least, most in ranges:
        value = getattr(arrival, name)
        if not least <= value <= most:
            hint = "times are in nanoseconds" if name in ("at", "gap") else None
            return name, f"expected a whole number from {least} to {most}, got {shown(value)}", hint
    for name in ("session", "tenant", "program", "id"):
        if getattr(arrival, name) == "":
            return name, "expected a text that is not empty", None
    hashes = arrival.prefix_hashes
    if hashes:
        if not 0 <= min(hashes) <= max(hashes) <= MAX_HASH:
            return "prefix_hashes", f"expected whole numbers from 0 to {MAX_HASH}", None
        num_blocks = -(-arrival.num_prompt_tokens // arrival.hash_block_tokens)
        if len(hashes) > num_blocks:
            return "prefix_hashes", f"{len(hashes)} ids for a prompt of {num_blocks} blocks", None
        if (len(hashes) - 1) * arrival.hash_block_tokens >= MAX_SHARED_TOKENS:
            return "prefix_hashes", f"ids of more than {MAX_SHARED_TOKENS} tokens", None
    if arrival.gap and not arrival.after:
        return "gap", "a row that waits for none has no gap", None
    if len(set(arrival.after)) != len(arrival.after):
        return "after", "an id is given twice", None
    return None


class OrderRule:
    """The rule by which rows follow each other, applied row by row."""

    def __init__(self, *, is_unsorted: bool = False) -> None:
        self._is_unsorted = is_unsorted
        self._opened_at: int | None = None
        self._ids: set[str] = set()

    def problem_of(self, arrival: Arrival) -> Problem | None:
        """What is wrong with the next row, given those before it."""
        if arrival.after:
            missing = next((name for name in arrival.after if name not in self._ids), None)
            if missing is not None:
                hint = "a row stands after those it waits for, and before the next that waits for none"
                return "after", f"{shown(missing)} is no row since the last that waits for none", hint
            if arrival.at < (self._opened_at or 0):
                return "at", f"{arrival.at} is earlier than the row that opened its program", None
        else:
            if self._opened_at is None and arrival.at < 0 and not self._is_unsorted:
                return "at", f"{arrival.at} is before the start of the trace", None
            if self._opened_at is not None and arrival.at < self._opened_at and not self._is_unsorted:
                return "at", f"{arrival.at} is earlier than {self._opened_at} before", SORT_HINT
            self._opened_at = arrival.at
            self._ids.clear()
        if arrival.id is not None:
            if arrival.id in self._ids:
                return "id", f"{shown(arrival.id)} is the id of a row before", None
            self._ids.add(arrival.id)
        return None


def _parsed(path: Path, line: int, text: str) -> Arrival:
    source = text.encode()
    try:
        arrival = _parse(source)
    except msgspec.ValidationError as error:
        found = _KEY.search(str(error))
        said = str(error).partition(" - at")[0]
        unknown = found is not None and found[2] is not None
        key = (found[1] or found[2] or "") if found else ""
        _fail(path, line, text, key, "unknown key" if unknown else said[:1].lower() + said[1:])
    except (msgspec.DecodeError, UnicodeError) as error:
        byte = _BYTE.search(str(error))
        column = len(source[: int(byte[1])].decode("utf-8", "replace")) + 1 if byte else len(text) + 1
        problem = "an empty line" if not text.strip() else f"not JSON: {_BYTE.sub('', str(error)).strip()}"
        raise data_error(path, line, column, problem) from None
    except RecursionError:
        raise data_error(path, line, 1, "not JSON of a trace: nested too deeply") from None
    if _encode(arrival) != source:
        json.loads(text, object_pairs_hook=lambda pairs: _refuse_twice(path, line, text, pairs))
    return arrival


def _refuse_twice(path: Path, line: int, text: str, pairs: list[tuple[str, Any]]) -> None:
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        _fail(path, line, text, twice, "given twice")


def _fail(path: Path, line: int, text: str, key: str, problem: str, hint: str | None = None) -> NoReturn:
    """Raise an error that points at a key, or at the end of the row if the row lacks it."""
    place = text.rfind(f'"{key}"') if key else 0
    column = place + 1 if place >= 0 else len(text) + 1
    name = key if key in Arrival.__struct_fields__ else shown(key)
    raise data_error(path, line, column, f"{name}: {problem}" if key else problem, hint=hint)
