"""A tenant beyond its limits is told so, and when to come back; the others do not notice."""

import asyncio
import json

import pytest
from tests.attack.wire import ALICE, BOB, GOOD, answer_to, keys_of_three, post

from rota.serving.frontdoor.keys import TenantTerms, granted_stack
from rota.serving.frontdoor.serve import ServeConfig
from rota.serving.stack import StackConfig
from rota.testing.router import running_router

LIMITED = StackConfig(admission="tenant_limits")


@pytest.mark.asyncio
async def test_a_tenant_beyond_its_tokens_is_refused_with_the_time_to_come_back() -> None:
    keys = keys_of_three(alice=TenantTerms(tokens_per_minute=1000))
    stack = granted_stack(LIMITED, keys)
    async with running_router(num_simulated=1, stack=stack, serve=ServeConfig(port=0, keys=keys)) as running:
        port = running.router.door.server.port
        long = {**GOOD, "max_tokens": 900}
        flood = [asyncio.create_task(answer_to(port, post(long))) for _ in range(8)]
        first, *more = await asyncio.gather(*flood)
        refused = [answer for answer in (first, *more) if answer[0] != 200]
        assert refused, "two of these are more than a minute's worth"
        for status, headers, body in refused:
            assert status == 429
            assert 1 <= int(headers["retry-after"]) <= 60
            assert json.loads(body)["error"]["code"] == "rejected"
            assert "1000 tokens per minute" in json.loads(body)["error"]["message"]
        assert (await answer_to(port, post(long, key=BOB)))[0] == 200
        for never in (post({**GOOD, "max_tokens": 2_000_000}), post({**GOOD, "max_tokens": 2_000_000}, key=BOB)):
            status, headers, _ = await answer_to(port, never)
            assert (status, "retry-after" in headers) == (400, False)


@pytest.mark.asyncio
async def test_a_tenant_that_asked_to_be_queued_is_served_in_its_time() -> None:
    keys = keys_of_three(alice=TenantTerms(tokens_per_minute=60_000, on_limit="queue"))
    stack = granted_stack(LIMITED, keys)
    async with running_router(num_simulated=1, stack=stack, serve=ServeConfig(port=0, keys=keys)) as running:
        port = running.router.door.server.port
        first, later = {**GOOD, "max_tokens": 59_900}, {**GOOD, "max_tokens": 200}
        answers = await asyncio.gather(*(answer_to(port, post(body)) for body in (first, later, later)))
        assert {status for status, _, _ in answers} == {200}


def test_limits_are_not_lost_where_no_policy_looks_at_them() -> None:
    from rota.base.errors import ConfigError

    keys = keys_of_three(alice=TenantTerms(tokens_per_minute=1000))
    with pytest.raises(ConfigError, match="limits of its own"):
        granted_stack(StackConfig(), keys)
    assert ALICE not in repr(granted_stack(LIMITED, keys))


@pytest.mark.asyncio
async def test_a_router_promises_or_refuses_by_the_targets_of_the_headers() -> None:
    stack = StackConfig(admission="deadline_admission", batch="stall_free_chunks")
    async with running_router(num_simulated=2, stack=stack, serve=ServeConfig(port=0)) as running:
        port = running.router.door.server.port
        assert (await answer_to(port, post(GOOD, "x-slo-ttft-ms: 5000", "x-slo-tpot-ms: 1000", key=None)))[0] == 200
        for header, words in (
            ("x-slo-ttft-ms: 1", "0.001 s is the target"),
            ("x-slo-tpot-ms: 1", "1 ms is the target"),
        ):
            status, headers, body = await answer_to(port, post(GOOD, header, key=None))
            assert (status, "retry-after" in headers) == (400, False)
            assert words in json.loads(body)["error"]["message"]
