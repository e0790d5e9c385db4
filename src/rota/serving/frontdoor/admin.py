"""Instances taken out of service and back, by command: `POST /admin/instances/{id}/drain` and `/undrain`.

Whoever may do so can make the router refuse everybody, so it takes requests from this machine only, and none that a
proxy passed on or a browser's page sent (which has no way to leave `Origin` out).
"""

from collections.abc import Callable
from urllib.parse import unquote

from rota.base.nearest import did_you_mean
from rota.serving.frontdoor.http1 import Exchange
from rota.serving.frontdoor.problems import Problem
from rota.serving.live.cluster import LiveCluster
from rota.serving.model.instance import InstanceId

INSTANCES = "/admin/instances"
DRAIN, UNDRAIN = f"{INSTANCES}/{{instance_id}}/drain", f"{INSTANCES}/{{instance_id}}/undrain"
PATHS = (DRAIN, UNDRAIN)
"""The paths below it, as the description has them."""

_PASSED_ON = (b"forwarded", b"x-forwarded-for", b"via", b"origin")


class InstanceAdmin:
    """Answers what is below `/admin/instances`."""

    def __init__(self, cluster: LiveCluster, send: Callable[[Exchange, int, object], None]) -> None:
        self._cluster = cluster
        self._send = send

    def answer(self, exchange: Exchange) -> None:
        """List the instances, or drain or take back the one that the path names. Raises `Problem`."""
        self._refuse_strangers(exchange)
        path = exchange.request.path.removeprefix(INSTANCES)
        if not path:
            instances = [self._state(instance_id) for instance_id in self._cluster.engines]
            self._send(exchange, 200, {"object": "list", "data": instances})
            return
        name, _, verb = path[1:].rpartition("/")
        change = {"drain": self._cluster.drain, "undrain": self._cluster.undrain}.get(verb)
        if change is None:
            raise Problem(404, f"there is no {exchange.request.path} here", code="not_found")
        instance_id = InstanceId(unquote(name))
        if instance_id not in self._cluster.engines:
            hint = did_you_mean(instance_id, self._cluster.engines)
            raise Problem(
                404, f"there is no instance {instance_id!r}; {hint}", param="instance_id", code="unknown_instance"
            )
        change(instance_id)
        self._send(exchange, 200, self._state(instance_id))

    def _state(self, instance_id: InstanceId) -> dict[str, object]:
        num_requests = self._cluster.num_in_flight()[instance_id]
        if instance_id in self._cluster.drained:
            state = "draining" if num_requests else "drained"
        else:
            state = "ready" if instance_id in self._cluster.statuses else "unavailable"
        return {"id": instance_id, "object": "instance", "state": state, "num_requests": num_requests}

    def _refuse_strangers(self, exchange: Exchange) -> None:
        if not exchange.is_from_here:
            raise Problem(403, "instances are administered from the router's own machine only", code="not_local")
        for name in _PASSED_ON:
            if exchange.request.header(name) is not None:
                raise Problem(
                    403,
                    "instances are administered directly, not through a proxy or a page in a browser",
                    param=name.decode(),
                    code="not_local",
                )
