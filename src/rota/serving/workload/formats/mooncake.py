"""Mooncake trace: one JSON object a line, `{"timestamp", "input_length", "output_length", "hash_ids"}`.

`timestamp` is in milliseconds; `hash_ids` name the prompt's blocks of 512 tokens, the last of which may be partial, and
an id stands for everything before it too. Three keys are ours and optional: `session`, `tenant` and `priority`. As in
the Azure format a length of zero is an error; the published trace has none.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from rota.base.errors import DataError
from rota.base.instant import NANOSECONDS_PER_MILLISECOND, Duration
from rota.base.random_streams import RandomStreams
from rota.serving.model.request import DEFAULT_TENANT, TenantId
from rota.serving.workload.arrivals import MAX_SHARED_TOKENS, MAX_TOKENS, Arrival, Fact, refuse_more
from rota.serving.workload.formats.columns import MAX_SPAN_SECONDS
from rota.serving.workload.formats.leniency import SORT_HINT, STRICT, ZERO_HINT, Leniency, Tally, Zero
from rota.serving.workload.formats.spot import block_lines, data_error, is_text, line_blocks, shown

HASH_BLOCK_TOKENS = 512
REQUIRED = ("timestamp", "input_length", "output_length", "hash_ids")
OPTIONAL = ("session", "tenant", "priority")

_MAX_MILLISECONDS = MAX_SPAN_SECONDS * 1000
_MAX_HASH = 2**53 - 1
"""Largest whole number that every JSON reader keeps exactly."""
_MAX_PRIORITY = 2**31 - 1

_ROW = re.compile(
    rb'^\{"timestamp": ?(0|[1-9][0-9]{0,14}), ?"input_length": ?([1-9][0-9]{0,9}), ?'
    rb'"output_length": ?([1-9][0-9]{0,9}), ?"hash_ids": ?(\[[0-9, ]*\])\}\r?$',
    re.MULTILINE,
)
"""A row as the published files have it."""
_parse_hashes = msgspec.json.Decoder(tuple[int, ...]).decode


class MooncakeFormat:
    """Reads and writes the format."""

    name = "mooncake"
    first_line = '{"timestamp": 0, "input_length": …}'
    holds: frozenset[Fact] = frozenset({"prefixes", "sessions", "tenants", "priorities"})

    def __init__(self, leniency: Leniency = STRICT) -> None:
        self._leniency = leniency
        self.tally = Tally()

    def recognises(self, head: str) -> bool:
        return head.lstrip().startswith("{") and '"format"' not in head.split("\n", 1)[0]

    def read(self, path: Path, streams: RandomStreams | None = None) -> Iterator[Arrival]:
        """Yield arrivals. Raises `DataError` at the first bad row."""
        reading = _Reading(path, self._leniency, self.tally)
        for number, block in line_blocks(path):
            rows = reading.at_once(block)
            yield from reading.one_by_one(number, block) if rows is None else rows

    def write(self, path: Path, arrivals: Iterable[Arrival]) -> int:
        """Write arrivals. Raises `DataError` for times between milliseconds, for other prefix blocks than 512, and for
        rows that wait."""
        num_rows = 0
        with path.open("w", encoding="utf-8", newline="") as file:
            for arrival in arrivals:
                num_rows += 1
                refuse_more(num_rows, arrival, self.name, self.holds)
                file.write(_written(num_rows, arrival) + "\n")
        return num_rows


class _Reading:
    """One pass over a file, and how far it has come."""

    def __init__(self, path: Path, leniency: Leniency, tally: Tally) -> None:
        self.path = path
        self._zero = leniency.zero or "refuse"
        self._is_unsorted = leniency.is_unsorted
        self._tally = tally
        self._latest = 0

    def at_once(self, block: bytes) -> list[Arrival] | None:
        """The rows of a block, or None if any of them needs a closer look."""
        found = _ROW.findall(block)
        # A match never crosses a line, so that as many matches as lines means that every line is a good one.
        if len(found) != block.count(b"\n") + (not block.endswith(b"\n")):
            return None
        latest = self._latest
        rows = []
        for timestamp, prompt, output, ids in found:
            at, num_prompt_tokens, num_output_tokens = int(timestamp), int(prompt), int(output)
            try:
                hashes = _parse_hashes(ids)
            except msgspec.MsgspecError:
                return None
            if (
                not latest <= at <= _MAX_MILLISECONDS
                or num_prompt_tokens > MAX_SHARED_TOKENS
                or num_output_tokens > MAX_TOKENS
                or len(hashes) != -(-num_prompt_tokens // HASH_BLOCK_TOKENS)
                or max(hashes) > _MAX_HASH
            ):
                return None
            latest = at
            rows.append(Arrival(at * 1_000_000, num_prompt_tokens, num_output_tokens, hashes))  # type: ignore[arg-type]
        self._latest = latest
        return rows

    def one_by_one(self, number: int, block: bytes) -> Iterator[Arrival]:
        for line, text in block_lines(self.path, number, block):
            row = _Row(self.path, line, text)
            timestamp = row.milliseconds()
            if timestamp < self._latest and not self._is_unsorted:
                row.fail("timestamp", f"{timestamp} is earlier than {self._latest} in the row before", hint=SORT_HINT)
            self._latest = timestamp
            lengths = row.lengths(self._zero, self._tally)
            if lengths is None:
                continue
            yield Arrival(
                at=Duration(timestamp * NANOSECONDS_PER_MILLISECOND),
                num_prompt_tokens=lengths[0],
                num_output_tokens=lengths[1],
                prefix_hashes=row.hashes(lengths[0]),
                hash_block_tokens=HASH_BLOCK_TOKENS,
                session=row.text("session", None),
                tenant=TenantId(row.text("tenant", DEFAULT_TENANT) or DEFAULT_TENANT),
                priority=row.integer("priority", -_MAX_PRIORITY, _MAX_PRIORITY) if "priority" in row.values else 0,
            )


class _Row:
    """One line of the file, checked key by key."""

    def __init__(self, path: Path, line: int, text: str) -> None:
        self.path, self.line, self.source = path, line, text
        self.values: dict[str, Any] = self._parse()
        for key in self.values:
            if key not in REQUIRED and key not in OPTIONAL:
                near = difflib.get_close_matches(key, REQUIRED + OPTIONAL, n=1)
                self.fail(key, "unknown key", hint=f"did you mean {near[0]}?" if near else None)
        for key in REQUIRED:
            if key not in self.values:
                raise data_error(path, line, len(text), f"{key}: missing")

    def _parse(self) -> dict[str, Any]:
        if not self.source.strip():
            raise data_error(self.path, self.line, 1, "an empty line", hint="remove it")
        try:
            value = json.loads(self.source, object_pairs_hook=self._object, parse_constant=self._constant)
        except json.JSONDecodeError as error:
            raise data_error(self.path, self.line, error.colno, f"not JSON: {error.msg}") from None
        except RecursionError:
            raise data_error(self.path, self.line, 1, "not JSON of a trace: nested too deeply") from None
        except ValueError:  # Python reads no integer of thousands of digits.
            raise data_error(self.path, self.line, 1, "a number of thousands of digits") from None
        if not isinstance(value, dict):
            raise data_error(self.path, self.line, 1, f"expected a JSON object, got {shown(value)}")
        return value

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            keys = [key for key, _ in pairs]
            self.fail(next(key for key in keys if keys.count(key) > 1), "given twice")
        return values

    def _constant(self, name: str) -> NoReturn:
        raise data_error(self.path, self.line, self.source.find(name) + 1, f"{name} is not JSON")

    def fail(self, key: str, problem: str, *, hint: str | None = None) -> NoReturn:
        """Raise an error that points at the key."""
        column = self.source.find(json.dumps(key, ensure_ascii=False)) + 1
        name = key if key in REQUIRED or key in OPTIONAL else shown(key)
        raise data_error(self.path, self.line, max(column, 1), f"{name}: {problem}", hint=hint)

    def integer(self, key: str, least: int, most: int, *, hint: str | None = None) -> int:
        value = self.values[key]
        # bool is an int to Python, not to JSON.
        if type(value) is not int or not least <= value <= most:
            self.fail(key, f"expected a whole number from {least} to {most}, got {shown(value)}", hint=hint)
        return value

    def milliseconds(self) -> int:
        value = self.values["timestamp"]
        hint = "the format counts whole milliseconds from the start of the trace"
        if type(value) is int and value > _MAX_MILLISECONDS:
            hint += "; this is a time of day, or in another unit"
        return self.integer("timestamp", 0, _MAX_MILLISECONDS, hint=hint)

    def lengths(self, zero: Zero, tally: Tally) -> tuple[int, int] | None:
        """Prompt and output length; None if the row is to be left out."""
        least = 1 if zero == "refuse" else 0
        prompt, output = (
            self.integer(key, least, most, hint=ZERO_HINT if self.values[key] == 0 else None)
            for key, most in (("input_length", MAX_SHARED_TOKENS), ("output_length", MAX_TOKENS))
        )
        return (prompt, output) if prompt and output else tally.settled(prompt, output, zero)

    def text(self, key: str, default: str | None) -> str | None:
        value = self.values.get(key, default)
        if key in self.values and (type(value) is not str or not value or not is_text(value)):
            self.fail(key, f"expected a text that is not empty, got {shown(value)}")
        return value

    def hashes(self, num_prompt_tokens: int) -> tuple[int, ...]:
        value = self.values["hash_ids"]
        if type(value) is not list:
            self.fail("hash_ids", f"expected a list of whole numbers, got {shown(value)}")
        for index, item in enumerate(value):
            if type(item) is not int or not 0 <= item <= _MAX_HASH:
                self.fail("hash_ids", f"item {index}: expected a whole number from 0 to {_MAX_HASH}, got {shown(item)}")
        expected = -(-num_prompt_tokens // HASH_BLOCK_TOKENS)
        if len(value) != expected and not (self.values["input_length"] == 0 and not value):
            self.fail(
                "hash_ids",
                f"{len(value)} ids for an input_length of {num_prompt_tokens}; expected {expected}, "
                f"one for each {HASH_BLOCK_TOKENS} tokens begun",
            )
        return tuple(value)


def _written(row: int, arrival: Arrival) -> str:
    timestamp, rest = divmod(arrival.at, NANOSECONDS_PER_MILLISECOND)
    if rest:
        raise DataError(
            f"row {row}: {arrival.at} ns is no whole millisecond; the mooncake format holds no finer times",
            hint="rota trace convert --lossy cuts times to milliseconds",
        )
    if arrival.num_prompt_tokens > MAX_SHARED_TOKENS:
        raise DataError(f"row {row}: the mooncake format holds prompts of at most {MAX_SHARED_TOKENS} tokens")
    expected = -(-arrival.num_prompt_tokens // HASH_BLOCK_TOKENS)
    if arrival.hash_block_tokens != HASH_BLOCK_TOKENS or len(arrival.prefix_hashes) != expected:
        raise DataError(
            f"row {row}: the mooncake format wants an id for each {HASH_BLOCK_TOKENS} prompt tokens begun, {expected} "
            f"in all; the arrival has {len(arrival.prefix_hashes)} of {arrival.hash_block_tokens} tokens",
            hint="rota trace convert --lossy regroups the blocks",
        )
    if max(arrival.prefix_hashes) > _MAX_HASH or min(arrival.prefix_hashes) < 0:
        raise DataError(f"row {row}: the mooncake format holds prefix ids from 0 to {_MAX_HASH}")
    values: dict[str, Any] = {
        "timestamp": timestamp,
        "input_length": arrival.num_prompt_tokens,
        "output_length": arrival.num_output_tokens,
        "hash_ids": list(arrival.prefix_hashes),
    }
    if arrival.session is not None:
        values["session"] = arrival.session
    if arrival.tenant != DEFAULT_TENANT:
        values["tenant"] = arrival.tenant
    if arrival.priority:
        values["priority"] = arrival.priority
    return json.dumps(values)
