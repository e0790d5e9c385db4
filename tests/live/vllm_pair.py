"""Two vLLM engines that can hand requests to each other, and requests that are moved between them: no test itself."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from rota.base.errors import EngineError
from rota.base.instant import Instant
from rota.serving.engines.engine import EngineCall, RequestStays
from rota.serving.engines.managed import free_port
from rota.serving.engines.model_package import prepare_model
from rota.serving.engines.process import ProcessSpec
from rota.serving.engines.vllm.engine import VllmEngine
from rota.serving.engines.vllm.server import VllmServer
from rota.serving.engines.vllm.tickets import Ticket
from rota.serving.live.resumption import Resumption
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import Request, RequestId

START_TIMEOUT_SECONDS = 600.0
MODEL = "smollm2-135m"


@asynccontextmanager
async def two_engines(folder: Path, **settings: Any) -> AsyncIterator[list[VllmEngine]]:
    """Started one after the other, each on a core of its own, and stopped whatever happens."""
    engines: list[VllmEngine] = []
    try:
        for index in range(2):
            server = VllmServer(
                model=prepare_model(),
                port=free_port(),
                served_model_name=MODEL,
                facts=folder / f"{index}.facts",
                control=folder / f"{index}.sock",
                nixl_port=free_port(),
                cores=str(index % (os.cpu_count() or 1)),
                **{"dtype": "float32", "max_num_seqs": 8, **settings},
            )
            process = ProcessSpec(
                name=f"vllm-{index}",
                command=tuple(server.command()),
                log_path=str(folder / f"{index}.log"),
                env=dict(server.environment()),
            )
            assert server.facts is not None
            engine = VllmEngine(
                InstanceId(f"vllm-{index}"),
                server.url,
                process,
                server.facts,
                control=server.control,
                capabilities=server.capabilities,
            )
            engines.append(engine)
            await engine.start()
            await _ready(engine)
        yield engines
    finally:
        for engine in engines:
            await engine.stop()


async def _ready(engine: VllmEngine) -> None:
    async with asyncio.timeout(START_TIMEOUT_SECONDS):
        while True:
            try:
                await engine.probe()
                return
            except EngineError:
                assert engine.process.given_up is None, engine.process.given_up
                await asyncio.sleep(0.5)


@dataclass
class Answer:
    """The tokens of one answer as they came, and when (seconds of the loop's clock)."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    finish_reason: str | None = None


Heard = Callable[[Answer], bool]
"""Called after each token; True hangs up."""


async def complete(
    session: aiohttp.ClientSession,
    engine: VllmEngine,
    request_id: str,
    body: dict[str, Any],
    heard: Heard = lambda answer: False,
) -> Answer:
    """Stream one completion. Raises `AssertionError` with the server's words if it refuses."""
    answer = Answer()
    clock = asyncio.get_running_loop().time
    async with session.post(
        f"{engine.client.url}/v1/completions", json=body, headers={"X-Request-Id": request_id}
    ) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            choice = json.loads(line[6:])["choices"][0]
            for token in choice["token_ids"] or ():
                answer.tokens.append(token)
                answer.times.append(clock())
            answer.finish_reason = choice["finish_reason"] or answer.finish_reason
            if heard(answer):
                break
    return answer


def body_of(prompt: list[int], max_tokens: int) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


def continuation(ticket: Ticket, body: dict[str, Any], *, replay: bool = False) -> dict[str, Any]:
    """What the next engine is asked, as the router makes it."""
    request = Request(RequestId(ticket.request_id), Instant(0), 1, 1)
    resumption = Resumption(EngineCall(request, "/v1/completions", [], json.dumps(body).encode(), stream=True))
    resumption.prompt_token_ids = list(ticket.prompt_token_ids)
    resumption.output_token_ids = list(ticket.output_token_ids)
    going_on: dict[str, Any] = json.loads(resumption.next_call(None if replay else ticket).body)
    return going_on


@dataclass
class Move:
    """What came of one request that was moved."""

    tokens: list[int]
    num_at_source: int
    """Output tokens that its source made."""
    ticket: Ticket | None
    down_seconds: float
    """From the last token of the source to the first of the destination, as the client sees it."""


async def moved_by_hand_off(
    session: aiohttp.ClientSession,
    source: VllmEngine,
    destination: VllmEngine,
    request_id: str,
    body: dict[str, Any],
    after: int,
    *,
    replay: bool = False,
) -> Move:
    """Ask for the hand-off when `after` tokens have come. Without a ticket if the request had ended by then."""
    asked: list[asyncio.Task[Ticket]] = []

    def heard(answer: Answer) -> bool:
        if not asked and len(answer.tokens) >= after:
            asked.append(asyncio.create_task(source.hand_off(RequestId(request_id))))
        return False

    at_source = await complete(session, source, request_id, body, heard)
    try:
        ticket = await asked[0]
    except RequestStays:
        # Tokens reach a client after they are made: on a busy machine the engine may have made the last one by now.
        assert len(at_source.tokens) == body["max_tokens"]
        return Move(at_source.tokens, len(at_source.tokens), None, 0.0)
    assert list(ticket.prompt_token_ids) == body["prompt"]
    assert list(ticket.output_token_ids) == at_source.tokens
    assert at_source.finish_reason == "length"
    rest = await complete(session, destination, f"{request_id}-b", continuation(ticket, body, replay=replay))
    down_seconds = rest.times[0] - at_source.times[-1]
    return Move(at_source.tokens + rest.tokens, len(at_source.tokens), ticket, down_seconds)


async def moved_by_replay(
    session: aiohttp.ClientSession,
    source: VllmEngine,
    destination: VllmEngine,
    request_id: str,
    body: dict[str, Any],
    after: int,
) -> Move:
    """Hang up after `after` tokens and submit all tokens elsewhere: what any engine can do."""
    at_source = await complete(session, source, request_id, body, lambda answer: len(answer.tokens) >= after)
    left = body["max_tokens"] - len(at_source.tokens)
    again = {**body, "prompt": [*body["prompt"], *at_source.tokens], "max_tokens": left}
    rest = await complete(session, destination, f"{request_id}-b", again)
    down_seconds = rest.times[0] - at_source.times[-1]
    return Move(at_source.tokens + rest.tokens, len(at_source.tokens), None, down_seconds)
