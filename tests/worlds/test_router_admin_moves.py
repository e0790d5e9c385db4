"""Running requests that are moved by command, and what the router says of it."""

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from tests.worlds.test_router_failover import assert_whole, body_of, without_created
from tests.worlds.test_router_moves import ask_router, shuttled

from rota.base.replay import replay
from rota.serving.cluster.machine import ClusterMachine
from rota.serving.frontdoor.serve import Router
from rota.serving.policies.admission.bounded_queue import BoundedQueue
from rota.serving.policies.dispatch.round_robin import RoundRobin
from rota.serving.policies.migration.drain import Drain


async def migrate(router: Router, request_id: str, body: object, **headers: str) -> tuple[int, dict[str, Any]]:
    url = f"{router.url}/admin/requests/{request_id}/migrate"
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with aiohttp.ClientSession() as session, session.post(url, data=raw, headers=headers) as answer:
        return answer.status, await answer.json()


async def begun(router: Router) -> str:
    """The id of the one request that is under way, once its tokens come."""
    async with asyncio.timeout(10):
        while True:
            for request_id, flight in router.cluster.flights.items():
                if flight.resumption is not None and flight.resumption.output_token_ids:
                    return str(request_id)
            await asyncio.sleep(0.005)


async def page(router: Router) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"{router.url}/metrics") as answer:
        return await answer.text()


@pytest.mark.asyncio
async def test_a_request_is_moved_by_command_in_the_way_that_was_asked_for() -> None:
    body = body_of(max_tokens=300)
    async with shuttled(policy=Drain(), hand_off=True) as (router, servers, journal):
        asking = asyncio.create_task(ask_router(router, body))
        request_id = await begun(router)
        for way, destination in (("hand_off", "http-1"), ("replay", "http-2"), (None, "http-0")):
            order = {"destination": destination} | ({"way": way} if way else {})
            status, told = await migrate(router, request_id, order)
            assert (status, told["outcome"], told["destination"]) == (200, "committed", destination), told
            assert told["way"] == (way or "hand_off")
            assert told["downtime_seconds"] > 0
            assert (told["num_bytes"] > 0) is (told["way"] == "hand_off")
            assert str(router.cluster.machine.owner(request_id)) == destination  # type: ignore[arg-type]
        said = await page(router)
        answer = await asking
        fresh = ClusterMachine(RoundRobin(), BoundedQueue(), migration=Drain())
    assert_whole(without_created(answer[1]), body, answer[0])
    assert sum(server.num_pulled for server in servers) == 2
    assert 'rota:migrations_total{outcome="committed",way="hand_off"} 2.0' in said
    assert 'rota:migrations_total{outcome="committed",way="replay"} 1.0' in said
    assert 'rota:migration_downtime_seconds_count{way="hand_off"} 2.0' in said
    assert 'rota:migration_bytes_total{way="hand_off"}' in said
    difference = replay(journal.rows, {"cluster": fresh})
    assert difference is None, str(difference)


@pytest.mark.asyncio
async def test_without_a_migration_policy_it_moves_all_the_same_and_is_given_up_in_time() -> None:
    async with shuttled(policy=None, hand_off=True, moves_by_itself=False) as (router, servers, _):
        asking = asyncio.create_task(ask_router(router, body := body_of(max_tokens=300)))
        request_id = await begun(router)
        status, told = await migrate(router, request_id, {"destination": "http-1"})
        assert (status, told["outcome"]) == (200, "committed")
        servers[1].habits = ["stays"]
        status, told = await migrate(router, request_id, {"destination": "http-2"})
        assert (status, told["outcome"], told["reason"]) == (200, "aborted", "it stays")
        assert str(router.cluster.machine.owner(request_id)) == "http-1"  # type: ignore[arg-type]
        answer = await asking
    assert_whole(without_created(answer[1]), body, answer[0])


@pytest.mark.asyncio
async def test_what_cannot_be_moved_is_refused_with_its_reason() -> None:
    async with shuttled(policy=Drain()) as (router, _, _journal):
        asking = asyncio.create_task(ask_router(router, body_of(max_tokens=200)))
        request_id = await begun(router)
        source = str(router.cluster.machine.owner(request_id))  # type: ignore[arg-type]
        other = next(str(name) for name in router.cluster.engines if name != source)
        wanted: list[tuple[str, object, int, str]] = [
            (request_id, {"destination": source}, 409, "request_stays"),
            (request_id, {"destination": other, "way": "hand_off"}, 409, "request_stays"),
            (request_id, {"destination": "http-9"}, 404, "unknown_instance"),
            ("nobody", {"destination": other}, 404, "unknown_request"),
            (request_id, {"destination": other, "way": "copy"}, 400, "invalid_type"),
            (request_id, {"destination": other, "why": "so"}, 400, "invalid_type"),
            (request_id, b"", 400, "missing_body"),
            (request_id, b"{", 400, "malformed_json"),
        ]
        for name, order, status, code in wanted:
            got, told = await migrate(router, name, order)
            assert (got, told["error"]["code"]) == (status, code), told
        assert (await migrate(router, request_id, {"destination": other}, Via="1.1 x"))[0] == 403
        assert (await migrate(router, f"{request_id}/no", {"destination": other}))[0] == 404
        await asking
        seeded = asyncio.create_task(ask_router(router, body_of(max_tokens=100, seed=1, temperature=0.5)))
        async with asyncio.timeout(10):
            while not router.cluster.flights:
                await asyncio.sleep(0.005)
        got, told = await migrate(router, next(iter(router.cluster.flights)), {"destination": other})
        assert (got, told["error"]["code"]) == (409, "request_stays")
        await seeded


@pytest.mark.asyncio
async def test_an_order_is_answered_also_when_its_request_ends_meanwhile() -> None:
    async with shuttled(policy=Drain(), hand_off=True) as (router, servers, _):
        for server in servers:
            server.habits = ["silent", "hang_up", "silent"]
        asking = asyncio.create_task(ask_router(router, body_of(max_tokens=300)))
        request_id = await begun(router)
        source = str(router.cluster.machine.owner(request_id))  # type: ignore[arg-type]
        other = next(str(name) for name in router.cluster.engines if name != source)
        for _ in range(2):
            status, told = await migrate(router, request_id, {"destination": other})
            assert (status, told["outcome"]) == (200, "aborted"), told
            assert told["reason"]
        await asking
