"""Running streams that go from one server to another with their blocks: no client notices, whatever comes between."""

import asyncio
import random
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.worlds.test_router_failover import assert_whole, body_of, without_created
from tests.worlds.test_router_moves import ask_router, shuttled

from rota.base.journal import Journal
from rota.serving.frontdoor.serve import Router
from rota.serving.model.commands import Migrate, Way
from rota.testing.token_server import HABITS, KINDS, LEAK, Break, TokenServer


def ways(journal: Any) -> set[Way]:
    return {command.way for row in journal.rows for command in row.commands if isinstance(command, Migrate)}


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.asyncio
async def test_a_stream_that_is_handed_over_all_the_time_is_whole(chat: bool) -> None:
    """Characters that begin with the last token of a part are among them: the next server gets fewer tokens, and is to
    pull fewer blocks."""
    usage = {"include_usage": True}
    bodies = [body_of(chat=chat, max_tokens=60 + index, stream_options=usage) for index in range(4)]
    async with shuttled(hand_off=True) as (router, servers, journal):
        answers = await asyncio.gather(*(ask_router(router, body) for body in bodies))
        counts = router.cluster.machine.migration_counts()  # type: ignore[attr-defined]
    for body, (request_id, raw) in zip(bodies, answers, strict=True):
        assert_whole(without_created(raw), body, request_id)
        assert LEAK.encode() not in raw
    assert ways(journal) == {Way.HAND_OFF}
    assert not any(server.misfits for server in servers)
    assert sum(server.num_pulled for server in servers) >= counts.num_committed >= 4, counts
    assert counts.num_bytes > 0
    assert counts.downtime > 0


@settings(deadline=None, max_examples=20)
@given(
    habits=st.lists(st.sampled_from(HABITS), max_size=12),
    faults=st.lists(st.none() | st.builds(Break, st.integers(0, 30), st.sampled_from(KINDS)), max_size=3),
    max_tokens=st.integers(1, 60),
    chat=st.booleans(),
    wants_ids=st.booleans(),
)
def test_whatever_an_engine_does_when_it_is_asked_no_token_is_lost_or_doubled(
    habits: list[str], faults: list[Break | None], max_tokens: int, chat: bool, wants_ids: bool
) -> None:
    extra = {"return_token_ids": True} if wants_ids else {}
    bodies = [
        body_of(chat=chat, max_tokens=max_tokens, **extra),
        body_of(chat=not chat, max_tokens=30, stream_options={"include_usage": True}),
    ]

    assert_nothing_lost(shuttled(faults, hand_off=True), habits, len(faults), bodies)


def assert_nothing_lost(
    running: AbstractAsyncContextManager[tuple[Router, list[TokenServer], Journal]],
    habits: list[str],
    num_faults: int,
    bodies: list[dict[str, Any]],
) -> None:
    """Ask a router over servers with these habits all at once: every answer is whole, or was broken too often."""

    async def run() -> list[tuple[str, bytes]]:
        async with running as (router, servers, _):
            for server in servers:
                server.habits = list(habits)
            async with asyncio.timeout(30):
                answers = await asyncio.gather(*(ask_router(router, body) for body in bodies))
            assert not any(server.misfits for server in servers)
            return answers

    for body, (request_id, raw) in zip(bodies, asyncio.run(run()), strict=True):
        assert LEAK.encode() not in raw
        if b'"error"' not in raw:
            assert_whole(without_created(raw), body, request_id)
        else:
            # Each break and each stream that its server broke off counts; three resumptions are all that there are.
            assert num_faults + habits.count("hang_up") * 3 >= 3


@pytest.mark.asyncio
async def test_clients_that_leave_while_they_are_handed_over_leave_nothing_behind() -> None:
    body = body_of(max_tokens=400)
    chance = random.Random(3)
    async with shuttled(hand_off=True) as (router, servers, _):
        for server in servers:
            server.habits = [chance.choice(HABITS) for _ in range(30)]
        for delay in (0.02, 0.03, 0.05, 0.08, 0.13):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ask_router(router, body), delay)
        async with asyncio.timeout(5):
            while router.cluster.flights or any(server._leaving for server in servers):
                await asyncio.sleep(0.01)
