"""Conformance of trace formats: `check_format` raises AssertionError at the first broken rule."""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rota.base.errors import DataError
from rota.base.random_streams import RandomStreams
from rota.serving.workload.arrivals import Arrival
from rota.serving.workload.formats import TraceReader, TraceWriter

GARBAGE = b"@#!{garbage"
"""A line that is a row of no format."""


def check_format(reader: TraceReader, writer: TraceWriter, sample: Sequence[Arrival]) -> None:
    """Prove that a format keeps what a trace says and stops at what it cannot read.

    `sample` is at least three arrivals that the format can hold, the last later than the first. The rules:

    * what was written reads back equal, and the reader recognises it by its beginning;
    * rows come one at a time: rows ahead of a bad one are yielded before the error;
    * a bad row, a row cut short, bytes that are not UTF-8, a NUL byte, a byte order mark, an empty file and time that
      goes back are each a `DataError` that begins `FILE:LINE:COLUMN:` with the right line;
    * an absent file is a `DataError` that names it.
    """
    assert len(sample) >= 3 and sample[-1].at > sample[0].at, "the sample needs 3 arrivals that take time"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        num_rows = writer.write(path, sample)
        assert num_rows == len(sample), f"write returned {num_rows} for {len(sample)} arrivals"
        written = path.read_bytes()
        assert reader.recognises(written[: 64 * 1024].decode()), "the reader does not recognise what its writer wrote"
        got = list(_read(reader, path))
        assert got == list(sample), f"round trip changed row {_first_difference(got, sample)}"
        _check_bad_rows(reader, path, written.splitlines(keepends=True), sample)
        _check_backwards(reader, writer, path, sample)
        for content, line in ((b"", 1), (b"\xef\xbb\xbf" + written, 1)):
            path.write_bytes(content)
            _expect_error(reader, path, line, 0, f"a file that begins {content[:3]!r}")
        path.unlink()
        try:
            list(_read(reader, path))
        except DataError as error:
            assert str(path) in error.message, f"the error for an absent file does not name it: {error.message}"
        else:
            raise AssertionError("an absent file reads as an empty trace")


def _check_bad_rows(reader: TraceReader, path: Path, lines: list[bytes], sample: Sequence[Arrival]) -> None:
    num_header_lines = len(lines) - len(sample)
    assert num_header_lines >= 0, "a row must be a line"
    for row in range(len(sample)):
        good = lines[num_header_lines + row]
        for what, bad in (
            ("garbage", GARBAGE + b"\n"),
            ("a row cut short", good[: len(good) // 3] + b"\n"),
            ("an empty line", b"\n"),
            ("bytes that are not UTF-8", b"\xff\xfe" + good),
            ("a NUL byte", b"\0" + good),
        ):
            changed = [*lines]
            changed[num_header_lines + row] = bad
            path.write_bytes(b"".join(changed))
            _expect_error(reader, path, num_header_lines + row + 1, row, what)


def _check_backwards(reader: TraceReader, writer: TraceWriter, path: Path, sample: Sequence[Arrival]) -> None:
    writer.write(path, [*sample, sample[0]])
    num_lines = len(path.read_bytes().splitlines())
    _expect_error(reader, path, num_lines, len(sample), "time that goes back")


def _read(reader: TraceReader, path: Path) -> list[Arrival]:
    return list(reader.read(path, RandomStreams(0)))


def _expect_error(reader: TraceReader, path: Path, line: int, num_before: int, what: str) -> None:
    """Reading must yield `num_before` rows and then raise a DataError at `line`."""
    rows = 0
    try:
        for _ in reader.read(path, RandomStreams(0)):
            rows += 1
    except DataError as error:
        spot = re.match(re.escape(str(path)) + r":(\d+):(\d+): .", error.message)
        assert spot is not None, f"the error for {what} does not begin FILE:LINE:COLUMN: {error.message}"
        assert int(spot[1]) == line, f"the error for {what} on line {line} names line {spot[1]}: {error.message}"
        assert int(spot[2]) >= 1, f"columns count from 1: {error.message}"
        assert rows == num_before, f"{what}: {rows} rows came before the error, expected {num_before}"
    else:
        raise AssertionError(f"{what} on line {line} was read without an error, as {rows} rows")


def _first_difference(got: Sequence[Arrival], sample: Sequence[Arrival]) -> str:
    for index, (left, right) in enumerate(zip(got, sample, strict=False)):
        if left != right:
            return f"{index}: {right} became {left}"
    return f"count: {len(sample)} became {len(got)}"
