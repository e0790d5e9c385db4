"""Who is let in when all connections are taken: against a model, over any order of openings, requests and closings."""

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from rota.serving.frontdoor.exchange import Asker, Exchange, Headers
from rota.serving.frontdoor.http1 import HttpConnection, HttpLimits, HttpServer
from rota.serving.frontdoor.problems import Problem

NUM_MAX = 3
KNOWN = b"GET /a HTTP/1.1\r\nauthorization: known\r\n"


class Known:
    max_body_bytes = None


def check_head(path: str, headers: Headers) -> Asker | None:
    given_keys = [value for name, value in headers if name == b"authorization"]
    if path != "/a":
        return None
    if given_keys != [b"known"]:
        raise Problem(401, "unknown")
    return Known()


class Client:
    """One connection, from its other end. What is cut is reported lost when the system comes to it."""

    def __init__(self, server: HttpServer) -> None:
        self.heard = b""
        self.is_cut = self.is_lost = False
        self.knows = False
        self.connection = HttpConnection(server)
        self.connection.connection_made(self)  # type: ignore[arg-type]

    def send(self, data: bytes) -> None:
        if not self.is_cut and not self.is_lost:
            self.connection.data_received(data)

    def lose(self) -> None:
        if not self.is_lost:
            self.is_lost = True
            self.connection.connection_lost(None)

    @property
    def is_in(self) -> bool:
        return not (self.is_cut or self.is_lost or self.heard.startswith(b"HTTP/1.1 503"))

    # --- what the connection calls -----------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        self.heard += data

    def abort(self) -> None:
        self.is_cut = True

    close = abort

    def can_write_eof(self) -> bool:
        return False

    def is_reading(self) -> bool:
        return True

    def set_write_buffer_limits(self, high: int) -> None: ...
    def resume_reading(self) -> None: ...
    def pause_reading(self) -> None: ...


SENT: dict[str, bytes] = {
    "silent": b"",
    "half": b"GET /a HT",
    "known": KNOWN + b"\r\n",
    "known head": KNOWN + b"content-length: 9\r\n\r\n",
    "stranger": b"GET /a HTTP/1.1\r\n\r\n",
    "public": b"GET /health HTTP/1.1\r\n\r\n",
}
ACTS = st.one_of(
    st.tuples(st.just("open"), st.sampled_from(sorted(SENT))),
    st.tuples(st.sampled_from(("send", "lose")), st.integers(0, 30), st.sampled_from(sorted(SENT))),
)


@settings(max_examples=250, deadline=None)
@given(acts=st.lists(ACTS, max_size=40), has_keys=st.booleans())
def test_the_oldest_of_whom_nothing_is_known_makes_room_and_nobody_else(
    acts: list[tuple[Any, ...]], has_keys: bool
) -> None:
    server = HttpServer(
        lambda exchange: exchange.respond(200, [], b""),
        limits=HttpLimits(max_connections=NUM_MAX),
        check_head=check_head if has_keys else None,
    )
    clients: list[Client] = []
    say = sender(has_keys)
    for act, *rest in acts:
        if act == "open":
            inside = [client for client in clients if client.is_in]
            unknown = [client for client in inside if not client.knows]
            new = Client(server)
            clients.append(new)
            if len(inside) < NUM_MAX:
                assert new.is_in
                assert all(client.is_in for client in inside)
            elif unknown:
                assert new.is_in
                assert [client for client in inside if not client.is_in] == unknown[:1]
            else:
                assert b" 503 " in new.heard
                assert all(client.is_in for client in inside)
            say(new, rest[0])
        elif clients:
            client = clients[rest[0] % len(clients)]
            if act == "send":
                say(client, rest[1])
            else:
                client.lose()
        assert sum(client.is_in for client in clients) <= NUM_MAX
    for client in clients:
        client.lose()
    assert not server._connections
    assert not server._unrecognised
    assert not server._turned_away


def sender(has_keys: bool) -> Callable[[Client, str], None]:
    def say(client: Client, what: str) -> None:
        """Once: what follows half a request is another story."""
        if not client.is_in or getattr(client, "said", ""):
            return
        client.said = what  # type: ignore[attr-defined]
        client.knows = what in (("known", "known head") if has_keys else ("known", "stranger", "public"))
        client.send(SENT[what])

    return say


def test_a_request_under_way_is_never_cut_for_a_newcomer() -> None:
    under_way: list[Exchange] = []
    server = HttpServer(under_way.append, limits=HttpLimits(max_connections=1), check_head=check_head)
    first = Client(server)
    first.send(SENT["known"])
    for _ in range(3):
        assert b" 503 " in Client(server).heard
    under_way[0].respond(200, [], b"")
    assert b" 200 " in first.heard
