"""The Ray actor around one engine process: it starts the process on the node where Ray put it, and says where that is.

The process is not started again here. When it ends, the actor ends too, and Ray starts the actor anew, on this node or
on another that has the resources. An engine that never worked on its first start stays as it is and says why: that is
more likely a mistake than an accident.
"""

import asyncio
import os
import time

import msgspec
import ray
from ray.autoscaler.sdk import request_resources

from rota import __version__
from rota.base.errors import RotaError
from rota.serving.engines.managed import free_port
from rota.serving.engines.process import EngineProcess, RestartRule
from rota.serving.engines.ray.plans import EnginePlan

NEVER = RestartRule(num_restarts_max=0, num_starts_max=1)
FAREWELL_SECONDS = 1.0
"""From the end of a process that served to the end of its actor: who asks in between hears why."""
PAUSE_SECONDS = 10.0
"""The same for one that was started anew and did not get ready."""
OWNER_SECONDS = 5.0
"""A router that has not asked for so long does not count as one that uses the engine."""
LEASE_SECONDS = 300.0
"""An engine ends when no router has asked for it for so long. A new router takes it over until then."""


class Whereabouts(msgspec.Struct, frozen=True):
    """Where an engine is now."""

    url: str
    incarnation: str
    """Another one after each start."""
    node_id: str
    ended: str | None = None
    """Why its process ended, once it has."""
    given_up: bool = False
    """It will not be started again."""


class Refused(msgspec.Struct, frozen=True):
    """Why a router cannot have this engine."""

    is_used: bool
    """Another router uses it; otherwise it is a leftover that may be ended."""
    reason: str


class EngineHost:
    """One engine process on a node. Made a Ray actor by `RayCluster`; its methods run on one event loop."""

    def __init__(self, plan: EnginePlan, *, lease_seconds: float = LEASE_SECONDS) -> None:
        context = ray.get_runtime_context()
        self._plan = plan
        self._lease_seconds = lease_seconds
        self._was_restarted = bool(context.was_current_actor_reconstructed)
        self._owner = ""
        self._asked_at = time.monotonic()
        self._process: EngineProcess | None = None
        self._where = Whereabouts("", f"{os.getpid()}-{time.time_ns()}", context.get_node_id())
        self._running = asyncio.get_running_loop().create_task(self._run())

    async def where(self, owner: str, version: str, plan: EnginePlan, has_served: bool) -> Whereabouts | Refused:
        """Where the engine is, for the router `owner`, which wants it to be as `plan` says; `has_served` is whether the
        router found it ready since it was started."""
        now = time.monotonic()
        if owner != self._owner:
            if self._owner and now - self._asked_at < OWNER_SECONDS:
                return Refused(True, f"another router uses the engine {self._plan.instance_id} of this Ray cluster")
            if version != __version__:
                return Refused(False, f"it was started by Rota {__version__}, and this is {version}")
            if plan != self._plan:
                return Refused(False, "it was started with other settings")
        self._owner, self._asked_at = owner, now
        if self._process is not None and has_served:
            self._process.has_served = True
            if self._where.given_up:  # It died before anybody could say here that it had worked.
                self._where = msgspec.structs.replace(self._where, given_up=False)
                self._running = asyncio.get_running_loop().create_task(_leave_after(FAREWELL_SECONDS))
        return self._where

    async def stop(self) -> None:
        """End the process in order. The actor is ended by who calls this."""
        self._running.cancel()
        if self._process is not None:
            await self._process.stop()

    async def _run(self) -> None:
        host = ray.util.get_node_ip_address()
        try:
            port = free_port(host)
            spec = await asyncio.to_thread(self._plan.process, host, port)
            self._process = EngineProcess(spec, restart=NEVER)
            await self._process.start()
        except RotaError as error:
            await self._ended(error.message)
            return
        self._where = msgspec.structs.replace(self._where, url=f"http://{host}:{port}")
        while self._process.given_up is None:
            await asyncio.sleep(0.1)
            if time.monotonic() - self._asked_at > self._lease_seconds:
                await self._process.stop()
                # The router that asked for room is gone. If there is another one, its engines hold their nodes anyway.
                await asyncio.to_thread(request_resources, bundles=[])
                await asyncio.to_thread(ray.kill, ray.get_runtime_context().current_actor)
        await self._ended(self._process.given_up)

    async def _ended(self, reason: str) -> None:
        has_served = self._process is not None and self._process.has_served
        given_up = not has_served and not self._was_restarted
        self._where = msgspec.structs.replace(self._where, ended=reason, given_up=given_up)
        if given_up:
            return
        await _leave_after(FAREWELL_SECONDS if has_served else PAUSE_SECONDS)


async def _leave_after(seconds: float) -> None:
    await asyncio.sleep(seconds)
    os._exit(1)  # An actor that ends by itself in good order is not started again.
