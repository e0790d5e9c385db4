"""Step-time tables on disk: CSV with `phase,n_prefill_seqs,new_tokens,prefix_tokens,n_decode,decode_kv,latency_ms`.

`decode_kv` is the context of each of the `n_decode` sequences, not their sum: in the tables 256 sequences at 16,384
cost what reading 550 GB from memory costs, not 2 GB.
"""

import csv
import math
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import msgspec

from rota.base.errors import ConfigError, DataError
from rota.base.nearest import did_you_mean

COLUMNS = ("phase", "n_prefill_seqs", "new_tokens", "prefix_tokens", "n_decode", "decode_kv", "latency_ms")
PHASES = ("prefill", "decode", "mixed")
SHIPPED = files("rota") / "data" / "step_time"

_MAX_COUNT = 2**31 - 1
_MAX_LATENCY_MS = 1e7


class StepRow(msgspec.Struct, frozen=True):
    """One measured or computed step: `num_prefills` prompts of `new_tokens` each on top of `prefix_tokens` each, and
    `num_decodes` sequences over `decode_kv` tokens each."""

    phase: str
    num_prefills: int
    new_tokens: int
    prefix_tokens: int
    num_decodes: int
    decode_kv: int
    latency_ms: float


def shipped_tables() -> list[str]:
    """Names of the tables that come with Rota."""
    return sorted(entry.name.removesuffix(".csv") for entry in SHIPPED.iterdir() if entry.name.endswith(".csv"))


def read_table(name: str) -> list[StepRow]:
    """Read a table: a path if `name` ends in `.csv`, else one that is shipped.

    Raises `ConfigError` for a name that is not known and `DataError`, naming file, line and column, for a bad row.
    """
    source: Traversable | Path
    if name.endswith(".csv"):
        source = Path(name)
    elif name in shipped_tables():
        source = SHIPPED / f"{name}.csv"
    else:
        raise ConfigError(f"unknown step-time table {name!r}", hint=did_you_mean(name, shipped_tables()))
    try:
        text = source.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: byte {error.start} is not UTF-8") from None
    lines = csv.reader(text.splitlines())
    try:
        header = next(lines, [])
        if tuple(header) != COLUMNS:
            raise DataError(f"{name}:1:1: expected the header {','.join(COLUMNS)}")
        rows = [_row(f"{name}:{lines.line_num}", fields) for fields in lines]
    except csv.Error as error:
        raise DataError(f"{name}:{lines.line_num}:1: not CSV: {error}") from None
    for phase in ("prefill", "decode"):
        if not any(row.phase == phase for row in rows):
            raise DataError(f"{name}: no rows of phase {phase}")
    return rows


def _row(spot: str, fields: list[str]) -> StepRow:
    if len(fields) != len(COLUMNS):
        raise DataError(f"{spot}:1: {len(fields)} columns, expected {len(COLUMNS)}")
    phase = fields[0]
    if phase not in PHASES:
        raise DataError(f"{spot}:1: phase: unknown phase {phase[:40]!r}", hint=did_you_mean(phase, PHASES))
    counts: list[int] = []  # Those of columns 1 to 5.
    for index in range(1, 6):
        text = fields[index]
        if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= _MAX_COUNT):
            raise _bad(spot, fields, index, f"a whole number from 0 to {_MAX_COUNT}")
        counts.append(int(text))
    num_prefills, new_tokens, prefix_tokens, num_decodes, decode_kv = counts
    latency_ms = _latency(spot, fields)
    row = StepRow(phase, num_prefills, new_tokens, prefix_tokens, num_decodes, decode_kv, latency_ms)
    if phase != "decode" and not (row.num_prefills and row.new_tokens):
        raise _bad(spot, fields, 1 if not row.num_prefills else 2, f"at least 1 in a {phase} row")
    if phase != "prefill" and not row.num_decodes:
        raise _bad(spot, fields, 4, f"at least 1 in a {phase} row")
    return row


def _latency(spot: str, fields: list[str]) -> float:
    try:
        value = float(fields[6])
    except ValueError:
        value = math.nan
    if not 0 < value <= _MAX_LATENCY_MS:
        raise _bad(spot, fields, 6, "a positive number of milliseconds")
    return value


def _bad(spot: str, fields: list[str], index: int, expected: str) -> DataError:
    column = len(",".join(fields[:index])) + 2
    return DataError(f"{spot}:{column}: {COLUMNS[index]}: expected {expected}, got {fields[index][:40]!r}")
