"""A process of its own that reads large bodies, one after the other, so that nobody waits for them who did not send
them.

Both ends of one socket: a question is a `BodyReader` and a body, an answer a `Reading` or a `Problem`, with the body as
the engine is sent it. Each is two lengths and the bytes. The end of the socket ends the child, so it cannot outlive the
router, however that dies.
"""

import contextlib
import gc
import os
import resource
import signal
import socket
import struct
import subprocess
import sys

import msgspec

from rota.base.errors import RotaError
from rota.serving.frontdoor.problems import Problem
from rota.serving.frontdoor.reading import BodyReader, Reading

_LENGTHS = struct.Struct(">QQ")
_FACTS_BYTES_MAX = 64 * 1024
_GROWTH_BYTES_MAX = 64 * 1024
"""By how much a body may grow: it is given the tenant and a salt."""
_MEMORY_BYTES = 256 * 1024 * 1024
_MEMORY_PER_BODY_BYTE = 96
"""The worst that was found, strings of one character by the million, took 45."""
_NICENESS = 5
"""Where the two share a core the router goes first."""


class ReadingLostError(RotaError):
    """The child died, or said what is no answer; the message says how."""


class _Refusal(msgspec.Struct, frozen=True, tag=True):
    """A `Problem` on its way."""

    status: int
    message: str
    param: str | None
    code: str | None
    retry_after_seconds: int | None


class _Read(msgspec.Struct, frozen=True, tag=True):
    reading: Reading


_encode = msgspec.msgpack.Encoder().encode
_question = msgspec.msgpack.Decoder(BodyReader).decode
_answer = msgspec.msgpack.Decoder(_Read | _Refusal).decode


class ReadingProcess:
    """The child as the router has it. Blocks: each method is for a thread, `kill` for any."""

    def __init__(self, body_bytes_max: int) -> None:
        """Start it; its memory is bounded by what bodies of so many bytes need. Raises `ReadingLostError`."""
        memory_bytes = _MEMORY_BYTES + _MEMORY_PER_BODY_BYTE * body_bytes_max
        command = [sys.executable, "-P", "-m", __name__, str(memory_bytes)]
        with contextlib.ExitStack() as opened:
            try:
                ours, theirs = map(opened.enter_context, socket.socketpair())
                # In a session of its own, so that Ctrl-C is not for it.
                self._process = subprocess.Popen(
                    command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, start_new_session=True
                )
            except OSError as error:
                raise ReadingLostError(f"it cannot be started: {error.strerror or error}") from None
            self._wire = ours.dup()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def read(self, reader: BodyReader, parts: list[bytes]) -> Reading:
        """As `BodyReader.read`, of a body in parts, which are taken out of the list as they are sent. Raises what that
        raises, and `ReadingLostError`, after which it is of no use."""
        num_bytes = sum(map(len, parts))
        try:
            _send(self._wire, _encode(reader), parts)
            facts, body = _receive(self._wire, (_FACTS_BYTES_MAX, num_bytes + _GROWTH_BYTES_MAX))
            answer = _answer(facts)
        except (OSError, EOFError) as error:
            raise ReadingLostError(f"it ended in the middle: {error}") from None
        except (ValueError, msgspec.MsgspecError) as error:
            raise ReadingLostError(f"it answered what is no answer: {error}") from None
        if isinstance(answer, _Refusal):
            raise Problem(
                answer.status,
                answer.message,
                param=answer.param,
                code=answer.code,
                retry_after_seconds=answer.retry_after_seconds,
            )
        return msgspec.structs.replace(answer.reading, body=body)

    def kill(self) -> None:
        """End it at once; who waits for an answer hears of it."""
        self._process.kill()

    def end(self) -> None:
        """Kill it and leave nothing behind."""
        self._process.kill()
        self._process.wait()
        self._wire.close()


def _send(wire: socket.socket, facts: bytes, parts: list[bytes]) -> None:
    wire.sendall(_LENGTHS.pack(len(facts), sum(map(len, parts))) + facts)
    parts.reverse()
    while parts:
        wire.sendall(parts.pop())


def _receive(wire: socket.socket, most: tuple[int, int] | None = None) -> tuple[bytes, bytes]:
    """What `_send` sent. Raises EOFError, and ValueError where a length is more than `most`."""
    lengths = _LENGTHS.unpack(_exactly(wire, _LENGTHS.size))
    if most is not None and (lengths[0] > most[0] or lengths[1] > most[1]):
        raise ValueError(f"{lengths} bytes, where {most} are the most")
    return _exactly(wire, lengths[0]), _exactly(wire, lengths[1])


def _exactly(wire: socket.socket, num_bytes: int) -> bytes:
    parts = []
    while num_bytes:
        # All at once as a rule, read by the kernel into the very bytes that are kept.
        part = wire.recv(num_bytes, socket.MSG_WAITALL)
        if not part:
            raise EOFError("the socket was closed")
        parts.append(part)
        num_bytes -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _answer_to(facts: bytes, raw: bytes) -> tuple[bytes, list[bytes]]:
    try:
        reading = _question(facts).read(raw)
    except Problem as problem:
        refusal = _Refusal(problem.status, problem.message, problem.param, problem.code, problem.retry_after_seconds)
        return _encode(refusal), []
    return _encode(_Read(msgspec.structs.replace(reading, body=b""))), [reading.body]


def _bound_memory(num_bytes: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY or most > num_bytes:  # Whoever started the router may have set less.
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, most))


def main() -> None:
    """Answer questions on standard input, a socket, until its end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Whoever stops the router's whole group stops the router first.
    _bound_memory(int(sys.argv[1]))
    os.nice(_NICENESS)
    # A body of a million lists would be gone through again and again while it is read.
    gc.freeze()
    gc.disable()
    with socket.socket(fileno=sys.stdin.fileno()) as wire:
        while True:
            try:
                _send(wire, *_answer_to(*_receive(wire)))
            except (OSError, EOFError):
                return
            except MemoryError:
                sys.exit("a body takes more memory than one may")
            gc.collect()


if __name__ == "__main__":
    main()
