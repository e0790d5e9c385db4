"""A proxy in front of a real engine that puts nonsense into the streams that pass through it, when told to."""

import asyncio
import contextlib


class GarblingProxy:
    """Passes bytes on, to and from a port of this machine. Set `garble`, and each stream of events that is under way,
    and no later one, gets that in the place of its next bytes, and nothing after it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._garble = b""
        self._pending: set[int] = set()
        self._streams: set[int] = set()
        self._num_connections = 0
        self.num_garbled = 0
        """Streams so far that got nonsense."""
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    @property
    def garble(self) -> bytes:
        return self._garble

    @garble.setter
    def garble(self, data: bytes) -> None:
        self._garble = data
        self._pending = set(self._streams)

    @property
    def num_streams(self) -> int:
        """Streams of events under way."""
        return len(self._streams)

    async def start(self) -> str:
        """Listen; returns the URL."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        """Stop listening, and close every connection."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._num_connections += 1
        name = self._num_connections
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        up = asyncio.create_task(self._up(reader, far_writer))
        try:
            while data := await far_reader.read(65536):
                if b"text/event-stream" in data:
                    self._streams.add(name)
                    self._pending.discard(name)
                elif name in self._pending:
                    self._pending.discard(name)
                    self.num_garbled += 1
                    writer.write(b"%x\r\n%b\r\n" % (len(self._garble), self._garble))
                    await writer.drain()
                    await asyncio.sleep(3600)
                if b"data: [DONE]" in data or data.endswith(b"0\r\n\r\n"):
                    self._streams.discard(name)
                writer.write(data)
                await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            up.cancel()
            self._streams.discard(name)
            self._pending.discard(name)
            self._writers -= {writer, far_writer}
            with contextlib.suppress(OSError):
                writer.transport.abort()
                far_writer.transport.abort()

    async def _up(self, reader: asyncio.StreamReader, far_writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                far_writer.write(data)
                await far_writer.drain()
        far_writer.transport.abort()
