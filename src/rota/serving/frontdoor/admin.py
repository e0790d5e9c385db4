"""By command: instances taken out of service and back (`POST /admin/instances/{id}/drain` and `/undrain`), and running
requests moved (`POST /admin/requests/{id}/migrate`).

Whoever may do so can make the router refuse everybody, so it takes requests from this machine only, and none that a
proxy passed on or a browser's page sent (which has no way to leave `Origin` out).
"""

from collections.abc import Callable
from urllib.parse import unquote

from rota.base.instant import to_seconds
from rota.base.nearest import did_you_mean
from rota.serving.frontdoor.bodies import read_move
from rota.serving.frontdoor.exchange import Exchange
from rota.serving.frontdoor.problems import Problem
from rota.serving.live.cluster import LiveCluster
from rota.serving.live.moves import Outcome
from rota.serving.model.commands import Way
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import RequestId

INSTANCES = "/admin/instances"
DRAIN, UNDRAIN = f"{INSTANCES}/{{instance_id}}/drain", f"{INSTANCES}/{{instance_id}}/undrain"
REQUESTS = "/admin/requests"
MIGRATE = f"{REQUESTS}/{{request_id}}/migrate"
PATHS = (DRAIN, UNDRAIN, MIGRATE)
"""The paths below the two, as the description has them."""

_PASSED_ON = (b"forwarded", b"x-forwarded-for", b"via", b"origin")


class InstanceAdmin:
    """Answers what is below `/admin/instances`."""

    def __init__(self, cluster: LiveCluster, send: Callable[[Exchange, int, object], None]) -> None:
        self._cluster = cluster
        self._send = send

    def answer(self, exchange: Exchange) -> None:
        """List the instances, or drain or take back the one that the path names. Raises `Problem`."""
        refuse_strangers(exchange)
        path = exchange.request.path.removeprefix(INSTANCES)
        if not path:
            instances = [self._state(instance_id) for instance_id in self._cluster.engines]
            self._send(exchange, 200, {"object": "list", "data": instances})
            return
        name, _, verb = path[1:].rpartition("/")
        change = {"drain": self._cluster.drain, "undrain": self._cluster.undrain}.get(verb)
        if change is None:
            raise Problem(404, f"there is no {exchange.request.path} here", code="not_found")
        instance_id = known_instance(self._cluster, unquote(name), "instance_id")
        change(instance_id)
        self._send(exchange, 200, self._state(instance_id))

    def _state(self, instance_id: InstanceId) -> dict[str, object]:
        num_requests = self._cluster.num_in_flight()[instance_id]
        if instance_id in self._cluster.drained:
            state = "draining" if num_requests else "drained"
        else:
            state = "ready" if instance_id in self._cluster.statuses else "unavailable"
        told = {"id": instance_id, "object": "instance", "state": state, "num_requests": num_requests}
        role = self._cluster.roles.get(instance_id)
        return told if role is None else {**told, "role": role}


class RequestAdmin:
    """Answers what is below `/admin/requests`."""

    def __init__(self, cluster: LiveCluster, send: Callable[[Exchange, int, object], None]) -> None:
        self._cluster = cluster
        self._send = send

    def answer(self, exchange: Exchange) -> None:
        """Have the request that the path names moved, and answer when it is known what came of it. Raises `Problem`."""
        refuse_strangers(exchange)
        path = exchange.request.path
        name, _, verb = path.removeprefix(REQUESTS + "/").rpartition("/")
        if verb != "migrate":
            raise Problem(404, f"there is no {path} here", code="not_found")
        body = read_move(exchange.request.body)
        request_id = RequestId(unquote(name))
        flight = self._cluster.flights.get(request_id)
        if flight is None:
            raise Problem(404, f"no request {request_id!r} is under way", param="request_id", code="unknown_request")
        destination = known_instance(self._cluster, body.destination, "destination")
        if flight.resumption is None:
            raise _stays("it is not streamed, holds what does not travel, or has not begun")

        def heard(outcome: Outcome | str) -> None:
            if isinstance(outcome, str):
                problem = _stays(outcome)
                self._send(exchange, problem.status, problem.value())
            else:
                self._send(exchange, 200, _told(outcome))

        self._cluster.ask_to_move(request_id, destination, None if body.way is None else Way(body.way), heard)


def _stays(reason: str) -> Problem:
    return Problem(409, f"the request stays where it is: {reason}", code="request_stays")


def _told(outcome: Outcome) -> dict[str, object]:
    move = outcome.move
    return {
        "id": move.migration_id,
        "object": "migration",
        "request_id": move.request_id,
        "source": move.source,
        "destination": move.destination,
        "way": move.way,
        "outcome": "committed" if outcome.is_committed else "aborted",
        "reason": outcome.reason or move.reason,
        "downtime_seconds": to_seconds(outcome.downtime),
        "num_bytes": outcome.num_bytes,
    }


def known_instance(cluster: LiveCluster, name: str, param: str) -> InstanceId:
    """The instance of that name. Raises `Problem` (404) if there is none."""
    instance_id = InstanceId(name)
    if instance_id not in cluster.engines:
        hint = did_you_mean(instance_id, cluster.engines)
        raise Problem(404, f"there is no instance {instance_id!r}; {hint}", param=param, code="unknown_instance")
    return instance_id


def is_straight_from_here(exchange: Exchange) -> bool:
    """Whether a request came from this machine, with nothing in between that says so."""
    return exchange.is_from_here and not any(exchange.request.header(name) is not None for name in _PASSED_ON)


def refuse_strangers(exchange: Exchange) -> None:
    """Raises `Problem` (403) unless the request came straight from this machine, and from no page."""
    if not exchange.is_from_here:
        raise Problem(403, "this is for the router's own machine only", code="not_local")
    for name in _PASSED_ON:
        if exchange.request.header(name) is not None:
            raise Problem(
                403,
                "this is to be asked for directly, not through a proxy or by another page in a browser",
                param=name.decode(),
                code="not_local",
            )
