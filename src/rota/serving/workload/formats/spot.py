"""Where in a file a reader stands, and the error that says so: `FILE:LINE:COLUMN: field: expected …, got …`."""

from collections.abc import Iterator
from pathlib import Path

from rota.base.errors import DataError

MAX_LINE_BYTES = 16 * 1024 * 1024
"""A longer line is no row of a trace; stopping there bounds the memory that a wrong file can take."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def shown(value: object, limit: int = 40) -> str:
    """A value as an error message shows it: its repr, cut short."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits.
        return "a number of thousands of digits"
    return text if len(text) <= limit else text[:limit] + "…"


def data_error(path: Path, line: int, column: int, problem: str, *, hint: str | None = None) -> DataError:
    """An error that points at one character of a file. Lines and columns count from 1."""
    return DataError(f"{path}:{line}:{column}: {problem}", hint=hint)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield `(line number, text without its line end)` for every line of a UTF-8 file, one at a time.

    Raises `DataError` for a file that cannot be opened or is empty, a byte order mark, bytes that are not UTF-8, a NUL,
    and a line beyond `MAX_LINE_BYTES`.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    number = 0
    with file:
        while True:
            try:
                raw = file.readline(MAX_LINE_BYTES + 1)
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
            if not raw:
                break
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                raise data_error(path, number, 1, f"a line of more than {MAX_LINE_BYTES} bytes; this is no trace")
            if number == 1 and raw.startswith(_BYTE_ORDER_MARK):
                raise data_error(path, 1, 1, "byte order mark", hint="save the file as UTF-8 without a byte order mark")
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                column = len(raw[: error.start].decode("utf-8", "replace")) + 1
                raise data_error(path, number, column, f"byte 0x{raw[error.start]:02x} is not UTF-8") from None
            if "\0" in text:
                raise data_error(path, number, text.index("\0") + 1, "a NUL byte; this is no text file")
            yield number, text.removesuffix("\n").removesuffix("\r")
    if number == 0:
        raise data_error(path, 1, 1, "the file is empty")
