"""What each step of an instance was made of, as JSON lines: so that a running engine is not a black box."""

from pathlib import Path
from time import monotonic_ns
from typing import Any, BinaryIO

import msgspec

from rota.base.errors import ConfigError
from rota.serving.model.instance import InstanceLimits

FLUSH_EVERY_NS = 50_000_000
"""Short, since a router that follows the file decides by it; one write for every few steps is little beside a step."""
MAX_BYTES = 64 * 1024 * 1024

_ENGINE_TAG = b'{"engine":'


class EngineFacts(msgspec.Struct, frozen=True):
    """What an engine says of itself: a line of its own at the head of a facts file, and again after a restart."""

    engine: str
    """Name and version."""
    model: str
    device: str
    dtype: str
    limits: InstanceLimits


class StepRecord(msgspec.Struct, frozen=True):
    """One step of a live instance. Times in ns; `at` is of the engine's monotonic clock, `unix_at` of the wall
    clock."""

    step: int
    at: int
    """When it was scheduled."""
    unix_at: int
    step_ns: int
    """From the beginning of scheduling to the end of the update with its tokens."""
    decision_ns: int
    """Of that, what our policies and their adapter took."""
    num_running: int
    """After admission."""
    num_waiting: int
    num_free_blocks: int
    """Blocks that can be had once this batch holds its own."""
    num_blocks: int
    prefills: tuple[tuple[int, int], ...]
    """(new tokens, context tokens) of every sequence that computes more than one token."""
    num_prefill_tokens: int
    num_decodes: int
    """Sequences that compute one token."""
    decode_kv_tokens: int
    """Their context tokens in all."""
    num_cached_tokens: int
    """Prefix-cache hits of the sequences admitted in this step, in tokens."""
    num_admitted: int
    num_displaced: int
    num_preempted: int
    """Because memory ran out; displaced ones not counted."""
    num_finished: int
    cpu_ns: int | None = None
    """CPU time of the processes that compute, within `step_ns`; None where it is not known."""


class FactsFile:
    """Appends step records to a file, buffered. At `max_bytes` the file moves to `<name>.1`, replacing the one before,
    so that the two together never pass twice that size."""

    def __init__(self, path: str | Path, *, max_bytes: int = MAX_BYTES, engine: EngineFacts | None = None) -> None:
        """`engine` is written at the head of every file."""
        self.path = Path(path)
        self._max_bytes = max_bytes
        self._encoder = msgspec.json.Encoder()
        self._head = b"" if engine is None else self._encoder.encode(engine) + b"\n"
        self._lines: list[bytes] = []
        self._flushed_at = monotonic_ns()
        self._file, self._num_bytes = self._open()

    def append(self, record: Any) -> None:
        """Take one record; written to disk at most `FLUSH_EVERY_NS` after, while steps go on."""
        self._lines.append(self._encoder.encode(record))
        if monotonic_ns() - self._flushed_at >= FLUSH_EVERY_NS:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered."""
        self._flushed_at = monotonic_ns()
        if not self._lines:
            return
        data = b"\n".join(self._lines) + b"\n"
        self._lines.clear()
        if self._num_bytes and self._num_bytes + len(data) > self._max_bytes:
            self._file.close()
            self.path.replace(self.path.with_name(self.path.name + ".1"))
            self._file, self._num_bytes = self._open()
        self._file.write(data)
        self._file.flush()
        self._num_bytes += len(data)

    def close(self) -> None:
        self.flush()
        self._file.close()

    def _open(self) -> tuple[BinaryIO, int]:
        try:
            file = self.path.open("ab")
        except OSError as error:
            raise ConfigError(f"facts: {self.path} cannot be written: {error.strerror}") from None
        file.write(self._head)
        file.flush()
        return file, file.tell()


def read_facts(path: str | Path) -> list[StepRecord]:
    """The records of a facts file, oldest first; a last line that is still being written is left out."""
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    return [msgspec.json.decode(line, type=StepRecord) for line in lines if not line.startswith(_ENGINE_TAG)]


def decode_line(line: bytes) -> StepRecord | EngineFacts:
    """What one line says. Raises `msgspec.MsgspecError` for one that is none."""
    if line.startswith(_ENGINE_TAG):
        return msgspec.json.decode(line, type=EngineFacts)
    return msgspec.json.decode(line, type=StepRecord)


def read_engine(path: str | Path) -> EngineFacts | None:
    """What the engine said of itself when it was started last; None if the file does not hold that."""
    lines = [line for line in Path(path).read_bytes().split(b"\n")[:-1] if line.startswith(_ENGINE_TAG)]
    return msgspec.json.decode(lines[-1], type=EngineFacts) if lines else None
