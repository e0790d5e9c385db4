"""Follows the facts file of an engine that runs here: what its steps were, a moment after they ran."""

import os
from io import FileIO
from pathlib import Path

import msgspec

from rota.serving.engines.vllm.facts import EngineFacts, StepRecord, decode_line

_READ_BYTES = 1 << 20
"""At most so much at once, so that a long file is caught up with in several looks."""


class FactsFollower:
    """Reads what is appended to a facts file from now on, across its moves to `.1` and restarts of the engine."""

    def __init__(self, path: Path) -> None:
        """What the file holds already is of an earlier run, and is passed over."""
        self._path = path
        self._rest = b""
        self._file: FileIO | None = _open(path)
        if self._file is not None:
            self._file.seek(0, 2)

    def read_new(self) -> list[StepRecord | EngineFacts]:
        """What was appended since the last look, in whole lines; nothing if there is no file (yet)."""
        if self._file is None:
            self._file = _open(self._path)
            if self._file is None:
                return []
        data = self._file.read(_READ_BYTES)
        if not data and self._has_moved(self._file):
            # Read to its end, so nothing of the old file is missed: it moves in between two writes.
            self._file.close()
            self._file, self._rest = _open(self._path), b""
            data = self._file.read(_READ_BYTES) if self._file is not None else b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _READ_BYTES:
            self._rest = b""
        return [found for line in lines if (found := _decoded(line)) is not None]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _has_moved(self, file: FileIO) -> bool:
        try:
            return not os.path.samestat(self._path.stat(), os.fstat(file.fileno()))
        except FileNotFoundError:
            return False


def _open(path: Path) -> FileIO | None:
    try:
        return FileIO(path)
    except FileNotFoundError:
        return None


def _decoded(line: bytes) -> StepRecord | EngineFacts | None:
    """None for a line that an engine which died did not finish."""
    try:
        return decode_line(line)
    except msgspec.MsgspecError:
        return None
