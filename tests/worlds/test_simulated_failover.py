"""Simulated engines as servers of their own: a stream goes on at another one with the tokens it would have had."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from rota.serving.engines.openai import OpenAIEngine
from rota.serving.frontdoor.serve import ServeConfig
from rota.serving.frontdoor.simulated_server import SimulatedServer, build_server
from rota.serving.live.watch import WatchSettings
from rota.serving.model.instance import InstanceId, InstanceLimits
from rota.serving.predictors.step_time.affine import AffineStepTime
from rota.serving.stack import StackConfig
from rota.testing.router import RunningRouter, running_router

QUICK = ServeConfig(port=0, watch=WatchSettings(interval_seconds=0.02, starting_interval_seconds=0.01))
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def server(name: str, seed: int) -> SimulatedServer:
    limits = InstanceLimits(num_blocks=512)
    return build_server(InstanceId(name), limits, StackConfig(), AffineStepTime(base_ms=12.0), seed)


@asynccontextmanager
async def two() -> AsyncIterator[tuple[RunningRouter, dict[str, SimulatedServer]]]:
    servers = {name: server(name, seed) for seed, name in enumerate(("a", "b"))}
    engines = []
    for name, each in servers.items():
        await each.server.start("127.0.0.1", 0)
        engines.append(OpenAIEngine(InstanceId(name), f"http://127.0.0.1:{each.server.port}"))
    async with running_router(num_simulated=0, engines=engines, serve=QUICK) as running:
        await running.router.wait_ready(2)
        yield running, servers
    for each in servers.values():
        each.server.close()


def body_of(path: str, prompt: Any, **extra: Any) -> dict[str, Any]:
    given = {"messages": [{"role": "user", "content": prompt}]} if path == CHAT else {"prompt": prompt}
    options = {"max_tokens": 50, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    return {"model": "simulated", **given, **options, **extra}


async def ask(session: aiohttp.ClientSession, url: str, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with session.post(url + path, json=body) as answer:
        events = (await answer.read()).removesuffix(b"\n\n").split(b"\n\n")
    assert events[-1] == b"data: [DONE]", events[-1]
    return [json.loads(event[6:]) for event in events[:-1]]


def said(events: list[dict[str, Any]]) -> tuple[str, list[int], list[str], Any]:
    choices = [choice for event in events for choice in event["choices"]]
    text = "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)
    ids = [token for choice in choices for token in choice.get("token_ids") or []]
    return text, ids, [each["finish_reason"] for each in choices if each["finish_reason"]], events[-1].get("usage")


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.asyncio
async def test_a_stream_goes_on_at_the_other_engine(path: str) -> None:
    body = body_of(path, "tell me more", return_token_ids=True)
    async with two() as (running, servers), aiohttp.ClientSession() as session:
        expected = said(await ask(session, running.url, path, body))
        assert len(expected[1]) == 50
        asking = asyncio.create_task(ask(session, running.url, path, body))
        counts = running.router.cluster.num_in_flight
        while not any(counts().values()):
            await asyncio.sleep(0.001)
        owner = max(counts().items(), key=lambda each: each[1])[0]
        await asyncio.sleep(0.1)
        servers[owner].engine.lose()
        servers[owner].server.close()
        events = await asking
        assert said(events) == expected
        assert len({event["id"] for event in events}) == 1
        async with asyncio.timeout(10):
            while owner in running.router.cluster.statuses:
                await asyncio.sleep(0.01)


@pytest.mark.asyncio
async def test_tokens_are_of_the_prompt_and_not_of_the_engine_or_the_request() -> None:
    async with two() as (_, servers), aiohttp.ClientSession() as session:
        urls = [f"http://127.0.0.1:{each.server.port}" for each in servers.values()]
        body = body_of(COMPLETION, "tell me more", return_token_ids=True)
        first, second = [await ask(session, url, COMPLETION, body) for url in urls]
        assert said(first) == said(second)
        other = await ask(session, urls[0], COMPLETION, body_of(COMPLETION, "tell me less", return_token_ids=True))
        assert not set(said(first)[1]) & set(said(other)[1])
        prompt, ids = first[0]["choices"][0]["prompt_token_ids"], said(first)[1]
        rest = body_of(COMPLETION, prompt + ids[:20], max_tokens=30, return_token_ids=True)
        text, rest_ids, _, usage = said(await ask(session, urls[1], COMPLETION, rest))
        assert (rest_ids, usage["completion_tokens"]) == (ids[20:], 30)
        assert said(first)[0].endswith(text)


@pytest.mark.asyncio
async def test_ids_are_told_to_those_who_ask_only() -> None:
    async with two() as (_, servers), aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{servers['a'].server.port}"
        for path in (CHAT, COMPLETION):
            assert "token_ids" not in json.dumps(await ask(session, url, path, body_of(path, "tell me more")))
