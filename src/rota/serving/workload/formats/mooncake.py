"""Mooncake trace: one JSON object a line, `{"timestamp", "input_length", "output_length", "hash_ids"}`.

`timestamp` is in milliseconds; `hash_ids` name the prompt's blocks of 512 tokens, the last of which may be partial, and
an id stands for everything before it too. Three keys are ours and optional: `session`, `tenant` and `priority`. As in
the Azure format a length of zero is an error; the published trace has none.
"""

import difflib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from rota.base.errors import DataError
from rota.base.instant import NANOSECONDS_PER_MILLISECOND, Duration
from rota.base.random_streams import RandomStreams
from rota.serving.model.request import DEFAULT_TENANT, TenantId
from rota.serving.workload.arrivals import MAX_TOKENS, Arrival
from rota.serving.workload.formats.spot import data_error, shown, text_lines

HASH_BLOCK_TOKENS = 512
REQUIRED = ("timestamp", "input_length", "output_length", "hash_ids")
OPTIONAL = ("session", "tenant", "priority")

_MAX_MILLISECONDS = 2**63 // NANOSECONDS_PER_MILLISECOND - 1
_MAX_HASH = 2**53 - 1
"""Largest whole number that every JSON reader keeps exactly."""
_MAX_PRIORITY = 2**31 - 1


class MooncakeFormat:
    """Reads and writes the format."""

    name = "mooncake"
    first_line = '{"timestamp": 0, "input_length": …}'

    def recognises(self, head: str) -> bool:
        return head.lstrip().startswith("{")

    def read(self, path: Path, streams: RandomStreams | None = None) -> Iterator[Arrival]:
        """Yield arrivals. Raises `DataError` at the first bad row."""
        latest = 0
        for line, text in text_lines(path):
            row = _Row(path, line, text)
            timestamp = row.integer("timestamp", 0, _MAX_MILLISECONDS)
            if timestamp < latest:
                row.fail("timestamp", f"{timestamp} is earlier than {latest} in the row before")
            latest = timestamp
            num_prompt_tokens = row.integer("input_length", 1, MAX_TOKENS)
            yield Arrival(
                at=Duration(timestamp * NANOSECONDS_PER_MILLISECOND),
                num_prompt_tokens=num_prompt_tokens,
                num_output_tokens=row.integer("output_length", 1, MAX_TOKENS),
                prefix_hashes=row.hashes(num_prompt_tokens),
                hash_block_tokens=HASH_BLOCK_TOKENS,
                session=row.text("session", None),
                tenant=TenantId(row.text("tenant", DEFAULT_TENANT) or DEFAULT_TENANT),
                priority=row.integer("priority", -_MAX_PRIORITY, _MAX_PRIORITY) if "priority" in row.values else 0,
            )

    def write(self, path: Path, arrivals: Iterable[Arrival]) -> int:
        """Write arrivals. Raises `DataError` for times between milliseconds and for other prefix blocks than 512."""
        num_rows = 0
        with path.open("w", encoding="utf-8", newline="") as file:
            for arrival in arrivals:
                num_rows += 1
                file.write(_written(num_rows, arrival) + "\n")
        return num_rows


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

    def integer(self, key: str, least: int, most: int) -> int:
        value = self.values[key]
        # bool is an int to Python, not to JSON.
        if type(value) is not int or not least <= value <= most:
            self.fail(key, f"expected a whole number from {least} to {most}, got {shown(value)}")
        return value

    def text(self, key: str, default: str | None) -> str | None:
        value = self.values.get(key, default)
        if key in self.values and (type(value) is not str or not value):
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
        if len(value) != expected:
            self.fail(
                "hash_ids",
                f"{len(value)} ids for an input_length of {num_prompt_tokens}; expected {expected}, "
                f"one for each {HASH_BLOCK_TOKENS} tokens begun",
            )
        return tuple(value)


def _written(row: int, arrival: Arrival) -> str:
    timestamp, rest = divmod(arrival.at, NANOSECONDS_PER_MILLISECOND)
    if rest:
        raise DataError(f"row {row}: {arrival.at} ns is no whole millisecond; the mooncake format holds no finer times")
    expected = -(-arrival.num_prompt_tokens // HASH_BLOCK_TOKENS)
    if arrival.hash_block_tokens != HASH_BLOCK_TOKENS or len(arrival.prefix_hashes) != expected:
        raise DataError(
            f"row {row}: the mooncake format wants an id for each {HASH_BLOCK_TOKENS} prompt tokens begun, {expected} "
            f"in all; the arrival has {len(arrival.prefix_hashes)} of {arrival.hash_block_tokens} tokens"
        )
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
