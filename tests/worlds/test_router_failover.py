"""Streams whose engine breaks at any event go on at another one: every token once, in order, and nothing else."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rota.serving.frontdoor.serve import ServeConfig
from rota.serving.live.watch import WatchSettings
from rota.testing.router import RunningRouter, running_router
from rota.testing.scripted import answers, breaks, engines_of, scripted
from rota.testing.token_server import KINDS, LEAK, Break, TokenServer, begins_character, events_of, said, token_engines

WATCH = WatchSettings(interval_seconds=0.02, starting_interval_seconds=0.01)
QUICK = ServeConfig(port=0, watch=WATCH)


@asynccontextmanager
async def served(
    *faults: Break | None,
    num_servers: int = 3,
    serve: ServeConfig = QUICK,
    pace: float = 0.0,
    version: bytes = b"0.32.0",
) -> AsyncIterator[tuple[RunningRouter, list[TokenServer]]]:
    left = list(faults)
    servers = [TokenServer(left, created=1 + index, pace=pace, version=version) for index in range(num_servers)]
    try:
        async with running_router(num_simulated=0, engines=await token_engines(servers), serve=serve) as running:
            yield running, servers
            running.router.cluster.machine.check()
            assert not running.router.cluster.flights
    finally:
        for server in servers:
            server.die()


def body_of(*, chat: bool = True, **extra: Any) -> dict[str, Any]:
    prompt = {"messages": [{"role": "user", "content": "tell me more of it"}]} if chat else {"prompt": "tell me more"}
    return {"model": "m", "stream": True, "max_tokens": 20, "ignore_eos": True, **prompt, **extra}


async def ask(running: RunningRouter, body: dict[str, Any], headers: dict[str, str] | None = None) -> tuple[str, bytes]:
    """Id and events of a stream."""
    url = running.url + ("/v1/chat/completions" if "messages" in body else "/v1/completions")
    async with aiohttp.ClientSession() as session, session.post(url, json=body, headers=headers) as answer:
        return answer.headers["x-request-id"], await answer.read()


def events(raw: bytes) -> list[bytes]:
    assert raw.endswith(b"\n\n")
    return raw.removesuffix(b"\n\n").split(b"\n\n")


def as_if_nothing_happened(body: dict[str, Any], request_id: str) -> list[bytes]:
    expected = [json.dumps(event, separators=(",", ":")).encode() for event in events_of(body, request_id, 1)]
    return [b"data: " + event for event in (*expected, b"[DONE]")]


def num_events(body: dict[str, Any]) -> int:
    return len(list(events_of(body, "x", 1)))


def assert_whole(raw: bytes, body: dict[str, Any], request_id: str) -> None:
    """The events are those of an uninterrupted run; a role is said again only if nothing had been sent."""
    assert [json.loads(event[6:]) if b"{" in event else event for event in events(raw)] == [
        json.loads(event[6:]) if b"{" in event else event for event in as_if_nothing_happened(body, request_id)
    ]


def without_created(raw: bytes) -> bytes:
    """A stream that broke before its first token is the next engine's own, and has its time."""
    created = {json.loads(event[6:])["created"] for event in events(raw) if b"{" in event}
    assert len(created) == 1, "the events of one stream have one time"
    return raw.replace(b'"created":%d' % created.pop(), b'"created":1')


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.asyncio
async def test_a_stream_that_breaks_before_any_event_is_whole(kind: str, chat: bool) -> None:
    body = body_of(chat=chat, stream_options={"include_usage": True})
    last = num_events(body)
    async with served() as (running, servers):
        for before in range(last + 1):
            if kind in ("abort", "early_done", "wrong_type") and before == last:
                continue  # there is no event to put it in the place of
            servers[0]._breaks.append(Break(before, kind))
            request_id, raw = await ask(running, body)
            assert_whole(without_created(raw), body, request_id)
            assert not servers[0]._breaks


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_however_often_it_breaks_no_token_is_lost_or_doubled(data: st.DataObject) -> None:
    chat = data.draw(st.booleans())
    extra: dict[str, Any] = data.draw(
        st.fixed_dictionaries(
            {"max_tokens": st.integers(1, 40), "ignore_eos": st.booleans()},
            optional={
                "return_token_ids": st.just(True),
                "stream_options": st.just({"include_usage": True}),
                "temperature": st.just(0),
                "seed": st.none(),
            },
        )
    )
    body = body_of(chat=chat, **extra)
    body["messages" if chat else "prompt"] = (
        [{"role": "user", "content": data.draw(st.text("ab ", min_size=1))}]
        if chat
        else data.draw(st.text("ab ", min_size=1))
    )
    faults = data.draw(st.lists(st.builds(Break, st.integers(0, 45), st.sampled_from(KINDS)), max_size=3))

    async def run() -> tuple[str, bytes]:
        async with served(*faults) as (running, _):
            return await ask(running, body)

    request_id, raw = asyncio.run(run())
    if b'"error"' in raw:
        # Three attempts before the first token are all that there are.
        assert len(faults) == 3
        return
    raw = without_created(raw)
    if extra.get("return_token_ids"):
        # The client is told the prompt's ids by the first engine alone.
        assert raw.count(b'"prompt_token_ids":[') == 1
    assert_whole(raw, body, request_id)
    assert LEAK.encode() not in raw, "a prompt ended inside a character"


@pytest.mark.asyncio
async def test_what_is_asked_for_again_is_the_rest_of_the_same() -> None:
    body = body_of(max_tokens=20, min_tokens=8, temperature=0.7, top_p=0.9, user="me")
    async with served(Break(6, "kill")) as (running, servers):
        await ask(running, body)
        first, second = servers[0].bodies[0], next(server.bodies[0] for server in servers[1:] if server.bodies)
    assert first == {**body, "return_token_ids": True}
    prompt = second.pop("kv_transfer_params")["prompt_token_ids"]
    ids = [token for token, _, _ in said(body)]
    num_tokens = max(count for count in range(6) if count == 0 or not begins_character(ids[count - 1]))
    assert prompt[-num_tokens:] == ids[:num_tokens]
    assert second == {**first, "max_tokens": 20 - num_tokens, "min_tokens": 8 - num_tokens}


@pytest.mark.asyncio
async def test_a_vllm_is_told_whose_a_request_is_and_what_was_promised() -> None:
    body = body_of(max_tokens=20, vllm_xargs={"mine": 1})
    async with served(Break(6, "kill")) as (running, servers):
        headers = {"x-gateway-inference-fairness-id": "team", "x-slo-ttft-ms": "500", "x-slo-tpot-ms": "25.5"}
        await ask(running, body, headers=headers)
        bodies = [server.bodies[0] for server in servers if server.bodies]
    assert len(bodies) == 2, "it went on elsewhere"
    told = {"mine": 1, "tenant": "team", "slo_ttft_ms": 500.0, "slo_tpot_ms": 25.5}
    for each in bodies:
        assert {name: each["vllm_xargs"][name] for name in told} == told


STAYS: Sequence[dict[str, Any]] = (
    {"seed": 3},
    {"n": 2},
    {"frequency_penalty": 0.5},
    {"presence_penalty": -0.5},
    {"stop": ["END"]},
    {"logprobs": True},
    {"response_format": {"type": "json_object"}},
    {"tools": [{"type": "function", "function": {"name": "f"}}]},
    {"guided_regex": "a*"},
    {"structured_outputs": {"regex": "a*"}},
    {"bad_words": ["x"]},
    {"a_field_that_nobody_knows": 1},
)


@pytest.mark.parametrize("extra", STAYS, ids=lambda extra: next(iter(extra)))
@pytest.mark.asyncio
async def test_what_does_not_travel_ends_with_an_error(extra: dict[str, Any]) -> None:
    async with served(Break(5, "kill")) as (running, servers):
        _, raw = await ask(running, body_of(**extra))
        assert "return_token_ids" not in servers[0].bodies[0], "it is passed on byte for byte"
    *whole, last = events(raw.replace(b"\n\n\n\n", b"\n\n"))
    assert len(whole) <= 5
    assert json.loads(last[6:])["error"]["code"] == "engine_lost"


@pytest.mark.parametrize(
    ("serve", "version"), [(ServeConfig(port=0, watch=WATCH, resume=False), b"0.32.0"), (QUICK, b"0.9.1")]
)
@pytest.mark.asyncio
async def test_streams_pass_unread_where_they_cannot_go_on(serve: ServeConfig, version: bytes) -> None:
    async with served(Break(5, "kill"), serve=serve, version=version) as (running, servers):
        _, raw = await ask(running, body_of())
        assert "return_token_ids" not in servers[0].bodies[0]
    assert b"engine_lost" in raw


@pytest.mark.asyncio
async def test_an_engine_that_hangs_loses_nobody() -> None:
    body = body_of()
    # Silence alone has to do: of failed probes in a row so many are forgiven that they would not.
    serve = ServeConfig(port=0, watch=WatchSettings(interval_seconds=0.02, num_failures_max=1000))
    async with served(*(Break(before, "hang") for before in (9, 4)), serve=serve) as (running, _):
        request_id, raw = await ask(running, body)
    assert_whole(without_created(raw), body, request_id)


@pytest.mark.asyncio
async def test_an_engine_that_ignores_the_token_ids_is_not_believed() -> None:
    """Such as one that begins a chat anew: its beginning must not be put behind the first engine's."""
    async with served(Break(6, "kill")) as (running, servers):
        for server in servers[1:]:
            original = server._answer

            def begins_anew(raw: bytes, head: str, writer: asyncio.StreamWriter, original: Any = original) -> Any:
                body = json.loads(raw)
                body.pop("kv_transfer_params", None)
                return original(json.dumps(body).encode(), head, writer)

            server._answer = begins_anew  # type: ignore[method-assign]
        request_id, raw = await ask(running, body := body_of())
    assert_whole(without_created(raw), body, request_id), "the first engine, well again, is the last resort"


@pytest.mark.asyncio
async def test_a_steady_load_survives_engines_that_break_by_turns() -> None:
    bodies = [body_of(max_tokens=12 + index % 9, user=str(index)) for index in range(24)]
    faults = [Break(2 + index % 11, KINDS[index % len(KINDS)]) for index in range(24)]
    async with served(*faults, pace=0.001) as (running, servers):
        answers = await asyncio.gather(*(ask(running, body) for body in bodies))
        resumed = sum("kv_transfer_params" in body for server in servers for body in server.bodies)
    for body, (request_id, raw) in zip(bodies, answers, strict=True):
        assert_whole(without_created(raw), body, request_id)
    assert resumed >= 12


@pytest.mark.asyncio
async def test_an_engine_whose_streams_stand_still_is_lost_though_its_probes_are_well() -> None:
    serve = ServeConfig(port=0, watch=WatchSettings(interval_seconds=0.02, stall_seconds=0.2))
    async with served(Break(7, "stall"), serve=serve) as (running, _):
        request_id, raw = await ask(running, body := body_of())
    assert_whole(without_created(raw), body, request_id)


@pytest.mark.asyncio
async def test_a_breaker_takes_out_an_instance_that_fails_though_its_probes_are_well() -> None:
    async with scripted(breaks, answers) as servers:
        engines = await engines_of(servers)
        async with running_router(num_simulated=0, engines=engines, serve=QUICK) as running:
            body = {**body_of(), "stream": False}
            for _ in range(20):
                _, raw = await ask(running, body)
                assert b"fine" in raw
            cluster = running.router.cluster
            assert servers[0].num_posts == 5, "after five failures it gets nothing"
            assert not cluster.takes_requests(engines[0].id)
            assert cluster.takes_requests(engines[1].id)
            servers[0].script = answers
            async with asyncio.timeout(5):
                while not cluster.takes_requests(engines[0].id):
                    await asyncio.sleep(0.02)
            for _ in range(4):
                await ask(running, body)
            assert servers[0].num_posts > 5, "after a pause it is tried again"


@pytest.mark.asyncio
async def test_the_last_instance_is_never_taken_out() -> None:
    async with (
        scripted(breaks) as servers,
        running_router(num_simulated=0, engines=await engines_of(servers), serve=QUICK) as running,
    ):
        for _ in range(5):
            await ask(running, {**body_of(), "stream": False})
        assert running.router.cluster.takes_requests(running.router.engines[0].id)
