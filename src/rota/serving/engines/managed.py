"""An OpenAI server that we run ourselves: a supervised process, and the client that speaks to it."""

import socket
from collections.abc import Callable

from rota.base.errors import EngineError
from rota.serving.engines.engine import EngineStatus
from rota.serving.engines.openai import OpenAIEngine
from rota.serving.engines.process import EngineProcess, ProcessSpec, RestartRule
from rota.serving.model.capabilities import NOTHING, EngineCapabilities
from rota.serving.model.instance import InstanceId


class ManagedEngine(OpenAIEngine):
    """One engine process with its server. `start` starts the process, `stop` ends it and everything it started."""

    def __init__(
        self,
        instance_id: InstanceId,
        url: str,
        process: ProcessSpec,
        *,
        capabilities: EngineCapabilities = NOTHING,
        restart: RestartRule | None = None,
        probe_timeout_seconds: float = 5.0,
    ) -> None:
        super().__init__(instance_id, url, capabilities=capabilities, probe_timeout_seconds=probe_timeout_seconds)
        self.process = EngineProcess(process, restart=restart)

    @property
    def given_up(self) -> str | None:
        """Why the process will not be started again, once that is so."""
        return self.process.given_up

    def kill(self) -> None:
        """Kill the process and everything it started, at once."""
        self.process.kill()

    def on_exit(self, heard: Callable[[str], None]) -> None:
        """Have `heard(reason)` called whenever the process ends unasked."""
        self.process.exited = heard

    async def start(self) -> None:
        """Start the process. Raises `EngineError` if its port is taken, or the command cannot be run."""
        if not _is_free(self.client.host, self.client.port):
            raise EngineError(
                f"{self.id}: port {self.client.port} of {self.client.host} is taken",
                hint="another engine may still be running there; choose another port",
            )
        await self.process.start()

    async def stop(self) -> None:
        await super().stop()
        await self.process.stop()

    async def probe(self) -> EngineStatus:
        """As for any server; but if the process is not there, that is the reason, with what it wrote last."""
        if self.process.given_up is not None:
            raise EngineError(self.process.given_up)
        if self.process.pid is None:
            raise self.process.failure("is not running")
        status = await super().probe()
        self.process.has_served = True
        return status


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError:
            return False
    return True
