"""A request may not claim what its key does not holder, and a key is nowhere to be found."""

import json
import logging
from typing import Any

import msgspec
import pytest
from tests.attack.wire import ALICE, BOB, CHAT, GOOD, OPERATOR, answer_to, error_to, get, keys_of_three, post

from rota.base.instant import Instant
from rota.serving.engines.engine import EngineCall
from rota.serving.frontdoor.exchange import HttpRequest
from rota.serving.frontdoor.http1 import HttpLimits
from rota.serving.frontdoor.intake import Intake
from rota.serving.frontdoor.keys import KeyFile, KeyRing
from rota.serving.frontdoor.problems import Problem
from rota.serving.frontdoor.serve import ServeConfig
from rota.testing.router import running_router

TENANT, OBJECTIVE, PRIORITY = "x-gateway-inference-fairness-id", "x-gateway-inference-objective", "x-vllm-priority"
RING = KeyRing(keys_of_three())
LONG = [{"role": "user", "content": "what everybody's prompt begins with, " * 40}]
START = '{"messages":[{"role":"user","content":"x"}],'


def call_of(key: str, *headers: str, raw: str | None = None, **fields: object) -> EngineCall:
    body = (json.dumps({**GOOD, **fields}) if raw is None else raw).encode()
    given = [("content-type", "application/json"), ("authorization", f"Bearer {key}")]
    given += [(name, value) for name, _, value in (header.partition(": ") for header in headers)]
    named = [(name.encode(), value.encode()) for name, value in given]
    holder = RING.identify(named)
    return Intake(name="t").read(HttpRequest("POST", CHAT, named, body), Instant(5), holder)


def refusal_of(key: str, *headers: str, raw: str | None = None, **fields: object) -> tuple[int, str | None]:
    with pytest.raises(Problem) as raised:
        call_of(key, *headers, raw=raw, **fields)
    return raised.value.status, raised.value.param


SPOOFS: dict[str, tuple[str, tuple[str, ...], dict[str, Any], str]] = {
    "another tenant": (ALICE, (f"{TENANT}: bob",), {}, TENANT),
    "another tenant in the body": (ALICE, (), {"vllm_xargs": {"tenant": "bob"}}, "vllm_xargs.tenant"),
    "no tenant in the body": (ALICE, (), {"vllm_xargs": {"tenant": None}}, "vllm_xargs.tenant"),
    "to have waited": (ALICE, (), {"vllm_xargs": {"waited_ms": 86_400_000}}, "vllm_xargs.waited_ms"),
    "a text that is another": (ALICE, (), {"vllm_xargs": {"text_counts": [1] * 13}}, "vllm_xargs.text_counts"),
    "a class above the ceiling": (ALICE, (), {"priority": -6}, "priority"),
    "a class above the default ceiling": (BOB, (), {"priority": -1}, "priority"),
    "a class by header": (BOB, (f"{PRIORITY}: -1",), {}, PRIORITY),
    "an objective": (BOB, (f"{OBJECTIVE}: 1",), {}, OBJECTIVE),
    "an objective over a modest class": (BOB, (f"{OBJECTIVE}: 1", f"{PRIORITY}: 3"), {"priority": 5}, OBJECTIVE),
    "blocks to pull": (ALICE, (), {"kv_transfer_params": {"do_remote_prefill": True}}, "kv_transfer_params"),
    "blocks, hidden": (ALICE, (), {"vllm_xargs": {"kv_transfer_params": "x"}}, "vllm_xargs.kv_transfer_params"),
}


@pytest.mark.parametrize("name", SPOOFS)
def test_what_a_key_does_not_grant_is_refused_and_named(name: str) -> None:
    key, headers, fields, spot = SPOOFS[name]
    assert refusal_of(key, *headers, **fields) == (403, spot)


def test_a_field_that_is_there_twice_or_in_disguise_reaches_the_engine_once() -> None:
    twice = START + '"priority":-9,"priority":-5,"cache_salt":"a","cache_salt":"b"}'
    sent = call_of(ALICE, raw=twice).body
    assert (sent.count(b'"priority"'), sent.count(b'"cache_salt"')) == (1, 1)
    assert json.loads(sent)["priority"] == -5
    disguised = START + '"kv\\u005ftransfer_params":{"remote_engine_id":"e"}}'
    assert refusal_of(ALICE, raw=disguised) == (403, "kv_transfer_params")
    behind = START + '"vllm_xargs":{"tenant":"alice","tenant":"bob"}}'
    assert refusal_of(ALICE, raw=behind) == (403, "vllm_xargs.tenant")


def test_what_is_granted_passes_with_the_tenant_of_the_key() -> None:
    headers = (f"{TENANT}: alice", f"{OBJECTIVE}: 5", "x-session-id: s")
    call = call_of(ALICE, *headers, vllm_xargs={"session_id": "t", "x": 1})
    assert (call.request.tenant, call.request.priority, call.request.session) == ("alice", -5, "alice/s")
    body = json.loads(call.body)
    assert body["vllm_xargs"] == {"session_id": "t", "x": 1, "tenant": "alice"}
    assert {name: body[name] for name in GOOD} == GOOD
    assert b"authorization" not in {name for name, _ in call.headers}


def test_nobody_finds_the_blocks_of_an_isolated_tenant() -> None:
    open_call, isolated = call_of(ALICE, messages=LONG), call_of(BOB, messages=LONG)
    assert "cache_salt" not in json.loads(open_call.body)
    salt = json.loads(isolated.body)["cache_salt"]
    assert not set(open_call.request.block_hashes) & set(isolated.request.block_hashes)
    assert call_of(BOB, messages=LONG).request.block_hashes == isolated.request.block_hashes, "his own he finds"
    guessed = call_of(ALICE, messages=LONG, cache_salt=salt)
    assert json.loads(guessed.body)["cache_salt"] != salt, "another's salt is no way in"
    assert not set(guessed.request.block_hashes) & set(isolated.request.block_hashes)
    both = [json.loads(call_of(key, cache_salt="s").body)["cache_salt"] for key in (ALICE, OPERATOR)]
    assert both[0] != both[1], "one salt of two tenants is two"


@pytest.mark.asyncio
async def test_the_door_knows_whom_it_lets_in_and_a_key_is_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    wrong, header, limits = "rota-nobodys", "authorization", HttpLimits(max_body_bytes=1024)
    async with running_router(num_simulated=1, serve=ServeConfig(port=0, keys=keys_of_three(), http=limits)) as running:
        port = running.router.door.server.port
        assert await error_to(port, post(GOOD, key=None)) == (401, header, "missing_api_key")
        basic = post(GOOD, "authorization: Basic eDp5", key=None)
        assert await error_to(port, basic) == (401, header, "missing_api_key")
        assert await error_to(port, post(GOOD, key=wrong)) == (401, header, "invalid_api_key")
        assert await error_to(port, post(GOOD, f"authorization: Bearer {BOB}")) == (401, header, "missing_api_key")
        assert await error_to(port, get("/v1/models")) == (401, header, "missing_api_key")
        # A stranger's body is not waited for, nor is it asked for.
        announced = post(b"", "expect: 100-continue", key=wrong).replace(b"content-length: 0", b"content-length: 900")
        status, headers, _ = await answer_to(port, announced)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert (await answer_to(port, post(GOOD)))[0] == 200
        assert (await answer_to(port, get("/v1/models", f"authorization: bearer {BOB}")))[0] == 200
        assert await error_to(port, post(GOOD, f"{TENANT}: bob")) == (403, TENANT, "not_granted")
        for page in ("/metrics", "/health"):
            assert (await answer_to(port, get(page)))[0] == 200, "from this machine"
            assert (await answer_to(port, get(page, f"authorization: Bearer {OPERATOR}")))[0] == 200
        assert await error_to(port, get("/metrics", f"authorization: Bearer {ALICE}")) == (403, None, "not_granted")
        assert await error_to(port, get("/metrics", "x-forwarded-for: 1.2.3.4")) == (403, None, "not_granted")
        told = json.loads((await answer_to(port, get("/health", "x-forwarded-for: 1.2.3.4")))[2])
        assert told == {"status": "ok", "num_ready": 1}
        shown = (await answer_to(port, get("/metrics")))[2].decode()
        rows = [msgspec.json.encode(row).decode() for row in running.journal.rows]
    assert rows
    for text in (caplog.text, shown, *rows, repr(running.config)):
        assert not any(key in text for key in (ALICE, BOB, OPERATOR, wrong))


@pytest.mark.asyncio
async def test_without_keys_nothing_is_asked_for_and_the_body_stays_as_it_is() -> None:
    async with running_router(num_simulated=1, serve=ServeConfig(port=0)) as running:
        port = running.router.door.server.port
        assert (await answer_to(port, post({**GOOD, "priority": -9}, f"{TENANT}: bob", key=None)))[0] == 200
        assert (await answer_to(port, get("/metrics", "x-forwarded-for: 1.2.3.4")))[0] == 200
    raw = START.encode() + b' "a":1,"a":2}'
    http = HttpRequest("POST", CHAT, [(b"content-type", b"application/json"), (b"authorization", b"Bearer x")], raw)
    call = Intake(name="t").read(http, Instant(5))
    assert call.body is raw
    assert (b"authorization", b"Bearer x") in call.headers


def test_a_ring_of_no_keys_lets_nobody_in() -> None:
    assert KeyRing(KeyFile()).find(b"") is None


def test_where_the_arguments_of_a_granted_body_end_is_known() -> None:
    call = call_of(ALICE, vllm_xargs={"mine": [1]}, unknown=2)
    assert json.loads(call.body[: call.num_arguments_bytes] + b"}") == {"vllm_xargs": {"mine": [1], "tenant": "alice"}}
    assert json.loads(call.body) == {**GOOD, "unknown": 2, "vllm_xargs": {"mine": [1], "tenant": "alice"}}
