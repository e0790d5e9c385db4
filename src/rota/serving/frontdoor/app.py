"""The OpenAI API in front of a live cluster: routes, answers, errors."""

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable
from functools import partial

import msgspec

from rota.base.instant import Duration, Instant, to_seconds
from rota.serving.engines.engine import EngineCall, Headers
from rota.serving.frontdoor.admin import INSTANCES, REQUESTS, InstanceAdmin, RequestAdmin, is_straight_from_here
from rota.serving.frontdoor.board_page import STATE, UI, BoardPage, RouterBoard
from rota.serving.frontdoor.exchange import Asker, Exchange, HttpRequest
from rota.serving.frontdoor.http1 import HttpLimits, HttpServer
from rota.serving.frontdoor.instance_metrics import InstanceCollector
from rota.serving.frontdoor.intake import Intake
from rota.serving.frontdoor.key_watch import KeyWatch
from rota.serving.frontdoor.keys import AUTHORIZATION, KeyHolder, KeyRing
from rota.serving.frontdoor.large_bodies import LARGE_BYTES, LargeBodies, LargeBody, Outcome
from rota.serving.frontdoor.openapi import describe
from rota.serving.frontdoor.problems import Problem
from rota.serving.frontdoor.reading import CHAT, COMPLETIONS, BodyReader
from rota.serving.frontdoor.reading_process import ReadingProcess
from rota.serving.frontdoor.refusal_pace import RefusalPace
from rota.serving.frontdoor.request_rate import RequestRate
from rota.serving.frontdoor.telemetry import Telemetry
from rota.serving.frontdoor.tenant_metrics import TenantCounts, TenantMetrics
from rota.serving.frontdoor.turns import Turns
from rota.serving.live.attempt import Answer
from rota.serving.live.cluster import LiveCluster
from rota.serving.live.watch import EngineWatch
from rota.serving.model.instance import InstanceId

_log = logging.getLogger(__name__)
_JSON: Headers = [(b"content-type", b"application/json")]
_KEYED = (CHAT, COMPLETIONS, "/v1/models")
_TEXT: Headers = [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")]
_NUM_STRANGERS_HELD = 128
"""Refusals kept back for whoever has no key: thousands of held connections cost the others more than a cut does."""
_NEVER_HELD = (408, 503)
"""Of what never becomes a request: neither says that somebody asks too often."""
SHUTTING_DOWN = "the router is shutting down"
"""The reason given for requests that a stopping router does not finish."""


class FrontDoor:
    """Answers HTTP requests with a cluster. Listens once `server.start` is awaited."""

    def __init__(
        self,
        cluster: LiveCluster,
        watches: list[EngineWatch],
        *,
        limits: HttpLimits | None = None,
        default_max_tokens: int = 1024,
        resume: bool = True,
        keys: KeyRing | None = None,
        text_counts: bool = False,
    ) -> None:
        """With `keys` nobody is served without one."""
        self.cluster = cluster
        self.watches = watches
        self.telemetry = Telemetry()
        self.telemetry.registry.register(InstanceCollector(cluster, watches))
        self.key_watch: KeyWatch | None = None
        """Who reads the keys' file anew, where somebody does."""
        self._keys = keys
        self._paces: dict[str | None, RefusalPace] = {}
        """Of each tenant that was refused something, and of strangers."""
        self._rate = RequestRate()
        self._turns = Turns(self._handle)
        self._tenants = None if keys is None else TenantMetrics(self.telemetry.registry)
        check_head = None if keys is None else self._check_head
        handle = self._handle if keys is None else self._take_turn
        self.server = HttpServer(handle, limits=limits, refused=self._refused, check_head=check_head)
        self._intake = Intake(
            name=os.urandom(4).hex(),
            default_max_tokens=default_max_tokens,
            resume=resume,
            counts_text=text_counts,
        )
        self.large_bodies = LargeBodies(partial(ReadingProcess, self.server.limits.max_body_bytes))
        self._description = msgspec.json.encode(describe(self.server.limits))
        self._admin = InstanceAdmin(cluster, self._send)
        self._request_admin = RequestAdmin(cluster, self._send)
        board = BoardPage(RouterBoard(cluster, watches).picture, self.count)
        cluster.moves.on_outcome = self.telemetry.migrated
        self._routes: dict[str, tuple[str, Callable[[Exchange], None]]] = {
            CHAT: ("POST", self._generate),
            COMPLETIONS: ("POST", self._generate),
            "/v1/models": ("GET", self._models),
            "/health": ("GET", self._health),
            "/metrics": ("GET", self._metrics),
            "/openapi.json": ("GET", self._openapi),
            INSTANCES: ("GET", self._admin.answer),
            UI: ("GET", board.page),
            STATE: ("GET", board.state),
        }

    def _take_turn(self, exchange: Exchange) -> None:
        self._turns.take(_name_of(exchange.request.asker), exchange)

    def _handle(self, exchange: Exchange) -> None:
        self._answer(exchange, partial(self._answer_by_route, exchange))

    def _answer_by_route(self, exchange: Exchange) -> None:
        request = exchange.request
        route = self._route(request.path)
        if route is None:
            raise Problem(404, f"there is no {request.path or 'such path'} here", code="not_found")
        method, answer = route
        if request.method != method and not (method == "GET" and request.method == "HEAD"):
            raise Problem(405, f"{request.path} takes {method}, not {request.method}", code="method_not_allowed")
        answer(exchange)

    def _answer(self, exchange: Exchange, answer: Callable[[], None]) -> None:
        """Have an exchange answered; if only with what went wrong."""
        request = exchange.request
        try:
            answer()
        except Problem as problem:
            self._answer_problem(exchange, problem)
        except Exception:
            _log.exception("while answering %s %s", request.method, request.path)
            self._answer_problem(exchange, Problem(500, "an internal error of the router", code="internal_error"))

    def _route(self, path: str) -> tuple[str, Callable[[Exchange], None]] | None:
        """Method and handler of a path, or None."""
        if path.startswith(INSTANCES + "/"):
            return "POST", self._admin.answer
        if path.startswith(REQUESTS + "/"):
            return "POST", self._request_admin.answer
        return self._routes.get(path)

    def _answer_problem(self, exchange: Exchange, problem: Problem) -> None:
        headers = problem.headers()
        route = self._route(exchange.request.path)
        if problem.status == 405 and route is not None:
            headers.append((b"allow", b"GET, HEAD" if route[0] == "GET" else route[0].encode()))
        self.refuse(exchange, problem, headers)

    def refuse(self, exchange: Exchange, problem: Problem, headers: Headers) -> None:
        """Answer with a refusal: at once, or later where its tenant is refused too often."""
        self.count(exchange, problem.status)
        held = self._held(exchange.request.asker)
        if held == 0.0:
            exchange.respond(problem.status, headers, problem.body())
        elif held is None:
            exchange.cut()
        else:
            exchange.listener = None  # There is nothing left that its client could leave.
            exchange.request.parts = ()
            later = asyncio.get_running_loop().call_later
            later(held, exchange.respond, problem.status, headers, problem.body())

    def _refused(self, problem: Problem, asker: Asker | None) -> float | None:
        self.telemetry.answered("other", problem.status)
        return 0.0 if problem.status in _NEVER_HELD else self._held(asker)

    def _held(self, asker: Asker | None) -> float | None:
        """For how many seconds a refusal is kept back; None is for ever."""
        if self._keys is None or self.server.draining:
            return 0.0
        name = _name_of(asker)
        pace = self._paces.get(name)
        if pace is None:
            pace = self._paces[name] = (
                RefusalPace() if name is not None else RefusalPace(num_held_max=_NUM_STRANGERS_HELD)
            )
        held = pace.hold(time.monotonic())
        if held != 0.0:
            self.telemetry.refusals_held.inc()
        return held

    def count(self, exchange: Exchange, status: int) -> None:
        """Count an answer."""
        path = exchange.request.path
        below = (each for each in (INSTANCES, REQUESTS) if path.startswith(each + "/"))
        known = path if path in self._routes else next(below, "other")
        self.telemetry.answered(known, status)

    def keys_changed(self) -> None:
        """Forget those of whom there is no key any more."""
        if self._keys is not None:
            known = self._keys.tenants()
            self._paces = {name: pace for name, pace in self._paces.items() if name is None or name in known}
            self._rate.keep(known)

    # --- keys --------------------------------------------------------------------------------------------------------

    def _check_head(self, path: str, headers: Headers) -> KeyHolder | None:
        """Whose request it is. Raises `Problem` before the body of a stranger is read. What needs no key reads no
        body."""
        return self._keys.identify(headers) if self._keys is not None and path in _KEYED else None

    def _holder(self, request: HttpRequest) -> KeyHolder | None:
        """What the key of a request grants, as its head was found to have it; None where there are no keys."""
        if self._keys is None:
            return None
        asker = request.asker
        return asker if isinstance(asker, KeyHolder) else self._keys.identify(request.headers)

    def _is_operator(self, exchange: Exchange) -> bool:
        """Whether an exchange may see what the tenants share: where there are no keys everybody may, else who asks
        straight from this machine, or with the key of an operator. Raises `Problem` (401) for a key that is unknown."""
        if self._keys is None:
            return True
        if exchange.request.header(AUTHORIZATION) is not None:
            return self._keys.identify(exchange.request.headers).operator
        return is_straight_from_here(exchange)

    # --- endpoints ---------------------------------------------------------------------------------------------------

    def _generate(self, exchange: Exchange) -> None:
        if self.server.draining:
            raise Problem(503, SHUTTING_DOWN, code="shutting_down", retry_after_seconds=5)
        holder, now = self._holder(exchange.request), self.cluster.loop.now()
        if holder is not None:
            self._within_rate(holder, now)
        request = exchange.request
        if request.num_body_bytes < LARGE_BYTES[request.path]:
            self._submit(exchange, self._intake.read(request, now, holder))
            return
        reader = self._intake.reader(request, holder)
        parts, request.parts = list(request.parts), ()
        heard = partial(self._heard_of, exchange, reader, now)
        body = self.large_bodies.read(_name_of(request.asker), reader, parts, heard)
        counts = None if self._tenants is None or holder is None else self._tenants.of(holder.tenant)
        exchange.listener = _Unread(self, body, counts)

    def _heard_of(self, exchange: Exchange, reader: BodyReader, arrived_at: Instant, outcome: Outcome) -> None:
        """A large body was read."""

        def go_on() -> None:
            if isinstance(outcome, Problem):
                raise outcome
            self._submit(exchange, self._intake.call(exchange.request, reader, outcome, arrived_at))

        exchange.listener = None
        self._answer(exchange, go_on)

    def _submit(self, exchange: Exchange, call: EngineCall) -> None:
        self.telemetry.prompt_tokens.inc(call.request.num_prompt_tokens)
        counts = None if self._tenants is None else self._tenants.of(call.request.tenant)
        if counts is not None:
            counts.prompt_tokens.inc(call.request.num_prompt_tokens)
        client = _Conversation(self, exchange, call, counts)
        exchange.listener = client
        self.cluster.submit(call, client)

    def left(self, counts: TenantCounts | None) -> None:
        """Count a client that left before its answer was whole."""
        self.telemetry.clients_left.inc()
        if counts is not None:
            counts.ended("left")

    def _within_rate(self, holder: KeyHolder, now: Instant) -> None:
        """Raises `Problem` (429) where a tenant has had its requests of this minute."""
        try:
            self._rate.check(holder, now)
        except Problem as problem:
            self.telemetry.rejections.labels(str(problem.status)).inc()
            if self._tenants is not None:
                self._tenants.of(holder.tenant).ended("refused")
            raise

    def _models(self, exchange: Exchange) -> None:
        self._holder(exchange.request)
        merged: dict[object, dict[str, object]] = {}
        for instance_id, status in sorted(self.cluster.statuses.items()):
            if instance_id in self.cluster.drained:
                continue
            for model in status.models:
                merged.setdefault(model.get("id"), model)
        self._send(exchange, 200, {"object": "list", "data": list(merged.values())})

    def _health(self, exchange: Exchange) -> None:
        instances = {}
        for watch in self.watches:
            is_ready = self.cluster.takes_requests(watch.engine.id)
            why_not = None if is_ready else "drained" if watch.is_ready else watch.last_error
            instances[watch.engine.id] = {"ready": is_ready, "why_not": why_not}
        num_ready = sum(instance["ready"] is True for instance in instances.values())
        healthy = num_ready > 0 and not self.server.draining
        told: dict[str, object] = {"status": "ok" if healthy else "unavailable", "num_ready": num_ready}
        if self._is_operator(exchange):
            told["instances"] = instances
            if self.key_watch is not None and self.key_watch.broken is not None:
                told["keys"] = f"as they were before the file was broken: {self.key_watch.broken}"
        self._send(exchange, 200 if healthy else 503, told)

    def _metrics(self, exchange: Exchange) -> None:
        if not self._is_operator(exchange):
            raise Problem(403, "metrics are for this machine and for the keys of operators", code="not_granted")
        if self.key_watch is not None:
            self.telemetry.key_file_broken.set(self.key_watch.broken is not None)
        self.telemetry.unfinished.set(len(self.cluster.flights))
        self.count(exchange, 200)
        exchange.respond(200, _TEXT, self.telemetry.page())

    def _openapi(self, exchange: Exchange) -> None:
        self.count(exchange, 200)
        exchange.respond(200, _JSON, self._description)

    def _send(self, exchange: Exchange, status: int, value: object) -> None:
        self.count(exchange, status)
        exchange.respond(status, _JSON, msgspec.json.encode(value))


class _Unread:
    """A request whose large body is not read yet, seen from its client."""

    __slots__ = ("_body", "_counts", "_door")

    def __init__(self, door: FrontDoor, body: LargeBody, counts: TenantCounts | None) -> None:
        self._door = door
        self._body = body
        self._counts = counts

    def client_left(self) -> None:
        self._body.forget()
        self._door.left(self._counts)

    def client_stalled(self, stalled: bool) -> None:
        """Nothing was said to it yet."""


class _Conversation:
    """One request to an engine, seen from its client: hears the cluster and writes the answer."""

    __slots__ = ("_counts", "_door", "_exchange", "_has_started", "_request_id", "_started_at", "on_chunks", "on_data")

    def __init__(self, door: FrontDoor, exchange: Exchange, call: EngineCall, counts: TenantCounts | None) -> None:
        self._door = door
        self._exchange = exchange
        self.on_data = exchange.write
        self.on_chunks = exchange.write_chunks if exchange.is_chunked else None
        self._request_id = call.request.id
        self._has_started = False
        self._counts = counts
        self._started_at = time.monotonic()

    # --- from the connection -----------------------------------------------------------------------------------------

    def client_left(self) -> None:
        self._door.left(self._counts)
        self._door.cluster.client_left(self._request_id)

    def client_stalled(self, stalled: bool) -> None:
        self._door.cluster.client_stalled(self._request_id, stalled)

    # --- from the cluster --------------------------------------------------------------------------------------------

    def on_dispatched(self, instance_id: InstanceId, attempt: int) -> None:
        if attempt > 1:
            self._door.telemetry.retries.inc()

    def on_start(self, status: int, headers: Headers, first: bytes) -> None:
        self._has_started = True
        self._door.telemetry.ttft.observe(time.monotonic() - self._started_at)
        self._exchange.start(status, self._named(headers), first)

    def on_resumed(self, gap_seconds: float) -> None:
        self._door.telemetry.resumption_gap.observe(gap_seconds)

    def on_end(self, num_output_tokens: int | None) -> None:
        self._finished(self._exchange.status, num_output_tokens)
        self._exchange.end()

    def on_answer(self, answer: Answer, num_output_tokens: int | None) -> None:
        self._finished(answer.status, num_output_tokens)
        self._exchange.respond(answer.status, self._named(answer.headers), answer.body)

    def on_refused(self, status: int, reason: str, retry_after: Duration | None) -> None:
        self._door.telemetry.rejections.labels(str(status)).inc()
        self._count("refused")
        seconds = None if retry_after is None else max(1, math.ceil(to_seconds(retry_after)))
        problem = Problem(status, reason, code="rejected", retry_after_seconds=seconds)
        self._door.refuse(self._exchange, problem, [*problem.headers(), self._request_name()])

    def on_failed(self, reason: str, answer: Answer | None) -> None:
        self._count("failed")
        if answer is not None and not self._has_started:
            # The engine's own words say best what is wrong.
            if answer.status >= 500:
                self._door.telemetry.engine_failures.inc()
            self._door.count(self._exchange, answer.status)
            self._exchange.respond(answer.status, self._named(answer.headers), answer.body)
            return
        self._door.telemetry.engine_failures.inc()
        status = 503 if reason == SHUTTING_DOWN else 502
        self._problem(Problem(status, reason, code="engine_lost" if status == 502 else "shutting_down"))

    def _problem(self, problem: Problem) -> None:
        self._door.count(self._exchange, problem.status)
        if self._has_started:
            # The status is out already, so the error is the last event, and no [DONE] follows it.
            self._exchange.end(b"\n\n" + problem.as_event())
        else:
            headers = [*problem.headers(), self._request_name()]
            self._exchange.respond(problem.status, headers, problem.body())

    def _finished(self, status: int, num_output_tokens: int | None) -> None:
        telemetry = self._door.telemetry
        telemetry.e2e.observe(time.monotonic() - self._started_at)
        self._count("served")
        if num_output_tokens:
            telemetry.output_tokens.inc(num_output_tokens)
            if self._counts is not None:
                self._counts.generation_tokens.inc(num_output_tokens)
        self._door.count(self._exchange, status)

    def _count(self, outcome: str) -> None:
        if self._counts is not None:
            self._counts.ended(outcome)

    def _named(self, headers: Headers) -> Headers:
        named = [header for header in headers if header[0] != b"x-request-id"]
        named.append(self._request_name())
        return named

    def _request_name(self) -> tuple[bytes, bytes]:
        return b"x-request-id", self._request_id.encode()


def _name_of(asker: Asker | None) -> str | None:
    """The tenant; None for strangers, all together."""
    return asker.tenant if isinstance(asker, KeyHolder) else None
