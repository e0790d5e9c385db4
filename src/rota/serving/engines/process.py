"""Engine processes: started, watched, started again after a crash, and gone when the router is gone.

Each runs in a process group of its own, so that what it starts is stopped with it. A small guard process holds one end
of a pipe whose other end only the router has: when the router dies, however it does, the pipe closes and the guard
kills the group.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from rota.base.errors import EngineError

_TAIL_BYTES = 2000
_TAIL_LINES = 12

_GUARD = """
import os, signal, sys
if os.fork():
    os._exit(0)
pipe, group = int(sys.argv[1]), int(sys.argv[2])
for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(each, signal.SIG_IGN)
if os.read(pipe, 1) == b"":
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""
"""A byte on the pipe means that the group was ended in order; its closing without one means that the router died. It is
nobody's child: whoever ends a process with all of its children, as Ray does, must not end the guard before its work."""


class ProcessSpec(msgspec.Struct, frozen=True):
    """How to run one engine process."""

    name: str
    command: tuple[str, ...]
    log_path: str
    """Its output goes there, both streams, appended to."""
    env: dict[str, str] = {}
    """Added to the router's own environment."""
    stop_timeout_seconds: float = 15.0
    """From SIGTERM to SIGKILL."""


class RestartRule(msgspec.Struct, frozen=True):
    """How a crashed process is started again."""

    first_delay_seconds: float = 1.0
    factor: float = 2.0
    delay_max_seconds: float = 60.0
    num_restarts_max: int = 10
    """In a row; a run of `steady_seconds` starts the count anew."""
    steady_seconds: float = 120.0
    num_starts_max: int = 2
    """Attempts to get ready for the first time: what never worked is more likely a mistake than an accident."""


class EngineProcess:
    """One supervised process. `exited(reason)` is called each time that it ends without having been asked to."""

    def __init__(
        self,
        spec: ProcessSpec,
        *,
        restart: RestartRule | None = None,
        exited: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.spec = spec
        self.exited = exited
        self.num_restarts = 0
        self.has_served = False
        """It was ready once. Set by who probes it."""
        self.given_up: str | None = None
        """Why it will not be started again, once that is so."""
        self._restart = restart or RestartRule()
        self._process: subprocess.Popen[bytes] | None = None
        self._guard_pipe = -1
        self._log_offset = 0
        self._keeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id, while it runs."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    async def start(self) -> None:
        """Start it and keep it running. Raises `EngineError` if it cannot be started at all."""
        self._spawn()
        self._keeper = asyncio.create_task(self._keep(), name=f"keep {self.spec.name}")

    async def stop(self) -> None:
        """Stop it and everything it started: SIGTERM to the group, SIGKILL to what is left after the timeout."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None
        process, self._process = self._process, None
        if process is None:
            return
        _signal_group(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + self.spec.stop_timeout_seconds
        while process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        _signal_group(process.pid, signal.SIGKILL)
        await asyncio.to_thread(process.wait)
        self._dismiss_guard()

    def kill(self) -> None:
        """Kill the group at once. For the second Ctrl-C."""
        if self._process is not None:
            _signal_group(self._process.pid, signal.SIGKILL)

    def log_tail(self) -> str:
        """The last lines it wrote since it was started last."""
        try:
            with Path(self.spec.log_path).open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_offset, size - _TAIL_BYTES))
                text = log.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-_TAIL_LINES:])

    def failure(self, what: str) -> EngineError:
        """An error that quotes the end of the log."""
        tail = self.log_tail()
        quoted = "; the last it wrote:\n" + "\n".join(f"  | {line}" for line in tail.splitlines()) if tail else ""
        return EngineError(f"{self.spec.name} {what}{quoted}", hint=f"its whole output is in {self.spec.log_path}")

    def _spawn(self) -> None:
        spec = self.spec
        try:
            Path(spec.log_path).parent.mkdir(parents=True, exist_ok=True)
            with Path(spec.log_path).open("ab") as log:
                self._log_offset = log.tell()
                self._process = subprocess.Popen(
                    spec.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **spec.env},
                    start_new_session=True,
                )
        except OSError as error:
            raise EngineError(
                f"{spec.name} cannot be started: {spec.command[0]}: {error.strerror}",
                hint="check the command, and that the log can be written",
            ) from None
        self._post_guard(self._process.pid)

    def _post_guard(self, group: int) -> None:
        reading, self._guard_pipe = os.pipe()
        try:
            guard = subprocess.Popen(
                [sys.executable, "-S", "-E", "-c", _GUARD, str(reading), str(group)],
                pass_fds=(reading,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            # It leaves as soon as its child is there; to wait for that here would hold everything else up.
            threading.Thread(target=guard.wait, daemon=True).start()
        finally:
            os.close(reading)

    def _dismiss_guard(self) -> None:
        pipe, self._guard_pipe = self._guard_pipe, -1
        if pipe >= 0:
            with contextlib.suppress(BrokenPipeError):
                os.write(pipe, b"x")
            os.close(pipe)

    async def _keep(self) -> None:
        rule = self._restart
        num_in_a_row = 0
        while True:
            process, started_at = self._process, time.monotonic()
            assert process is not None
            while process.poll() is None:
                await asyncio.sleep(0.1)
            _signal_group(process.pid, signal.SIGKILL)  # what it started may have outlived it
            self._dismiss_guard()
            reason = _how_it_ended(process.returncode)
            if time.monotonic() - started_at >= rule.steady_seconds:
                num_in_a_row = 0
            self.exited(reason)
            if num_in_a_row >= (rule.num_restarts_max if self.has_served else rule.num_starts_max - 1):
                self.given_up = self.failure(f"{reason}, {num_in_a_row + 1} times in a row").message
                self.exited(self.given_up)
                return
            await asyncio.sleep(min(rule.first_delay_seconds * rule.factor**num_in_a_row, rule.delay_max_seconds))
            num_in_a_row += 1
            self.num_restarts += 1
            try:
                self._spawn()
            except EngineError as error:
                self.given_up = error.message
                self.exited(error.message)
                return


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _how_it_ended(returncode: int) -> str:
    if returncode >= 0:
        return f"exited with status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"was ended by {name}"
