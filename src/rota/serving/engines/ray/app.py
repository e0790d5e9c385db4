"""The Ray Serve application of a RayService: one replica that keeps `rota serve --on ray` running on the head.

KubeRay's RayService is built around a Serve application: it waits until the application is healthy before it sends
clients to a new cluster, and replaces what is not. So the router is given as one. Requests do not pass through Serve,
which would parse and copy each token once more: clients reach the router's own port, at the head's service.
"""

import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rota.base.errors import EngineError
from rota.serving.engines.http_client import HttpClient
from rota.serving.engines.process import EngineProcess, ProcessSpec, RestartRule

PORT = 8100
"""None of those that KubeRay has a head listen on: 8000 is Serve's, 8080 that of Ray's metrics."""
START_SECONDS = 1800.0
HEAD = {"node:__internal_head__": 0.001}
"""Ray's own name for the head node."""


class RouterReplica:
    """A router process, which dies with its replica; its engines wait for the next one. It is well while the router
    answers; Serve replaces it when it is not."""

    async def __init__(self, flags: Sequence[str], port: int = PORT) -> None:  # type: ignore[misc]
        """Returns when the first engine is ready. Raises `EngineError` if that does not come."""
        command = (sys.executable, "-m", "rota.cli.main", "serve", *flags, "--port", str(port))
        log_path = Path(tempfile.gettempdir()) / "rota-router.log"
        restart = RestartRule(num_restarts_max=0, num_starts_max=1)
        self._process = EngineProcess(ProcessSpec("the router", command, str(log_path)), restart=restart)
        self._client = HttpClient(f"http://127.0.0.1:{port}")
        await self._process.start()
        async with asyncio.timeout(START_SECONDS):
            while not await self._is_ready():
                self._raise_if_ended()
                await asyncio.sleep(0.5)

    async def check_health(self) -> None:
        """Asked by Serve. Raises `EngineError` if the router ended or does not answer. One that has no engine for now
        is well: it waits for Ray."""
        self._raise_if_ended()
        await self._client.fetch("GET", "/metrics", timeout_seconds=5.0)

    async def __call__(self, request: object = None) -> str:
        """What Serve's own port answers."""
        return f"The router listens on port {PORT} of the head's service."

    def _raise_if_ended(self) -> None:
        if self._process.given_up is not None:
            raise EngineError(self._process.given_up)

    async def _is_ready(self) -> bool:
        try:
            await self._client.fetch("GET", "/health", timeout_seconds=5.0)
        except EngineError:
            return False
        return True


def router(args: dict[str, Any]) -> Any:
    """The application; `args` has `flags`, those of `rota serve`."""
    from ray import serve

    as_deployment = serve.deployment(
        name="router",
        num_replicas=1,
        health_check_period_s=2.0,
        ray_actor_options={"num_cpus": 0, "resources": HEAD},
    )
    return as_deployment(RouterReplica).bind(list(args["flags"]))
