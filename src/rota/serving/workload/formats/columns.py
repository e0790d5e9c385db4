"""Rows of CSV files whose values hold no commas: fields by column name, each checked, each with its spot."""

import re
from collections.abc import Sequence
from pathlib import Path

from rota.base.errors import DataError
from rota.base.instant import NANOSECONDS_PER_SECOND
from rota.serving.workload.arrivals import MAX_TOKENS
from rota.serving.workload.formats.leniency import ZERO_HINT, Tally, Zero
from rota.serving.workload.formats.spot import data_error, shown

MAX_SPAN_SECONDS = 20 * 365 * 86_400
"""No trace spans twenty years; a time beyond is in another unit than the format's."""

_WHOLE = re.compile(r"[0-9]{1,10}")
_DECIMAL = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,9}))?")


class CsvRow:
    """One line of a file, its fields found by the header's columns."""

    __slots__ = ("columns", "fields", "line", "path")

    def __init__(self, path: Path, line: int, text: str, columns: Sequence[str]) -> None:
        """Raises `DataError` for an empty line, a missing field and a field too many."""
        self.path, self.line, self.columns = path, line, columns
        self.fields = text.split(",")
        if len(self.fields) != len(columns):
            raise self._wrong_width(text)

    def error(self, index: int, problem: str, *, hint: str | None = None) -> DataError:
        """An error that points at the beginning of a field, and names it."""
        column = sum(len(field) + 1 for field in self.fields[:index]) + 1
        return data_error(self.path, self.line, column, f"{self.columns[index]}: {problem}", hint=hint)

    def whole(self, index: int, least: int, most: int, what: str = "a whole number") -> int:
        """A field as a whole number in a range."""
        text = self.fields[index]
        if _WHOLE.fullmatch(text) is None or not least <= (value := int(text)) <= most:
            raise self.error(index, f"expected {what} from {least} to {most}, got {shown(text)}")
        return value

    def tokens(self, index: int, *, least: int = 1) -> int:
        """A field as a number of tokens."""
        try:
            return self.whole(index, least, MAX_TOKENS, "a whole number of tokens")
        except DataError as error:
            if least == 1 and self.fields[index] == "0":
                error.hint = ZERO_HINT
            raise

    def lengths(self, prompt: int, output: int, zero: Zero, tally: Tally) -> tuple[int, int] | None:
        """The two lengths of a row, in these columns; None if the row is to be left out."""
        least = 1 if zero == "refuse" else 0
        lengths = self.tokens(prompt, least=least), self.tokens(output, least=least)
        return lengths if all(lengths) else tally.settled(*lengths, zero)

    def seconds(self, index: int) -> int:
        """A field in decimal seconds, as exact nanoseconds. Digits beyond the ninth are refused, not cut."""
        text = self.fields[index]
        match = _DECIMAL.fullmatch(text)
        if match is None:
            raise self.error(index, f"expected seconds, such as 12.5, got {shown(text)}")
        whole, fraction = match.groups()
        value = int(whole)
        if value > MAX_SPAN_SECONDS * 5:
            raise self.error(
                index,
                f"{shown(text)} s are more than a century",
                hint="this column is in seconds; milliseconds must be divided by 1,000",
            )
        return value * NANOSECONDS_PER_SECOND + int((fraction or "").ljust(9, "0"))

    def _wrong_width(self, text: str) -> DataError:
        if not text:
            return data_error(self.path, self.line, 1, "an empty line", hint="remove it")
        width = len(self.columns)
        if len(self.fields) < width:
            problem = f"{self.columns[len(self.fields)]}: missing; expected {width} columns"
            return data_error(self.path, self.line, len(text) + 1, problem)
        column = len(",".join(self.fields[:width])) + 2
        return data_error(
            self.path, self.line, column, f"{len(self.fields)} columns; expected {','.join(self.columns)}"
        )


def wrong_header(path: Path, header: str, expected: Sequence[str]) -> DataError:
    """The error for a first line that is not the expected one, at its first difference."""
    column = 1
    for index, field in enumerate(header.split(",")):
        if index >= len(expected) or field != expected[index]:
            break
        column += len(field) + 1
    else:
        column = len(header) + 1
    return data_error(path, 1, column, f"expected the header {','.join(expected)}")


def header_fields(head: str) -> set[str]:
    """The column names of a text's first line, whatever quotes and blanks are around them."""
    return {field.strip(' "') for field in head.split("\n", 1)[0].rstrip("\r").split(",")}


def decimal_seconds(nanoseconds: int) -> str:
    """Nanoseconds as seconds, exactly, without needless zeros."""
    whole, fraction = divmod(nanoseconds, NANOSECONDS_PER_SECOND)
    return f"{whole}.{fraction:09d}".rstrip("0").rstrip(".") if fraction else str(whole)
