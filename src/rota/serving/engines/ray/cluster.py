"""A Ray cluster, as far as a router needs it: it is joined, asked what its nodes have, and given actors to place."""

import os
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from rota.base.errors import ConfigError, EngineError
from rota.serving.engines.ray.plans import EnginePlan

NAMESPACE = "rota"
_CONNECT_SECONDS = 5.0


def join(address: str | None, flag: str) -> tuple[Any, bool]:
    """The module `ray`, joined to a cluster, and whether it was joined here: to the one at `address`, else to the one
    that `RAY_ADDRESS` names or that runs here, else to one that is started here. Raises `ConfigError` that begins with
    `flag` where Ray is not installed or no cluster answers."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # said, so that Ray does not warn about it
    try:
        import ray
    except ImportError:
        raise ConfigError(
            f"{flag}: Ray is not installed", hint="install Rota with its extra: pip install 'rota[ray]'"
        ) from None
    if ray.is_initialized():
        return ray, False
    _refuse_unreachable(address or os.environ.get("RAY_ADDRESS"), flag)
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        if _wants_token(error):
            raise ConfigError(
                f"{flag}: the cluster wants a token", hint="set RAY_AUTH_MODE=token, and see ray get-auth-token --help"
            ) from None
        raise _no_cluster(flag, " ".join(str(error).split())[:200]) from None
    return ray, True


def _refuse_unreachable(address: str | None, flag: str) -> None:
    """Ray itself tries for minutes where nobody answers."""
    host, colon, port = (address or "").rpartition(":")
    if "://" in (address or ""):
        raise ConfigError(
            f"{flag}: {address} is an address for Ray's client, which cannot hold engines",
            hint="run this on a node of the cluster, with HOST:PORT of its head, such as 10.0.0.1:6379",
        )
    if not colon:
        return  # "auto", "local", or nothing
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise _no_cluster(flag, f"{address}: {error}") from None


def _wants_token(error: BaseException | None) -> bool:
    """Whether Ray says so somewhere behind an error. Clusters of `ray start` may, from 2.60 or so on."""
    while error is not None:
        if "InvalidAuthToken" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _no_cluster(flag: str, why: str) -> ConfigError:
    return ConfigError(
        f"{flag}: no cluster answers: {why}",
        hint="start one with ray start --head, or unset RAY_ADDRESS to have one started here",
    )


class Needs(msgspec.Struct, frozen=True):
    """What one engine takes of its node, by Ray's accounts."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    resources: dict[str, float] = {}

    def bundle(self) -> dict[str, float]:
        """As Ray writes resources; what is 0 is left out."""
        return {name: amount for name, amount in {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}.items()
                if amount}  # fmt: skip

    def __str__(self) -> str:
        return ", ".join(f"{name} {amount:g}" for name, amount in self.bundle().items()) or "nothing"


class RayCluster:
    """One cluster, joined. Engines are named actors in the namespace `rota`; they outlive the router that placed them,
    for a while, so that the next one finds them."""

    def __init__(self, address: str | None, needs: Needs, *, await_nodes: bool = False, flag: str = "--on ray") -> None:
        """Raises `ConfigError` if no cluster answers, or if none of its nodes could hold an engine, unless
        `await_nodes` says that such may come."""
        self._ray, self._is_ours = join(address, flag)
        self.needs = needs
        self.awaits_nodes = await_nodes
        self._wanted: set[str] = set()
        self._asking = threading.Lock()
        try:
            if not await_nodes:
                nodes = [node.get("Resources", {}) for node in self._ray.nodes() if node["Alive"]]
                refuse_what_no_node_has(needs, nodes)
        except ConfigError:
            self.close()
            raise

    def place(self, plan: EnginePlan, **options: float) -> Any:
        """Have Ray place an engine, or find the one that has its name. Returns the actor's handle at once."""
        from rota.serving.engines.ray.host import EngineHost

        actor = self._ray.remote(EngineHost).options(
            name=plan.instance_id,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            # Engines side by side on one node would be lost together.
            scheduling_strategy="SPREAD",
            num_cpus=self.needs.num_cpus,
            num_gpus=self.needs.num_gpus,
            resources=self.needs.resources or None,
        )
        return actor.remote(plan, **options)

    def end(self, actor: Any, *, restart: bool = False) -> None:
        """End an actor at once; with `restart` Ray starts it anew."""
        self._ray.kill(actor, no_restart=not restart)

    def keep_room(self, instance_id: str, wanted: bool) -> None:
        """Ask Ray's autoscaler, where there is one, for nodes that this engine fits on beside the others; it keeps them
        until that is taken back. May take a while, and be called by several threads. Raises `EngineError` if Ray does
        not take the request; the next one makes up for it."""
        from ray.autoscaler.sdk import request_resources

        with self._asking:
            (self._wanted.add if wanted else self._wanted.discard)(instance_id)
            try:
                request_resources(bundles=[self.needs.bundle()] * len(self._wanted))
            except Exception as error:  # whatever Ray has to say
                raise EngineError(f"{instance_id}: Ray takes no request for room: {error}") from None

    def num_rooms(self) -> int:
        """How many more engines the nodes that are there have room for, as Ray counts now. May take a while, and raises
        what Ray raises where it does not answer."""
        from ray._private.state import available_resources_per_node

        return sum(num_that_fit(self.needs, free) for free in available_resources_per_node().values())

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self._is_ours:
            self._ray.shutdown()


def num_that_fit(needs: Needs, free: Mapping[str, float]) -> int:
    """How many engines fit in what a node has left; one that needs nothing fits once."""
    # Ray counts in ten-thousandths; a sum of such parts may be a hair short of what it stands for.
    return min((int(free.get(name, 0.0) / amount + 1e-6) for name, amount in needs.bundle().items()), default=1)


def refuse_what_no_node_has(needs: Needs, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise `ConfigError` that names what is missing, unless some node has, in all, what one engine needs."""
    bundle = needs.bundle()
    if any(all(node.get(name, 0.0) >= amount for name, amount in bundle.items()) for node in nodes):
        return
    lacking = [
        f"{name} {amount:g} (the most of one node is {max((node.get(name, 0.0) for node in nodes), default=0.0):g})"
        for name, amount in bundle.items()
        if all(node.get(name, 0.0) < amount for node in nodes)
    ]
    wanted = ", ".join(lacking) or "all at once of " + ", ".join(f"{name} {bundle[name]:g}" for name in bundle)
    raise ConfigError(
        f"no node of the Ray cluster can hold an engine: none has {wanted}",
        hint="ask for less with --cpus-per-instance, --gpus-per-instance or --resource, or add such a node; "
        "--await-nodes waits for nodes that an autoscaler will start",
    )
