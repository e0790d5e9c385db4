"""The way into a running engine: a Unix socket in the engine's own process, asked from outside, answered by its steps.

One line a connection: a `Command` as JSON, then a `Reply` as JSON. Who closes the connection before the reply has come
takes the command back. A socket in the file system, and no HTTP route, since a route ends in vLLM's API server, from
where an unmodified vLLM has no way on to its scheduler; and since only this machine's user may reach it.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from rota.base.errors import ConfigError, EngineError
from rota.serving.engines.vllm.tickets import Reply, Stays

PATH_BYTES_MAX = 107
"""What Linux takes as the path of a Unix socket."""
LINE_BYTES_MAX = 64 * 1024 * 1024
_LOOK_SECONDS = 0.02


class Command(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What may be asked."""

    hand_off: str
    """Id of the request that shall end with its next token, and leave its ticket."""


class Asked:
    """A command that waits for its reply."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.is_withdrawn = False
        """Nobody waits for the reply any more."""
        self._reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

    def answer(self, reply: Reply) -> None:
        """From the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the engine shuts down, and nobody waits
            self._reply.get_loop().call_soon_threadsafe(self.settle, reply)

    def settle(self, reply: Reply) -> None:
        """From the channel's thread."""
        if not self._reply.done():
            self._reply.set_result(reply)

    @property
    def reply(self) -> "asyncio.Future[Reply]":
        return self._reply


class ControlChannel:
    """Listens in a thread of its own and holds what was asked until the engine's next step takes it."""

    def __init__(self, path: str | Path, is_idle: Callable[[], bool]) -> None:
        """`is_idle` says that no step will come, so that nobody would take a command. Raises `ConfigError` for a path
        that cannot be listened at; a socket that an engine before this one left there is replaced."""
        self.path = Path(path)
        check_path(self.path)
        self._is_idle = is_idle
        self._asked: deque[Asked] = deque()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rota control", daemon=True)
        self._thread.start()
        try:
            self.path.unlink(missing_ok=True)
            starting = asyncio.start_unix_server(self._serve, self.path, limit=LINE_BYTES_MAX)
            self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result()
            self.path.chmod(0o600)
        except OSError as error:
            self._stop()
            raise ConfigError(f"control: {self.path} cannot be listened at: {error.strerror}") from None

    def take(self) -> list[Asked]:
        """What was asked since the last call; called once a step, so nearly free when nothing was."""
        taken: list[Asked] = []
        while self._asked:
            # The channel's thread may take one back meanwhile.
            with contextlib.suppress(IndexError):
                taken.append(self._asked.popleft())
        return taken

    def close(self) -> None:
        """Stop listening; who still waits is hung up on."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._hang_up(), self._loop).result(timeout=5)
            self._stop()
            self.path.unlink(missing_ok=True)

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        self._loop.close()

    async def _hang_up(self) -> None:
        self._server.close()
        serving = asyncio.all_tasks() - {asyncio.current_task()}
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            try:
                command = msgspec.json.decode(await reader.readline(), type=Command)
            except (msgspec.MsgspecError, ValueError) as error:
                writer.write(_line(Reply(stays=Stays(f"not a command: {error}"))))
                return
            asked = Asked(command)
            self._asked.append(asked)
            left = asyncio.ensure_future(reader.read(1))
            await self._wait(asked, left)
            left.cancel()
            if asked.reply.done():
                writer.write(_line(asked.reply.result()))
                await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass  # the one who asked has left, or the engine shuts down
        finally:
            writer.close()

    async def _wait(self, asked: Asked, left: "asyncio.Future[bytes]") -> None:
        """Until the reply is there, or the one who asked has left."""
        while not asked.reply.done() and not left.done():
            both: set[asyncio.Future[Any]] = {asked.reply, left}
            await asyncio.wait(both, timeout=_LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            # An engine without requests makes no step; this is then the only thread that can say so.
            if not asked.reply.done() and self._is_idle() and self._take_back(asked):
                asked.settle(Reply(stays=Stays("it is not here (any more)")))
        if not asked.reply.done():
            asked.is_withdrawn = True
            self._take_back(asked)

    def _take_back(self, asked: Asked) -> bool:
        """Whether the engine has not taken it, and won't."""
        try:
            self._asked.remove(asked)
        except ValueError:
            return False
        return True


async def ask(path: Path, command: Command, *, timeout_seconds: float) -> Reply:
    """Ask an engine. Raises `EngineError` if it cannot be reached, hangs up, or does not answer in time; the command is
    then taken back."""
    try:
        async with asyncio.timeout(timeout_seconds):
            reader, writer = await asyncio.open_unix_connection(path, limit=LINE_BYTES_MAX)
            try:
                writer.write(_line(command))
                line = await reader.readline()
            finally:
                writer.close()
        return msgspec.json.decode(line, type=Reply)
    except TimeoutError:
        raise EngineError(f"{path}: no answer in {timeout_seconds:g} s", hint="the engine may hang") from None
    except OSError as error:
        raise EngineError(f"{path}: {error.strerror or error}", hint="the engine may not be running") from None
    except msgspec.MsgspecError as error:
        raise EngineError(f"{path}: hung up, or not an answer: {error}") from None


def check_path(path: Path) -> None:
    """Raises `ConfigError` for a path that is too long for a socket."""
    if len(str(path.absolute()).encode()) > PATH_BYTES_MAX:
        raise ConfigError(
            f"control: {path} has more than {PATH_BYTES_MAX} bytes, and a Unix socket takes no longer path",
            hint="take a folder with a shorter path, e.g. under /tmp",
        )


def _line(message: Command | Reply) -> bytes:
    return msgspec.json.encode(message) + b"\n"
