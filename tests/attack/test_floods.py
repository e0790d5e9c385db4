"""Floods: whoever is refused again and again costs little, whoever sends at once waits behind itself alone, and nothing
that is held is lost."""

import asyncio
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.attack.wire import ALICE, BOB, GOOD, answer_to, error_to, get, keys_of_three, post

from rota.base.instant import NANOSECONDS_PER_SECOND, Instant
from rota.serving.frontdoor import app, http1
from rota.serving.frontdoor.exchange import Exchange
from rota.serving.frontdoor.keys import KeyHolder, KeyRing, TenantTerms, granted_stack
from rota.serving.frontdoor.problems import Problem
from rota.serving.frontdoor.refusal_pace import NUM_AT_ONCE, RefusalPace
from rota.serving.frontdoor.request_rate import RequestRate
from rota.serving.frontdoor.serve import ServeConfig
from rota.serving.model.request import TenantId
from rota.serving.stack import StackConfig
from rota.testing.router import RunningRouter, running_router

LIMITED = StackConfig(admission="tenant_limits")
TINY = keys_of_three(alice=TenantTerms(tokens_per_minute=30))
BEYOND = post({**GOOD, "max_tokens": 20})
"""Of which alice may have one a minute."""


async def num_held(port: int) -> float:
    page = (await answer_to(port, get("/metrics")))[2].decode()
    return float(page.split("\nrota:refusals_held_total ")[1].split()[0])


class FrozenPace(RefusalPace):
    """For which no time passes, so that a test can say how many are held however slow the machine is."""

    def hold(self, now: float) -> float | None:
        return super().hold(0.0)


def paced(
    running: RunningRouter, who: str | None, num_a_second: float = 20.0, num_at_once: int = 2, num_held_max: int = 10
) -> RefusalPace:
    """So few a second that a test can count them."""
    made = running.router.door._paces[who] = FrozenPace(num_a_second, num_at_once, num_held_max)
    return made


@pytest.mark.asyncio
async def test_refusals_beyond_the_pace_are_held_and_then_sent_and_others_are_not_held() -> None:
    serve = ServeConfig(port=0, keys=TINY)
    async with running_router(num_simulated=1, stack=granted_stack(LIMITED, TINY), serve=serve) as running:
        port = running.router.door.server.port
        paced(running, "alice")
        assert (await answer_to(port, BEYOND))[0] == 200
        for expected in (0, 0, 1, 2, 3):
            status, headers, body = await answer_to(port, BEYOND)
            assert (status, "retry-after" in headers, b"tokens per minute" in body) == (429, True, True)
            assert await num_held(port) == expected
        assert (await answer_to(port, post(b"{")))[0] == 400, "what is malformed is refused at the same pace"
        assert await num_held(port) == 4
        for _ in range(4):
            assert (await answer_to(port, post(GOOD, key=BOB)))[0] == 200
            assert (await answer_to(port, post(b"{", key=BOB)))[0] == 400
        assert await num_held(port) == 4


@pytest.mark.asyncio
async def test_few_refusals_of_strangers_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of connections that wait for a refusal cost a tenant more than connections that are cut."""
    monkeypatch.setattr(app, "RefusalPace", FrozenPace)
    async with running_router(num_simulated=1, serve=ServeConfig(port=0, keys=keys_of_three())) as running:
        held = [running.router.door._held(None) for _ in range(NUM_AT_ONCE + 200)]
    assert all(each == 0.0 for each in held[:NUM_AT_ONCE])
    num_kept = sum(each is not None for each in held[NUM_AT_ONCE:])
    assert 64 <= num_kept <= 128
    assert held[-1] is None


@pytest.mark.asyncio
async def test_a_connection_is_not_read_while_its_refusal_is_held_and_goes_on_after() -> None:
    serve = ServeConfig(port=0, keys=keys_of_three())
    async with running_router(num_simulated=1, serve=serve) as running:
        paced(running, "alice")
        reader, writer = await asyncio.open_connection("127.0.0.1", running.router.door.server.port)
        writer.write(post(b"{") * 6 + post(GOOD) + post(GOOD, "connection: close"))
        heard = await asyncio.wait_for(reader.read(-1), 20)
        assert heard.count(b"HTTP/1.1 400 ") == 6
        assert heard.count(b"HTTP/1.1 200 ") == 2
        assert heard.rindex(b" 400 ") < heard.index(b" 200 ")
        writer.close()


@pytest.mark.asyncio
async def test_strangers_are_refused_at_a_pace_of_their_own_on_whatever_connection() -> None:
    async with running_router(num_simulated=1, serve=ServeConfig(port=0, keys=keys_of_three())) as running:
        port = running.router.door.server.port
        paced(running, None)
        stranger = post(b"x" * 200_000, key="rota-nobodys")
        for expected in (0, 0, 1, 2):
            assert (await answer_to(port, stranger))[0] == 401
            assert await num_held(port) == expected
        assert (await answer_to(port, post(GOOD)))[0] == 200
        paced(running, None, num_at_once=0, num_held_max=1)
        answers = await asyncio.gather(*(answer_to(port, stranger) for _ in range(5)), return_exceptions=True)
        assert sorted(isinstance(each, tuple) for each in answers) == [False, False, False, False, True]
        assert (await answer_to(port, post(GOOD)))[0] == 200


@pytest.mark.parametrize("key", [ALICE, "rota-nobodys"])
@pytest.mark.asyncio
async def test_who_leaves_while_held_leaves_nothing_behind(
    key: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = ServeConfig(port=0, keys=TINY)
    async with running_router(num_simulated=1, stack=granted_stack(LIMITED, TINY), serve=serve) as running:
        door = running.router.door
        assert (await answer_to(door.server.port, BEYOND))[0] == 200
        pace = paced(running, "alice" if key == ALICE else None, num_a_second=0.001, num_at_once=0)
        loop = asyncio.get_running_loop()
        call_later, timers = loop.call_later, list[Callable[[], None]]()

        def later(delay: float, callback: Callable[..., None], *arguments: Any, **named: Any) -> object:
            if delay > 500:
                return timers.append(partial(callback, *arguments))
            return call_later(delay, callback, *arguments, **named)

        monkeypatch.setattr(loop, "call_later", later)
        for _ in range(5):
            _, writer = await asyncio.open_connection("127.0.0.1", door.server.port)
            writer.write(BEYOND.replace(ALICE.encode(), key.encode()))
        async with asyncio.timeout(20):
            while len(pace._leave_at) < 5 or not timers:
                await asyncio.sleep(0.01)
            for connection in list(door.server._connections):
                assert connection.transport is not None
                is_read_on = connection._current is None and connection.transport.is_reading()
                assert not is_read_on
                connection.transport.abort()
            while door.server._connections:
                await asyncio.sleep(0.01)
        assert len(timers) == 5
        for fire in timers:  # The answers that nobody waits for any more.
            fire()
        assert (await answer_to(door.server.port, post(GOOD, key=BOB)))[0] == 200
        page = (await answer_to(door.server.port, get("/metrics")))[2].decode()
        assert 'outcome="left",tenant="alice"} 0.0' in page, "a refusal is counted once"
    assert "Exception" not in caplog.text


@pytest.mark.asyncio
async def test_a_crowd_of_one_tenant_waits_behind_itself_alone() -> None:
    async with running_router(num_simulated=1, serve=ServeConfig(port=0, keys=keys_of_three())) as running:
        door, num = running.router.door, 40
        looked_at: list[str | None] = []
        passes: list[Callable[[], None]] = []

        def look(exchange: Exchange) -> None:
            asker = exchange.request.asker
            looked_at.append(None if asker is None else asker.tenant)  # type: ignore[attr-defined]
            exchange.respond(200, [], b"")

        ticks = iter(range(1_000_000))
        turns = door._turns
        turns._handle, turns._soon, turns._clock = look, passes.append, lambda: float(next(ticks))
        crowd = [asyncio.create_task(answer_to(door.server.port, post(GOOD))) for _ in range(num)]
        async with asyncio.timeout(20):
            while len(looked_at) + sum(map(len, turns._waiting.values())) < num:
                await asyncio.sleep(0.01)
            assert looked_at == ["alice"], "one of these takes a whole turn"
            assert (await answer_to(door.server.port, post(GOOD, key=BOB)))[0] == 200
            assert looked_at == ["alice", "bob"]
            assert (await answer_to(door.server.port, get("/health")))[0] == 200
            assert looked_at == ["alice", "bob", None]
            while passes:
                passes.pop()()
            await asyncio.gather(*crowd)
        assert looked_at.count("alice") == num


@pytest.mark.asyncio
async def test_a_packet_of_many_requests_is_parsed_as_they_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    finish = http1.HttpConnection.on_message_complete

    def counted(self: http1.HttpConnection) -> None:
        nonlocal most
        finish(self)
        most = max(most, len(self._pipelined))

    monkeypatch.setattr(http1.HttpConnection, "on_message_complete", counted)
    held: list[Exchange] = []
    server = http1.HttpServer(held.append)
    await server.start("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    num = 5000
    writer.write(b"".join(b"GET /%d HTTP/1.1\r\n\r\n" % index for index in range(num)))
    async with asyncio.timeout(60):
        for index in range(num):
            while not held:
                await asyncio.sleep(0)
            exchange = held.pop()
            assert exchange.request.path == f"/{index}"
            exchange.respond(200, [], b"")
    writer.close()
    server.close()
    assert most <= 16 + 2 * 1024 // 18, "a slice beyond what is let wait"
    await reader.read(-1)


@pytest.mark.asyncio
async def test_what_follows_a_refused_head_is_not_answered_in_its_place() -> None:
    async with running_router(num_simulated=1, serve=ServeConfig(port=0, keys=keys_of_three())) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.router.door.server.port)
        writer.write(post(GOOD) + post(GOOD, key="rota-nobodys") + post(GOOD, key=BOB))
        heard = await asyncio.wait_for(reader.read(-1), 20)
        writer.close()
    assert [part[:3] for part in heard.split(b"HTTP/1.1 ")[1:]] == [b"200", b"401"]


@pytest.mark.asyncio
async def test_a_tenant_beyond_its_requests_per_minute_is_refused_before_its_body_is_parsed() -> None:
    keys = keys_of_three(alice=TenantTerms(requests_per_minute=3))
    async with running_router(num_simulated=1, serve=ServeConfig(port=0, keys=keys)) as running:
        port = running.router.door.server.port
        answers = [(await answer_to(port, post(body)))[:2] for body in (GOOD, b"{", GOOD, b"{", GOOD)]
        assert [status for status, _ in answers] == [200, 400, 200, 429, 429], "whatever came takes one"
        assert all(1 <= int(headers["retry-after"]) <= 20 for status, headers in answers if status == 429)
        assert await error_to(port, post(GOOD)) == (429, None, "rejected")
        assert (await answer_to(port, post(GOOD, key=BOB)))[0] == 200
        page = (await answer_to(port, get("/metrics")))[2].decode()
        assert 'outcome="refused",tenant="alice"} 3.0' in page


@given(gaps=st.lists(st.integers(0, 30_000), max_size=60), rate=st.integers(1, 20))
def test_in_no_minute_more_than_two_buckets_go_and_retry_after_is_true(gaps: list[int], rate: int) -> None:
    rates, now, let_in = RequestRate(), Instant(0), list[int]()
    holder = KeyHolder(TenantId("alice"), TenantTerms(requests_per_minute=rate))
    for gap in gaps:
        now = Instant(now + gap * 1_000_000)
        try:
            rates.check(holder, now)
        except Problem as problem:
            assert problem.retry_after_seconds is not None
            at_least = Instant(now + problem.retry_after_seconds * NANOSECONDS_PER_SECOND)
            later = RequestRate()
            later._buckets = copy.deepcopy(rates._buckets)
            later.check(holder, at_least)
        else:
            let_in.append(now)
    for begin in let_in:
        assert sum(begin <= each <= begin + 60 * NANOSECONDS_PER_SECOND for each in let_in) <= 2 * rate
    rates.keep(set())
    assert not rates._buckets


def test_a_rate_that_changed_with_the_keys_counts_at_once() -> None:
    rates = RequestRate()
    few, more = (KeyHolder(TenantId("alice"), TenantTerms(requests_per_minute=rate)) for rate in (1, 3))
    rates.check(few, Instant(0))
    with pytest.raises(Problem, match="1 requests per minute"):
        rates.check(few, Instant(0))
    for _ in range(3):
        rates.check(more, Instant(0))
    with pytest.raises(Problem, match="3 requests per minute"):
        rates.check(more, Instant(0))


@pytest.mark.asyncio
async def test_a_tenants_bodies_may_be_bounded_below_what_everybody_may_send() -> None:
    keys = keys_of_three(alice=TenantTerms(max_body_bytes=1000))
    async with running_router(num_simulated=1, serve=ServeConfig(port=0, keys=keys)) as running:
        port = running.router.door.server.port
        large = {**GOOD, "messages": [{"role": "user", "content": "x" * 2000}]}
        announced = post(large)
        assert (await error_to(port, announced[: announced.index(b"\r\n\r\n") + 4]))[::2] == (413, "body_too_large")
        chunked = post(b"", "transfer-encoding: chunked").replace(b"content-length: 0\r\n", b"")
        assert (await answer_to(port, chunked + b"7d0\r\n" + b"x" * 2000))[0] == 413
        assert (await answer_to(port, post(GOOD)))[0] == 200
        assert (await answer_to(port, post(large, key=BOB)))[0] == 200


@pytest.mark.asyncio
async def test_a_key_is_hashed_once_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    num, find = 0, KeyRing.find

    def counted(self: KeyRing, key: bytes) -> object:
        nonlocal num
        num += 1
        return find(self, key)

    monkeypatch.setattr(KeyRing, "find", counted)
    async with running_router(num_simulated=1, serve=ServeConfig(port=0, keys=keys_of_three())) as running:
        port = running.router.door.server.port
        assert (await answer_to(port, post(GOOD)))[0] == 200
        assert num == 1
        assert (await answer_to(port, get("/v1/models", f"authorization: Bearer {BOB}")))[0] == 200
        assert num == 2
