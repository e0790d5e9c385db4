"""Where in a file a reader stands, and the error that says so: `FILE:LINE:COLUMN: field: expected …, got …`.

Files are read in blocks of whole lines. A reader may take a block at once where it can be sure that every row of it is
good; otherwise it goes through the block's lines, and says where the bad one is.
"""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from rota.base.errors import DataError

MAX_LINE_BYTES = 16 * 1024 * 1024
"""A longer line is no row of a trace; stopping there bounds the memory that a wrong file can take."""

FIRST_BLOCK_BYTES = 16 * 1024
BLOCK_BYTES = 256 * 1024
"""Of a block. The first is small: who wants ten rows should not wait for thousands."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"


def shown(value: object, limit: int = 40) -> str:
    """A value as an error message shows it: its repr, cut short."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits.
        return "a number of thousands of digits"
    return text if len(text) <= limit else text[:limit] + "…"


def is_text(value: str) -> bool:
    """Whether a text can be written as UTF-8; JSON can escape halves of characters, which cannot."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def data_error(path: Path, line: int, column: int, problem: str, *, hint: str | None = None) -> DataError:
    """An error that points at one character of a file. Lines and columns count from 1."""
    return DataError(f"{path}:{line}:{column}: {problem}", hint=hint)


def read_head(path: Path, num_bytes: int) -> bytes:
    """The first bytes of a file, unpacked if it is gzip. Raises `DataError` if it cannot be read."""
    try:
        with _open(path) as file:
            return file.read(num_bytes)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None


def byte_chunks(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes in chunks, unpacked if it is gzip. Raises `DataError` for a file that cannot be opened or is
    empty, a byte order mark, a NUL, and a packed file that is damaged or cut short."""
    size, num_lines = FIRST_BLOCK_BYTES, 0
    is_empty = True
    try:
        with _open(path) as file:
            while chunk := file.read(size):
                if is_empty and chunk.startswith(_BYTE_ORDER_MARK):
                    raise data_error(path, 1, 1, "byte order mark", hint="save the file as UTF-8 without one")
                if b"\0" in chunk:
                    number = num_lines + chunk.count(b"\n", 0, chunk.index(b"\0")) + 1
                    raise data_error(path, number, 1, "a NUL byte on this line; this is no text file")
                is_empty, size = False, BLOCK_BYTES
                num_lines += chunk.count(b"\n")
                yield chunk
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error, num_lines + 1) from None
    if is_empty:
        raise data_error(path, 1, 1, "the file is empty")


def line_blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield `(number of the first line, whole lines)`; only a file's last line may lack its end. gzip is unpacked.

    Raises `DataError` for a file that cannot be opened or is empty, a byte order mark, a line beyond `MAX_LINE_BYTES`
    and a packed file that is cut short or damaged.
    """
    number, rest, size = 1, b"", FIRST_BLOCK_BYTES
    try:
        with _open(path) as file:
            while chunk := file.read(size):
                if number == 1 and not rest and chunk.startswith(_BYTE_ORDER_MARK):
                    raise data_error(path, 1, 1, "byte order mark", hint="save the file as UTF-8 without one")
                size = BLOCK_BYTES
                block = rest + chunk if rest else chunk
                end = block.rfind(b"\n") + 1
                rest = block[end:]
                if end and block.find(b"\n") <= MAX_LINE_BYTES:
                    block = block[:end]
                    yield number, block
                    number += block.count(b"\n")
                elif end or len(rest) > MAX_LINE_BYTES:
                    raise data_error(path, number, 1, f"a line of more than {MAX_LINE_BYTES} bytes; this is no trace")
    except (OSError, EOFError, zlib.error) as error:
        if rest:
            yield number, rest
        raise _unreadable(path, error, number) from None
    if rest:
        yield number, rest
    elif number == 1:
        raise data_error(path, 1, 1, "the file is empty")


def block_lines(path: Path, number: int, block: bytes) -> Iterator[tuple[int, str]]:
    """Yield `(line number, text without its line end)` of the lines of a block, one at a time.

    Raises `DataError` for bytes that are not UTF-8 and for a NUL.
    """
    lines = block.split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, raw in enumerate(lines, start=number):  # noqa: B020 - counts on from the block's first line
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            column = len(raw[: error.start].decode("utf-8", "replace")) + 1
            raise data_error(path, number, column, f"byte 0x{raw[error.start]:02x} is not UTF-8") from None
        if "\0" in text:
            raise data_error(path, number, text.index("\0") + 1, "a NUL byte; this is no text file")
        yield number, text.removesuffix("\r")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield `(line number, text without its line end)` for every line of a UTF-8 file. Raises what `line_blocks` and
    `block_lines` do."""
    for number, block in line_blocks(path):
        yield from block_lines(path, number, block)


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        is_packed = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    opened: Any = gzip.GzipFile(path) if is_packed else path.open("rb")
    return cast("IO[bytes]", opened)


def _unreadable(path: Path, error: Exception, line: int = 1) -> DataError:
    if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
        return DataError(f"{path}: cannot be read: {error.strerror or error}")
    return data_error(path, line, 1, f"the gzip file is damaged or cut short: {error}")
