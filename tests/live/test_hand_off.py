"""Requests that move between two unmodified vLLM engines while they run: every token as if they had stayed.

`ROTA_NUM_MOVES` (40) says how many; half by hand-off over NIXL, half by replay. float32, since in bfloat16 the make-up
of a batch alone changes tokens (`test_vllm_plugin.py`)."""

import asyncio
import os
import random
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from tests.live.vllm_pair import (
    Answer,
    body_of,
    complete,
    continuation,
    moved_by_hand_off,
    moved_by_replay,
    two_engines,
)

from rota.serving.engines.engine import RequestStays
from rota.serving.engines.vllm.engine import VllmEngine
from rota.serving.engines.vllm.tickets import Ticket
from rota.serving.model.request import RequestId

pytestmark = [pytest.mark.live, pytest.mark.asyncio(loop_scope="module")]

NUM_MOVES = int(os.environ.get("ROTA_NUM_MOVES", "40"))
MAX_TOKENS = 48
LONG = 240
"""Tokens of those that must be moved, so that an engine is not done before a client that stalled has read."""
ATTEMPTS = 5
"""And should it be done nevertheless, it is asked for again, so often in all."""
BLOCK_SIZE = 32
AT_ONCE = 6


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[list[VllmEngine]]:
    async with two_engines(tmp_path_factory.mktemp("pair"), max_model_len=512) as engines:
        yield engines


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def session(engines: list[VllmEngine]) -> AsyncIterator[aiohttp.ClientSession]:
    # A connection of its own for each request: an idle one may be closed by the server just as it is used again.
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as session:
        yield session


async def value(session: aiohttp.ClientSession, engine: VllmEngine, name: str) -> float:
    async with session.get(f"{engine.client.url}/metrics") as response:
        lines = [line for line in (await response.text()).splitlines() if line.startswith(name)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def test_moved_at_random_tokens_they_make_the_tokens_of_those_that_stayed(
    engines: list[VllmEngine], session: aiohttp.ClientSession
) -> None:
    """Several at once in both directions, so that each engine computes for others meanwhile; some share the beginning
    of their prompt with others, so that a destination holds part of their blocks already."""
    chance = random.Random(7)
    preamble = [chance.randrange(1000, 40000) for _ in range(70)]
    gate = asyncio.Semaphore(AT_ONCE)
    lefts: list[int] = []

    async def one(number: int) -> tuple[int, bool]:
        shared = preamble if number % 4 < 2 else []
        prompt = [*shared, *(chance.randrange(1000, 40000) for _ in range(chance.randrange(20, 110)))]
        body = body_of(prompt, MAX_TOKENS)
        source, destination = engines if number % 3 else engines[::-1]
        after = chance.randrange(1, MAX_TOKENS - 12)
        if number % 8 == 0:  # so that the token after next would be the first of a block
            after = (-len(prompt)) % BLOCK_SIZE or BLOCK_SIZE
        async with gate:
            stayed = await complete(session, source, f"stays-{number}", body)
            move = moved_by_hand_off if number % 2 == 0 else moved_by_replay
            moved = await move(session, source, destination, f"moves-{number}", body, after)
        assert len(stayed.tokens) == MAX_TOKENS
        if moved.ticket is not None:
            assert moved.ticket.kv_transfer_params is not None
            lefts.append((len(prompt) + moved.num_at_source - 1) % BLOCK_SIZE)
        return number, moved.tokens == stayed.tokens

    pulled = [await value(session, engine, "vllm:nixl_xfer_time_seconds_count") for engine in engines]
    results = await asyncio.gather(*(one(number) for number in range(NUM_MOVES)))
    assert [number for number, is_same in results if not is_same] == []
    pulled_since = [
        await value(session, engine, "vllm:nixl_xfer_time_seconds_count") - before
        for engine, before in zip(engines, pulled, strict=True)
    ]
    assert sum(pulled_since) == len(lefts)
    # Some may have ended before they were asked for, all that are under way if the machine stalls.
    assert len(lefts) > NUM_MOVES * 0.25
    assert min(pulled_since) > 0
    # The last token never lies alone at the beginning of a block, which the other engine could not pull.
    assert 0 not in lefts


async def there_and_back(engines: list[VllmEngine], session: aiohttp.ClientSession, body: dict[str, Any]) -> list[int]:
    """Its tokens, made at one engine, at the other, and at the first again. Raises `RequestStays`."""
    tokens: list[int] = []
    call, source = body, 0
    for name, after in (("there", 7), ("back", 12)):
        asked: list[asyncio.Task[Ticket]] = []

        def heard(answer: Answer, source: int = source, name: str = name, after: int = after, asked=asked) -> bool:
            if len(answer.tokens) >= after and not asked:
                asked.append(asyncio.create_task(engines[source].hand_off(RequestId(name))))
            return False

        answer = await complete(session, engines[source], name, call, heard)
        ticket = await asked[0]
        tokens += answer.tokens
        call, source = continuation(ticket, body), 1 - source
    return tokens + (await complete(session, engines[source], "home", call)).tokens


async def test_a_request_moves_there_and_back(engines: list[VllmEngine], session: aiohttp.ClientSession) -> None:
    body = body_of(list(range(2000, 2075)), LONG)
    stayed = await complete(session, engines[0], "twice-stays", body)
    for attempt in range(ATTEMPTS):
        try:
            tokens = await there_and_back(engines, session, body)
            break
        except RequestStays:
            assert attempt < ATTEMPTS - 1
    assert tokens == stayed.tokens


async def test_one_that_cannot_be_pulled_any_more_is_computed_anew(
    engines: list[VllmEngine], session: aiohttp.ClientSession
) -> None:
    """A ticket whose source is not there any more, one that does not fit the prompt, and one left unused."""
    body = body_of(list(range(3000, 3090)), LONG)
    stayed = await complete(session, engines[0], "lost-stays", body)
    ticket = None
    for attempt in range(ATTEMPTS):
        moved = await moved_by_hand_off(session, engines[0], engines[1], f"unused-{attempt}", body, 5, replay=True)
        assert moved.tokens == stayed.tokens
        ticket = moved.ticket
        if ticket is not None:
            break
    assert ticket is not None and ticket.kv_transfer_params is not None
    gone = {**ticket.kv_transfer_params, "remote_engine_id": "nobody", "remote_port": 1}
    short = {**ticket.kv_transfer_params, "remote_block_ids": [ticket.kv_transfer_params["remote_block_ids"][0][:-1]]}
    for name, params in (("gone", gone), ("short", short)):
        # Another prompt of the same length: this one's blocks are cached by now.
        other = body_of(list(range(5000 + len(name) * 100, 5090 + len(name) * 100)), LONG)
        expected = await complete(session, engines[0], f"{name}-stays", other)
        call = {**continuation(ticket, other), "kv_transfer_params": params}
        k = len(ticket.output_token_ids)
        call["prompt"] = [*other["prompt"], *expected.tokens[:k]]
        rest = await complete(session, engines[1], name, call)
        assert expected.tokens[:k] + rest.tokens == expected.tokens, name


async def test_blocks_come_back_and_those_that_stay_say_why(
    engines: list[VllmEngine], session: aiohttp.ClientSession
) -> None:
    with pytest.raises(RequestStays, match="not here"):
        await engines[0].hand_off(RequestId("nobody"))
    seeded = {**body_of(list(range(4000, 4050)), LONG), "seed": 3, "temperature": 0.7}
    asked: list[asyncio.Task[object]] = []

    def heard(answer: Answer) -> bool:
        if not asked:
            asked.append(asyncio.create_task(engines[0].hand_off(RequestId("seeded"))))
        return False

    for _ in range(ATTEMPTS):
        asked.clear()
        assert len((await complete(session, engines[0], "seeded", seeded, heard)).tokens) == LONG
        with pytest.raises(RequestStays) as stays:
            await asked[0]
        if "not here" not in str(stays.value) and "has ended" not in str(stays.value):
            break
    assert "its draws are seeded" in str(stays.value)
    # All that was pulled is free again, and what was never pulled is free when its lease has ended.
    async with asyncio.timeout(60):
        while any([await value(session, engine, "vllm:kv_cache_usage_perc") for engine in engines]):
            await asyncio.sleep(0.5)
