"""An engine that Ray placed, as the router has it: found through Ray, spoken to over HTTP."""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from ray.exceptions import ActorDiedError

from rota import __version__
from rota.base.errors import EngineError
from rota.serving.engines.engine import EngineStatus
from rota.serving.engines.openai import OpenAIEngine
from rota.serving.engines.ray.cluster import RayCluster
from rota.serving.engines.ray.host import OWNER_SECONDS, Refused, Whereabouts
from rota.serving.engines.ray.plans import EnginePlan
from rota.serving.model.instance import InstanceId

LOOK_SECONDS = 0.5
STOP_SECONDS = 20.0
NUM_PLACED_MAX = 3
"""Actors in a row that Ray could not start at all, before the engine is given up."""
OWNER = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
"""This process, as one of the routers that an engine may meet."""


class RayEngine(OpenAIEngine):
    """One engine on a Ray cluster. Where Ray started it anew, it is lost and becomes ready again at another URL."""

    def __init__(self, plan: EnginePlan, cluster: RayCluster, *, probe_timeout_seconds: float = 5.0) -> None:
        super().__init__(
            InstanceId(plan.instance_id), "http://nowhere.invalid", probe_timeout_seconds=probe_timeout_seconds
        )
        self._plan = plan
        self._cluster = cluster
        self._exited: Callable[[str], None] = lambda reason: None
        self._actor: Any = None
        self._asking: asyncio.Future[Whereabouts | Refused] | None = None
        self._following: asyncio.Task[None] | None = None
        self._where: Whereabouts | None = None
        self._why_not = "Ray has not placed it yet"
        self._has_served = False
        self._num_placed = 0
        self._refused_since: float | None = None
        self._given_up: str | None = None

    @property
    def given_up(self) -> str | None:
        return self._given_up

    @property
    def node_id(self) -> str | None:
        """The Ray node where it is, as far as that is known."""
        return None if self._where is None else self._where.node_id

    def on_exit(self, heard: Callable[[str], None]) -> None:
        self._exited = heard

    async def start(self) -> None:
        """Have Ray place it, and follow where it goes. Raises `EngineError` if Ray does not answer."""
        await asyncio.to_thread(self._cluster.keep_room, self.id, True)
        self._following = asyncio.create_task(self._follow(), name=f"follow {self.id}")

    async def stop(self) -> None:
        """End its process in order, then its actor."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        self._ask_no_more()
        await super().stop()
        if self._has_actor:
            await self._end_in_order()
        # Its node is free by now, and may go.
        with contextlib.suppress(EngineError):
            await asyncio.to_thread(self._cluster.keep_room, self.id, False)

    async def _end_in_order(self) -> None:
        # Whatever Ray says to it, what comes next ends the actor. One that has no node yet would not answer.
        if self._where is not None:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(STOP_SECONDS):
                    await self._actor.stop.remote()
        await asyncio.to_thread(self._end)

    def kill(self) -> None:
        """End it at once; Ray starts it anew."""
        if self._has_actor:
            self._end(restart=True)

    @property
    def _has_actor(self) -> bool:
        """Whether there is one, and it is not another router's."""
        return self._actor is not None and self._refused_since is None

    async def probe(self) -> EngineStatus:
        """As for any server; before Ray has placed it, or when its process ended, that is the reason."""
        where = self._where
        if self._given_up is not None:
            raise EngineError(self._given_up)
        if where is None or not where.url or where.ended is not None:
            raise EngineError(f"{self.id}: {where.ended if where and where.ended else self._why_not}")
        status = await super().probe()
        if self._where is None or self._where.incarnation != where.incarnation:
            raise EngineError(f"{self.id}: it was started anew meanwhile")
        self._has_served = True
        return status

    # --- following the actor -----------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while self._given_up is None:
            try:
                found = await self._ask()
            except Exception as error:  # whatever Ray has to say
                await self._out_of_sight(_in_a_line(error))
                if isinstance(error, ActorDiedError):
                    self._forget(_in_a_line(error))
            else:
                self._found(found)
            await asyncio.sleep(LOOK_SECONDS)

    async def _ask(self) -> Whereabouts | Refused | None:
        """Ask the actor where it is. None while it does not answer, for want of a node say; the question stands."""
        if self._actor is None:
            self._num_placed += 1
            self._actor = await asyncio.to_thread(self._cluster.place, self._plan)
        if self._asking is None:
            reference = self._actor.where.remote(OWNER, __version__, self._plan, self._has_served)
            self._asking = asyncio.wrap_future(reference.future())
        await asyncio.wait((self._asking,), timeout=LOOK_SECONDS)
        if not self._asking.done():
            return None
        answer, self._asking = self._asking, None
        return answer.result()

    def _found(self, found: Whereabouts | Refused | None) -> None:
        if found is None:
            self._why_not = f"no node of the Ray cluster has room for it yet ({self._cluster.needs})"
            return
        if isinstance(found, Refused):
            if found.is_used:
                # It may be the last router, which was killed a moment ago.
                self._why_not = f"{found.reason}; stop that one first"
                now = asyncio.get_running_loop().time()
                self._refused_since = self._refused_since or now
                if now - self._refused_since > 2 * OWNER_SECONDS:
                    self._give_up(self._why_not)
            else:
                self._end()  # The next look places another.
                self._forget(found.reason)
            return
        self._num_placed, self._refused_since = 0, None
        before, self._where = self._where, found
        if before is not None and before.incarnation != found.incarnation:
            self._has_served = False
            self._exited(f"Ray started it anew on node {found.node_id[:8]}")
        if found.url and (before is None or before.url != found.url):
            self.moved_to(found.url)
        if found.given_up and not self._has_served:  # Otherwise its host hears so with the next look.
            self._give_up(f"{self.id}: {found.ended}")
        elif found.ended is not None and (before is None or before.ended is None):
            self._exited(found.ended)

    async def _out_of_sight(self, why: str) -> None:
        """Ray does not reach the actor: it is lost if its engine does not answer either."""
        self._why_not = why
        if self._where is None or self._where.ended is not None:
            return
        try:
            await super().probe()
        except EngineError:
            self._exited(why)

    def _forget(self, why: str) -> None:
        """The actor is no more: another one takes its place, unless none ever starts."""
        self._ask_no_more()
        self._actor = self._where = None
        self._has_served = False
        self._why_not = why
        if self._num_placed >= NUM_PLACED_MAX:
            self._give_up(f"{self.id}: Ray cannot start it: {why}")

    def _ask_no_more(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None

    def _give_up(self, why: str) -> None:
        self._given_up = why
        self._exited(why)

    def _end(self, *, restart: bool = False) -> None:
        with contextlib.suppress(Exception):  # It is gone already, or its cluster is.
            self._cluster.end(self._actor, restart=restart)


def _in_a_line(error: Exception) -> str:
    """Ray's errors have many; the last of them says most."""
    return " ".join(str(error).split())[-300:]
