"""The board as a page (`GET /ui`) and as JSON (`GET /ui/state`), for people on the router's own machine.

It names tenants and requests, so it is shown as the instances are administered: to this machine alone. A page of
another site cannot have it read out either: a browser names the host that it believes to talk to, and only this
machine's names are answered.
"""

import ipaddress
from collections.abc import Callable, Iterable
from importlib.resources import files

import msgspec

from rota.serving.board.board import Board
from rota.serving.board.picture import Picture
from rota.serving.engines.engine import Headers
from rota.serving.frontdoor.admin import refuse_strangers
from rota.serving.frontdoor.exchange import Exchange
from rota.serving.frontdoor.problems import Problem
from rota.serving.live.cluster import LiveCluster
from rota.serving.live.watch import EngineWatch

UI, STATE = "/ui", "/ui/state"

_PAGE: Headers = [
    (b"content-type", b"text/html; charset=utf-8"),
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        b"img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
]
_STATE: Headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]


class BoardPage:
    """Answers with a picture that is taken when it is asked for."""

    def __init__(self, picture: Callable[[], Picture], count: Callable[[Exchange, int], None]) -> None:
        """`count` hears the status of each answer."""
        self._picture = picture
        self._count = count
        self._html = (files("rota") / "data" / "board.html").read_bytes()

    def page(self, exchange: Exchange) -> None:
        """The page, which asks for the state every second. Raises `Problem` for strangers."""
        _refuse_other_hosts(exchange)
        self._count(exchange, 200)
        exchange.respond(200, _PAGE, self._html)

    def state(self, exchange: Exchange) -> None:
        """A `Picture`. Raises `Problem` for strangers."""
        _refuse_other_hosts(exchange)
        self._count(exchange, 200)
        exchange.respond(200, _STATE, msgspec.json.encode(self._picture()))


class RouterBoard:
    """The board of a running router: its rows, and the steps of engines that tell of them."""

    def __init__(self, cluster: LiveCluster, watches: Iterable[EngineWatch]) -> None:
        self._cluster = cluster
        self._watches = watches
        self._board = Board()
        cluster.loop.add_observer(self._board)

    def picture(self) -> Picture:
        """Everything, now."""
        for watch in self._watches:
            if (steps := watch.steps) is not None:
                self._board.steps_were(
                    watch.engine.id, steps.num_steps, steps.step_time, steps.num_prefill_tokens, steps.num_decode_tokens
                )
        return self._board.picture(self._cluster.loop.now())


def _refuse_other_hosts(exchange: Exchange) -> None:
    refuse_strangers(exchange)
    host = (exchange.request.header(b"host") or b"").decode("latin-1")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    if name.lower() == "localhost":
        return
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        raise Problem(403, f"the board is not shown under the name {name!r}", param="host", code="not_local") from None
