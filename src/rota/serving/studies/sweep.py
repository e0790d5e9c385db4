"""Many runs of one sweep into one Parquet file; a sweep that was stopped goes on where it stopped.

While it runs, ended runs are lines of `OUT.part`: a header that says which sweep they are of, then a row each. When all
have ended, `OUT` is written at once and the other file goes.
"""

import fcntl
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import msgspec

from rota import __version__
from rota.base.errors import ConfigError, DataError, RotaError
from rota.serving.metrics.summary import Summary
from rota.serving.sim.run import SimulationConfig, simulate
from rota.serving.studies.runner import Runner
from rota.serving.studies.spec import Runs

METRICS = (
    "goodput_rps",
    "slo_attainment",
    *(f"{name}_{label}_ms" for name in ("ttft", "tpot", "e2e") for label in ("mean", "p50", "p90", "p99")),
    "output_tokens_per_second",
    "num_requests",
    "num_finished",
    "num_rejected",
    "num_failed",
    "num_preemptions",
    "prefix_hit_rate",
    "num_steps",
    "span_seconds",
    "cpu_seconds",
)
"""Columns of the results, after those of the parameters; as `rota simulate --json` calls them."""
_WHOLE = ("num_requests", "num_finished", "num_rejected", "num_failed", "num_preemptions", "num_steps")

Row = dict[str, Any]


class SweepResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a sweep."""

    out: str
    fingerprint: str
    num_runs: int
    num_reused: int
    """Runs that an earlier go had done."""
    num_failed: int
    varied: tuple[str, ...]
    by: str
    best: tuple[Row, ...]
    """The rows that are best by that metric, the best first."""
    version: str = __version__


def is_lower_better(metric: str) -> bool:
    """Whether less of it is better."""
    return metric.endswith(("_ms", "_seconds")) or metric in (
        "num_rejected",
        "num_failed",
        "num_preemptions",
        "num_steps",
    )


def run_point(config: SimulationConfig) -> Row:
    """Simulate one point and keep its metrics only. An error of the run is a row that says so; a module-level function,
    so that other processes and machines can call it."""
    try:
        return _metrics(simulate(config, with_digest=False).summary) | {"error": None}
    except RotaError as error:
        return dict.fromkeys(METRICS) | {"error": error.message}
    except MemoryError:
        return dict.fromkeys(METRICS) | {"error": "the run needs more memory than a worker may take"}


def _metrics(summary: Summary) -> Row:
    row: Row = {}
    for name in METRICS:
        kind, _, label = name.removesuffix("_ms").partition("_")
        is_latency = name.endswith("_ms")
        row[name] = getattr(getattr(summary, f"{kind}_ms"), label) if is_latency else getattr(summary, name)
    return row


def sweep(
    runs: Runs,
    out: Path,
    runner: Runner,
    *,
    by: str = "goodput_rps",
    num_best: int = 10,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[SweepResult, list[Row]]:
    """Carry out the runs that are not yet in `out`, write it, and return it with all rows.

    Raises `ConfigError` if `out` holds another sweep or another process is at it, and `DataError` if it cannot be read.
    """
    if by not in METRICS:
        raise ConfigError(f"--best: no metric {by!r}", hint=f"metrics are {', '.join(METRICS)}")
    fingerprint = runs.fingerprint()
    done = _finished(out, fingerprint, runs)
    num_reused = len(done)
    if len(done) < len(runs.points):
        part = out.with_name(out.name + ".part")
        with _opened(part) as file:
            _lock(file, part)
            done |= _begun(file, part, fingerprint, runs)
            num_reused = len(done)
            _carry_out(runs, done, file, runner, on_progress)
            rows = [done[number] for number in range(len(runs.points))]
            _write(out, rows, tuple(runs.spec.vary), fingerprint, runs.document())
            part.unlink()
    rows = [done[number] for number in range(len(runs.points))]
    result = SweepResult(
        out=str(out),
        fingerprint=fingerprint,
        num_runs=len(rows),
        num_reused=num_reused,
        num_failed=sum(row["error"] is not None for row in rows),
        varied=tuple(runs.spec.vary),
        by=by,
        best=tuple(best_rows(rows, by, num_best)),
    )
    return result, rows


def best_rows(rows: Sequence[Row], by: str, count: int) -> list[Row]:
    """The best rows by a metric, the best first; runs that have none are left out."""
    sign = 1 if is_lower_better(by) else -1
    return sorted((row for row in rows if row[by] is not None), key=lambda row: (sign * row[by], row["run"]))[:count]


def _carry_out(
    runs: Runs, done: dict[int, Row], file: TextIO, runner: Runner, on_progress: Callable[[int, int], None]
) -> None:
    left = [number for number in range(len(runs.points)) if number not in done]
    total = len(runs.points)
    configs = [runs.configs[number] for number in left]
    for index, metrics in runner.map(run_point, configs, lambda: on_progress(len(done), total)):
        number = left[index]
        row = {"run": number, **runs.points[number], **metrics}
        file.write(json.dumps(row) + "\n")
        file.flush()
        done[number] = row
        on_progress(len(done), total)


# --- files ------------------------------------------------------------------------------------------------------------


def _opened(part: Path) -> TextIO:
    try:
        return part.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out: {part} cannot be written: {error.strerror or error}") from None


def _lock(file: TextIO, part: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(
            f"--out: another process writes to {part}", hint="wait for it, or give another --out"
        ) from None


def _begun(file: TextIO, part: Path, fingerprint: str, runs: Runs) -> dict[int, Row]:
    """The rows of an earlier go. A last line that was cut off by a kill is dropped; the file is left ready for more."""
    file.seek(0)
    lines = file.read().splitlines(keepends=True)
    if not lines or not lines[0].endswith("\n"):
        file.truncate(0)
        file.write(json.dumps({"fingerprint": fingerprint, "sweep": runs.document()}) + "\n")
        file.flush()
        return {}
    whole = [line for line in lines if line.endswith("\n")]
    try:
        header, *rows = map(json.loads, whole)
        _same(part, header["fingerprint"], fingerprint, header["sweep"], runs)
        done = {int(row["run"]): row for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{part}: is not what a sweep writes: {error}", hint="delete it to begin anew") from None
    file.truncate(sum(len(line.encode()) for line in whole))
    file.seek(0, os.SEEK_END)
    return done


def _same(path: Path, found: str, wanted: str, document: Mapping[str, Any], runs: Runs) -> None:
    if found == wanted:
        return
    mine = runs.document()
    differ = [
        f"{table}.{name}"
        for table in ("base", "vary", "sample")
        for name in sorted((document.get(table) or {}).keys() | (mine.get(table) or {}).keys())
        if (document.get(table) or {}).get(name) != (mine.get(table) or {}).get(name)
    ]
    what = ", ".join(differ) or "a file that it names, or Rota's version"
    raise ConfigError(
        f"--out: {path} holds results of another sweep; what differs: {what}",
        hint="give another --out, or delete that file to begin anew",
    )


def _finished(out: Path, fingerprint: str, runs: Runs) -> dict[int, Row]:
    if not out.exists():
        return {}
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(out)
        metadata = table.schema.metadata or {}
        document = json.loads(metadata[b"rota.sweep"])
        found = metadata[b"rota.fingerprint"].decode()
    except (OSError, pa.ArrowInvalid, KeyError, ValueError):
        raise DataError(f"--out: {out} is not what a sweep writes", hint="give another --out") from None
    _same(out, found, fingerprint, document, runs)
    return {row["run"]: row for row in table.to_pylist()}


def _write(
    out: Path, rows: Sequence[Row], varied: Sequence[str], fingerprint: str, document: Mapping[str, Any]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, pa.Array] = {"run": pa.array([row["run"] for row in rows], pa.int64())}
    for name in varied:
        columns[name] = _array([row[name] for row in rows])
    for name in METRICS:
        kind = pa.int64() if name in _WHOLE else pa.float64()
        columns[name] = pa.array([row[name] for row in rows], kind)
    columns["error"] = pa.array([row["error"] for row in rows], pa.string())
    metadata = {"rota.fingerprint": fingerprint, "rota.sweep": json.dumps(document), "rota.version": __version__}
    table = pa.table(columns).replace_schema_metadata(metadata)
    new = out.with_name(out.name + ".new")
    pq.write_table(table, new)
    new.replace(out)


def _array(values: Sequence[Any]) -> Any:
    """Numbers as numbers; where kinds are mixed, text."""
    import pyarrow as pa

    if all(isinstance(value, bool) for value in values):
        return pa.array(values, pa.bool_())
    if any(isinstance(value, (bool, str)) for value in values):
        return pa.array([str(value) for value in values], pa.string())
    whole = all(isinstance(value, int) for value in values)
    return pa.array(values, pa.int64() if whole else pa.float64())
