"""The elements of a JSON array, one at a time, however long the array is and wherever its lines end."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rota.base.errors import DataError
from rota.serving.workload.formats.spot import MAX_LINE_BYTES, byte_chunks, data_error

_MARK = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["{}\[\],]', re.DOTALL)
"""A whole string, or a mark that may change the depth; a lone quote opens a string that is cut off."""
_BLANK = b" \t\r\n"


class Element(NamedTuple):
    """One element and where it begins."""

    line: int
    column: int
    source: bytes


class _Place:
    """Line and column of the first byte that is still to be taken. Columns count characters."""

    def __init__(self) -> None:
        self.line, self.column = 1, 1

    def pass_over(self, taken: bytes) -> None:
        num_lines = taken.count(b"\n")
        self.line += num_lines
        last = taken[taken.rfind(b"\n") + 1 :] if num_lines else taken
        width = sum(1 for byte in last if byte & 0xC0 != 0x80) if not last.isascii() else len(last)
        self.column = width + 1 if num_lines else self.column + width


def array_elements(path: Path) -> Iterator[Element]:
    """Yield the elements of the array that a file is. Raises `DataError` for a file that is none, is cut short, goes on
    after its end, or has an element beyond 16 MiB. Elements are not parsed."""
    scan = _Scan(path)
    for chunk in byte_chunks(path):
        yield from scan.feed(chunk)
    scan.finish()


class _Scan:
    """The bytes that are not taken yet, and how deep they are."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = _Place()
        self._buffer = b""
        self._from = 0
        """Up to where the buffer has been looked through."""
        self._depth = 0
        self._has_ended = False
        self._wants_element = False

    def feed(self, chunk: bytes) -> Iterator[Element]:
        self._buffer += chunk
        if self._depth == 0 and not self._has_ended:
            self._drop_blanks()
            if not self._buffer:
                return
            if not self._buffer.startswith(b"["):
                raise self._error("expected a JSON array, [ … ]")
            self._take(1)
            self._depth = 1
        while not self._has_ended and (found := _MARK.search(self._buffer, self._from)) is not None:
            mark = found.group()
            if mark == b'"':
                self._from = found.start()
                break
            self._from = found.end()
            if mark in (b"{", b"["):
                self._depth += 1
            elif mark in (b"}", b"]"):
                self._depth -= 1
                if self._depth == 0:
                    yield from self._element(found.start(), is_last=True)
            elif mark == b"," and self._depth == 1:
                yield from self._element(found.start(), is_last=False)
        else:
            self._from = len(self._buffer)
        if self._has_ended:
            self._drop_blanks()
            if self._buffer:
                raise self._error("text after the end of the array")
        if len(self._buffer) > MAX_LINE_BYTES:
            raise self._error(f"an element of more than {MAX_LINE_BYTES} bytes; this is no trace")

    def finish(self) -> None:
        if not self._has_ended:
            self._place.pass_over(self._buffer)
            raise self._error("the file is cut short: its array does not end")

    def _element(self, end: int, *, is_last: bool) -> Iterator[Element]:
        """Take the element that ends before the comma or bracket at `end`, and that mark."""
        num_before = len(self._buffer)
        self._drop_blanks()
        end -= num_before - len(self._buffer)
        source = self._buffer[:end].rstrip(_BLANK)
        if source:
            yield Element(self._place.line, self._place.column, source)
        elif not is_last or self._wants_element:
            raise self._error("expected an element of the array")
        self._take(end + 1)
        self._from = 0
        self._has_ended = is_last
        self._wants_element = not is_last

    def _drop_blanks(self) -> None:
        self._take(len(self._buffer) - len(self._buffer.lstrip(_BLANK)))

    def _take(self, count: int) -> None:
        self._place.pass_over(self._buffer[:count])
        self._buffer = self._buffer[count:]
        self._from = max(0, self._from - count)

    def _error(self, problem: str) -> DataError:
        return data_error(self._path, self._place.line, self._place.column, problem)
