"""Folders of layer times, as the profiler of LLMServingSim writes them: what one layer of each kind takes on a GPU.

    FOLDER/meta.yaml                 which model, which GPU, how it was profiled
    FOLDER/tp1/dense.csv             layer,tokens,time_us
    FOLDER/tp1/per_sequence.csv      layer,sequences,time_us
    FOLDER/tp1/attention.csv         prefill_chunk,kv_prefill,n_decode,kv_decode,time_us
    FOLDER/tp1/skew.csv              optional; batches whose decodes are of unlike length

`tp2` and so on hold what one of two GPUs takes. The files are read where they lie; nothing is copied or rewritten.
"""

import csv
import math
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from rota.base.errors import DataError

DENSE_COLUMNS = ("layer", "tokens", "time_us")
PER_SEQUENCE_COLUMNS = ("layer", "sequences", "time_us")
ATTENTION_COLUMNS = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
_SKEW_SHAPE = ("regime", "n", "nb", "ratio", "skew", "pc", "kp", "kvs", "kv_big", "kv_mean")
SKEW_COLUMNS = (*_SKEW_SHAPE, "t_mean_us", "t_max_us", "t_skew_us", "alpha")

_MAX_COUNT = 2**31 - 1
_MAX_TIME_US = 1e9
_SCALAR = re.compile(r"^(\s*)([A-Za-z_]+):\s*'?([^'#\n]*?)'?\s*$")

AttentionPoint = tuple[int, int, int, int]
"""Tokens of the prefill chunk, tokens before it, number of decodes, tokens before each of them."""


class SkewPoint(msgspec.Struct, frozen=True):
    """Two attention times of `num_decodes` decodes beside a prefill chunk of `prefill_chunk` tokens: with all decodes
    at their mean length, and as they are. They relate to each other; their unit is not that of the others."""

    prefill_chunk: int
    num_decodes: int
    mean_kv: int
    longest_kv: int
    mean_us: float
    skewed_us: float


class LayerTables(msgspec.Struct, frozen=True):
    """What a folder holds for one degree of tensor parallelism; all times in microseconds and of one layer."""

    model: str
    gpu: str
    engine: str
    """Which engine's kernels were profiled."""
    max_num_seqs: int | None
    """Largest batch that was profiled."""
    max_num_batched_tokens: int | None
    dense: dict[str, dict[int, float]]
    per_sequence: dict[str, dict[int, float]]
    attention: dict[AttentionPoint, float]
    skew: tuple[SkewPoint, ...]
    is_skew_declared: bool
    """Whether meta.yaml says that a model of these tables should use them (`skew_fit.enabled`)."""


def is_layer_folder(path: Path) -> bool:
    """Whether this is such a folder, or has exactly one below it."""
    return _folder(path) is not None


def read_layer_tables(path: str | Path, tensor_parallel: int = 1) -> LayerTables:
    """Read a folder, or the only one below `path`.

    Raises `DataError` naming file, line and column for a bad row, and the folder where a file or the degree of tensor
    parallelism is lacking.
    """
    root = Path(path)
    folder = _folder(root)
    if folder is None:
        raise DataError(
            f"{path}: no folder of layer tables", hint="it holds meta.yaml and, in tp1, dense.csv and attention.csv"
        )
    tables = folder / f"tp{tensor_parallel}"
    if not tables.is_dir():
        there = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        raise DataError(
            f"{folder}: no tables for tensor_parallel = {tensor_parallel}",
            hint=f"there are {', '.join(there) or 'none'}",
        )
    meta = _meta(folder / "meta.yaml")
    skew = tables / "skew.csv"
    return LayerTables(
        model=meta.get("model", ""),
        gpu=meta.get("gpu", meta.get("hardware", "")),
        engine=f"vLLM {meta['vllm_version']}" if "vllm_version" in meta else "unknown engine",
        max_num_seqs=_whole(meta.get("engine_effective.max_num_seqs")),
        max_num_batched_tokens=_whole(meta.get("engine_effective.max_num_batched_tokens")),
        dense=_by_layer(tables / "dense.csv", DENSE_COLUMNS),
        per_sequence=_by_layer(tables / "per_sequence.csv", PER_SEQUENCE_COLUMNS),
        attention=_attention(tables / "attention.csv"),
        skew=_skew(skew) if skew.exists() else (),
        is_skew_declared=meta.get("skew_fit.enabled") == "true",
    )


def _folder(path: Path) -> Path | None:
    if (path / "meta.yaml").is_file():
        return path
    below = sorted(path.glob("**/meta.yaml")) if path.is_dir() else []
    return below[0].parent if len(below) == 1 else None


def _meta(path: Path) -> dict[str, str]:
    """The plain `key: value` lines of the file, those one level down as `section.key`; lists and deeper ones are left
    out, since none is needed."""
    values: dict[str, str] = {}
    section = ""
    for line in _text(path).splitlines():
        match = _SCALAR.match(line)
        if match is None:
            continue
        indent, key, value = match.groups()
        if not indent:
            section = key
        if value and len(indent) <= 2:
            values[f"{section}.{key}" if indent else key] = value
    return values


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8") from None


class _Row:
    """One line of a table, whose fields are checked as they are asked for."""

    def __init__(self, path: Path, line: int, columns: tuple[str, ...], fields: list[str]) -> None:
        self.path, self.line, self.columns, self.fields = path, line, columns, fields

    def error(self, column: str, expected: str) -> DataError:
        index = self.columns.index(column)
        at = len(",".join(self.fields[:index])) + (2 if index else 1)
        return DataError(
            f"{self.path}:{self.line}:{at}: {column}: expected {expected}, got {self.fields[index][:40]!r}"
        )

    def count(self, column: str) -> int:
        text = self.fields[self.columns.index(column)]
        if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= _MAX_COUNT):
            raise self.error(column, f"a whole number from 0 to {_MAX_COUNT}")
        return int(text)

    def time_us(self, column: str = "time_us") -> float:
        try:
            value = float(self.fields[self.columns.index(column)])
        except ValueError:
            value = math.nan
        if not 0 < value <= _MAX_TIME_US:
            raise self.error(column, "a positive number of microseconds")
        return value


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[_Row]:
    lines = csv.reader(_text(path).splitlines())
    num_rows = 0
    try:
        if tuple(next(lines, [])) != columns:
            raise DataError(f"{path}:1:1: expected the header {','.join(columns)}")
        for fields in lines:
            if len(fields) != len(columns):
                raise DataError(f"{path}:{lines.line_num}:1: {len(fields)} columns, expected {len(columns)}")
            num_rows += 1
            yield _Row(path, lines.line_num, columns, fields)
    except csv.Error as error:
        raise DataError(f"{path}:{lines.line_num}:1: not CSV: {error}") from None
    if not num_rows:
        raise DataError(f"{path}: no rows")


def _by_layer(path: Path, columns: tuple[str, ...]) -> dict[str, dict[int, float]]:
    layers: dict[str, dict[int, float]] = {}
    for row in _rows(path, columns):
        points = layers.setdefault(row.fields[0], {})
        count = row.count(columns[1])
        if count in points:
            raise row.error(columns[1], f"each number once for {row.fields[0]}")
        points[count] = row.time_us()
    return layers


def _attention(path: Path) -> dict[AttentionPoint, float]:
    points: dict[AttentionPoint, float] = {}
    for row in _rows(path, ATTENTION_COLUMNS):
        chunk, before, num, each = (row.count(column) for column in ATTENTION_COLUMNS[:4])
        if not chunk and not num:
            raise row.error("n_decode", "at least 1 where prefill_chunk is 0")
        if (chunk, before, num, each) in points:
            raise row.error("prefill_chunk", "each point once")
        points[chunk, before, num, each] = row.time_us()
    if not any(chunk == 0 for chunk, *_ in points) or not any(num == 0 for _, _, num, _ in points):
        raise DataError(f"{path}: needs rows of decodes alone and of a prefill alone")
    return points


def _skew(path: Path) -> tuple[SkewPoint, ...]:
    return tuple(
        SkewPoint(
            prefill_chunk=row.count("pc"),
            num_decodes=row.count("n"),
            mean_kv=row.count("kv_mean"),
            longest_kv=row.count("kv_big"),
            mean_us=row.time_us("t_mean_us"),
            skewed_us=row.time_us("t_skew_us"),
        )
        for row in _rows(path, SKEW_COLUMNS)
    )
