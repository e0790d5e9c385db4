"""Running streams that a policy moves between instances by replay, over and over: no client notices."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence, Set
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.worlds.test_router_failover import ask, assert_whole, body_of, without_created

from rota.base.journal import Journal
from rota.runtime.clocks import SystemClock
from rota.runtime.live import LiveLoop
from rota.serving.api import NOTHING, ClusterView, EngineCapabilities, InstanceId, MigrationPolicy, Move, RequestId
from rota.serving.assemble import SystemConfig, header_of
from rota.serving.cluster.machine import ClusterMachine
from rota.serving.frontdoor.serve import Router, ServeConfig
from rota.serving.live.watch import WatchSettings
from rota.serving.model.commands import Migrate
from rota.serving.policies.admission.bounded_queue import BoundedQueue
from rota.serving.policies.dispatch.round_robin import RoundRobin
from rota.serving.policies.migration.drain import Drain
from rota.testing.token_server import (
    KINDS,
    Break,
    TokenServer,
    begins_character,
    prompt_ids,
    said,
    token_engines,
)


class Shuttle:
    """Everything moves to the next instance, all the time. What runs, it is told: these engines do not report it."""

    requires: EngineCapabilities = NOTHING
    interval_seconds = 0.01

    def __init__(self) -> None:
        self.router: Router | None = None

    def plan(self, cluster: ClusterView, moving: Set[RequestId]) -> Sequence[Move]:
        assert self.router is not None
        ids = [view.id for view in cluster.instances]
        moves = []
        for request_id, flight in self.router.cluster.flights.items():
            if flight.attempt is not None and flight.attempt.instance_id in ids and request_id not in moving:
                source = flight.attempt.instance_id
                moves.append(
                    Move(request_id, source, InstanceId(ids[(ids.index(source) + 1) % len(ids)]), "to and fro")
                )
        return moves


@asynccontextmanager
async def shuttled(
    breaks: Iterable[Break | None] = (),
    policy: MigrationPolicy | None = None,
    *,
    hand_off: bool = False,
    moves_by_itself: bool = True,
) -> AsyncIterator[tuple[Router, list[TokenServer], Journal]]:
    """A router over three servers, whose streams `policy` moves; without one, all of them, all the time, unless nothing
    is to move by itself."""
    left = list(breaks)
    servers = [TokenServer(left, created=1 + index, pace=0.004) for index in range(3)]
    policy = Shuttle() if policy is None and moves_by_itself else policy
    machine = ClusterMachine(RoundRobin(), BoundedQueue(), migration=policy)
    journal = Journal(header_of(SystemConfig()), keep_rows=True)
    watch = WatchSettings(interval_seconds=0.05, starting_interval_seconds=0.01)
    engines = await token_engines(servers, probe_timeout_seconds=1.0, hand_off=hand_off)
    router = Router(ServeConfig(port=0, watch=watch), LiveLoop(SystemClock(), journal), machine, engines)
    if isinstance(policy, Shuttle):
        policy.router = router
    async with settling(router, servers):
        yield router, servers, journal


@asynccontextmanager
async def settling(router: Router, servers: Sequence[TokenServer]) -> AsyncIterator[None]:
    """Run a router, and find nothing left over at its end."""
    try:
        async with router:
            await router.wait_ready(len(servers), timeout_seconds=10.0)
            yield
            router.cluster.machine.check()
            assert not router.cluster.flights
            moves = router.cluster.moves
            assert not moves._begun and not moves._on_their_way and not moves._letting_go and not moves._handed_over
    finally:
        for server in servers:
            server.die()


class _Running:
    def __init__(self, router: Router) -> None:
        self.url = router.url


async def ask_router(router: Router, body: dict[str, Any]) -> tuple[str, bytes]:
    return await ask(_Running(router), body)  # type: ignore[arg-type]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.asyncio
async def test_a_stream_that_is_moved_all_the_time_is_whole(chat: bool) -> None:
    bodies = [body_of(chat=chat, max_tokens=30 + index, stream_options={"include_usage": True}) for index in range(4)]
    async with shuttled() as (router, _, journal):
        answers = await asyncio.gather(*(ask_router(router, body) for body in bodies))
        counts = router.cluster.machine.migration_counts()  # type: ignore[attr-defined]
    for body, (request_id, raw) in zip(bodies, answers, strict=True):
        assert_whole(without_created(raw), body, request_id)
    assert counts.num_committed >= 4, counts
    assert counts.downtime > 0
    assert any(isinstance(command, Migrate) for row in journal.rows for command in row.commands)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("lump_size", [2, 3])
@pytest.mark.asyncio
async def test_a_stream_of_several_tokens_an_event_moves_from_whole_characters_only(chat: bool, lump_size: int) -> None:
    """The text of such an event does not say whether its last token begins a character. Ids are told once, too."""
    extra: dict[str, Any] = {"stream_options": {"include_usage": True}}
    bodies = [body_of(chat=chat, max_tokens=50 + index, **extra) for index in range(3)]
    bodies.append(body_of(chat=chat, max_tokens=60, return_token_ids=True, **extra))
    async with shuttled() as (router, servers, _):
        for server in servers:
            server.lump_size = lump_size
        answers = await asyncio.gather(*(ask_router(router, body) for body in bodies))
        assert router.cluster.machine.migration_counts().num_committed >= 4
        assert any(begins_character(prompt_ids(body)[-1]) for server in servers for body in server.bodies) is False
    for body, (_, raw) in zip(bodies, answers, strict=True):
        events = [json.loads(event[6:]) for event in raw.split(b"\n\n") if b"{" in event]
        choices = [choice for event in events for choice in event["choices"]]
        tokens = list(said(body))
        text = "".join((choice.get("delta") or choice).get("content", choice.get("text")) or "" for choice in choices)
        assert text == "".join(text for _, text, _ in tokens)
        assert events[-1]["usage"]["completion_tokens"] == len(tokens)
        if body.get("return_token_ids"):
            told = [token for choice in choices for token in choice.get("token_ids") or ()]
            assert told == [token for token, _, _ in tokens]


@pytest.mark.asyncio
async def test_moves_that_break_lose_nothing() -> None:
    """Half of all streams break at some event, at destinations too, from where they go back to their sources."""
    bodies = [body_of(chat=index % 2 == 0, max_tokens=24) for index in range(6)]
    breaks = [Break(index % 5, KINDS[index % len(KINDS)]) if index % 2 else None for index in range(80)]
    async with shuttled(breaks) as (router, _, _journal):
        answers = await asyncio.gather(*(ask_router(router, body) for body in bodies))
        counts = router.cluster.machine.migration_counts()  # type: ignore[attr-defined]
    num_whole = 0
    for body, (request_id, raw) in zip(bodies, answers, strict=True):
        if b'"error"' not in raw:
            assert_whole(without_created(raw), body, request_id)
            num_whole += 1
    assert num_whole >= 4, "more than three failures of one stream are its end"
    assert sum(counts.num_aborted.values()) > 0, counts


@pytest.mark.asyncio
async def test_clients_that_leave_while_they_are_moved_leave_nothing_behind() -> None:
    body = body_of(max_tokens=400)
    async with shuttled() as (router, servers, _):
        for delay in (0.02, 0.03, 0.05, 0.08):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ask_router(router, body), delay)
        async with asyncio.timeout(5):
            while sum(server.num_dropped for server in servers) < sum(server.num_posts for server in servers):
                await asyncio.sleep(0.01)


@pytest.mark.asyncio
async def test_an_instance_that_drains_is_emptied_by_a_policy_that_the_router_tells_who_runs() -> None:
    bodies = [body_of(chat=index % 2 == 0, max_tokens=400) for index in range(6)]
    async with shuttled(policy=Drain(interval_seconds=0.01)) as (router, _, _journal):
        cluster = router.cluster
        asked = [asyncio.create_task(ask_router(router, body)) for body in bodies]
        async with asyncio.timeout(10):
            while sum(flight.resumption is not None for flight in cluster.flights.values()) < len(bodies):
                await asyncio.sleep(0.01)
        drained = InstanceId(min(cluster.num_in_flight()))
        assert cluster.num_in_flight()[drained] == 2
        cluster.drain(drained)
        async with asyncio.timeout(10):
            while cluster.num_in_flight()[drained]:
                await asyncio.sleep(0.01)
        assert not any(task.done() for task in asked), "it was emptied by waiting"
        answers = await asyncio.gather(*asked)
        assert cluster.machine.migration_counts().num_committed == 2
    for body, (request_id, raw) in zip(bodies, answers, strict=True):
        assert_whole(without_created(raw), body, request_id)


@pytest.mark.asyncio
async def test_policies_are_told_of_those_who_stay_as_well() -> None:
    """A stream with a seed cannot move; left out, its instance would look free."""
    bodies = [body_of(max_tokens=300, **stays) for stays in ({}, {"seed": 1, "temperature": 0.5}) for _ in range(3)]
    async with shuttled(policy=Drain()) as (router, _, _journal):
        cluster = router.cluster
        asked = [asyncio.create_task(ask_router(router, body)) for body in bodies]

        def told() -> set[RequestId]:
            return {each.request_id for view in cluster.machine.instance_views() for each in view.running}

        async with asyncio.timeout(10):
            while len(cluster.flights) < len(bodies) or told() != set(cluster.flights):
                await asyncio.sleep(0.01)
        assert sum(flight.resumption is None for flight in cluster.flights.values()) == 3
        await asyncio.gather(*asked)
