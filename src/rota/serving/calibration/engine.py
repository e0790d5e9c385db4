"""One vLLM with our plug-in, started to be measured and stopped afterwards."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from rota.base.errors import EngineError
from rota.serving.engines.managed import ManagedEngine
from rota.serving.engines.process import ProcessSpec, RestartRule
from rota.serving.engines.vllm.hosting import VLLM_CAPABILITIES
from rota.serving.engines.vllm.server import VllmServer
from rota.serving.model.instance import InstanceId


@asynccontextmanager
async def running(server: VllmServer, log: Path, stop: asyncio.Event, *, timeout: float) -> AsyncIterator[str]:
    """Start a server, wait until it answers, yield its URL, and stop it whatever happens.

    Raises `EngineError` if it does not start, or is not ready within `timeout` seconds; returns early, with a URL that
    does not answer, if `stop` is set meanwhile.
    """
    engine = ManagedEngine(
        InstanceId("vllm"),
        server.url,
        ProcessSpec("vllm", tuple(server.command()), str(log), dict(server.environment())),
        capabilities=VLLM_CAPABILITIES,
        restart=RestartRule(num_restarts_max=0, num_starts_max=1),
    )
    await engine.start()
    try:
        deadline = time.monotonic() + timeout
        while not stop.is_set():
            try:
                await engine.probe()
                break
            except EngineError:
                if engine.process.pid is None or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.5)
        yield server.url
    finally:
        await engine.stop()
