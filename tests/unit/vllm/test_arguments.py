"""What a vLLM is told of a request beside the client's body, and what the scheduler inside it reads."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rota.base.instant import Duration, Instant, milliseconds
from rota.serving.engines.engine import EngineCall
from rota.serving.engines.vllm.arguments import Arguments, read_arguments, with_arguments
from rota.serving.frontdoor.claims import granted_body
from rota.serving.frontdoor.keys import KeyHolder, TenantTerms
from rota.serving.live.resumption import Resumption
from rota.serving.model.request import DEFAULT_TENANT, SLO, Request, RequestId, TenantId
from rota.serving.model.text_counts import TEXT_COUNTS

NAMES = st.sampled_from(["tenant", "slo_ttft_ms", "slo_tpot_ms", "waited_ms", "mine"])
TARGETS = st.none() | st.integers(1, 86_400_000).map(milliseconds)


def call(body: bytes, tenant: str = DEFAULT_TENANT, slo: SLO | None = None, waited: int = 0) -> EngineCall:
    request = Request(RequestId("r"), Instant(0), 1, 1, tenant=TenantId(tenant), slo=slo or SLO())
    return EngineCall(request, "/v1/completions", [], body, False, waited=Duration(waited))


@given(
    tenant=st.sampled_from([DEFAULT_TENANT, "a", 'quoted " and more']),
    ttft=TARGETS,
    tpot=TARGETS,
    waited=st.just(0) | st.integers(1, 10**12),
    theirs=st.none() | st.dictionaries(NAMES, st.integers(0, 9) | st.text(max_size=3)),
    prompt=st.sampled_from(["hi", 'says "vllm_xargs": {', "{"]),
)
def test_the_engine_reads_what_the_router_knows_and_the_rest_stays(
    tenant: str, ttft: Duration | None, tpot: Duration | None, waited: int, theirs: dict[str, Any] | None, prompt: str
) -> None:
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 3}
    if theirs is not None:
        body["vllm_xargs"] = theirs
    raw = b" \n" + json.dumps(body).encode()
    asked = call(raw, tenant, SLO(ttft, tpot), waited)
    if theirs is None:
        asked = msgspec.structs.replace(asked, has_arguments=False)
    told = json.loads(b"".join(with_arguments(asked)))
    extra = told.pop("vllm_xargs", {})
    assert told == {"prompt": prompt, "max_tokens": 3}
    read = read_arguments(extra)
    if tenant != DEFAULT_TENANT:
        assert read.tenant == tenant
    for mine, its in ((ttft, read.slo.ttft), (tpot, read.slo.tpot), (waited or None, read.waited)):
        assert mine is None or its == pytest.approx(mine, abs=1000)
    for name, value in (theirs or {}).items():
        if name == "mine":
            assert extra[name] == value


def test_what_was_counted_of_a_text_arrives_whole_or_not_at_all() -> None:
    counts = tuple(range(len(TEXT_COUNTS)))
    asked = call(b'{"prompt": "x"}')
    asked = msgspec.structs.replace(asked, request=msgspec.structs.replace(asked.request, text_counts=counts))
    extra = json.loads(b"".join(with_arguments(asked)))["vllm_xargs"]
    assert read_arguments(extra).text_counts == counts
    for value in (counts[1:], "no", [-1, *counts[1:]], [True, *counts[1:]], [2**31, *counts[1:]], [[], *counts[1:]]):
        assert read_arguments({"text_counts": value}) == Arguments()


def test_a_body_with_nothing_to_be_told_is_not_touched() -> None:
    raw = b'{ "prompt":"x" , "vllm_xargs": null }'
    assert with_arguments(call(raw)) == (b"", raw)
    assert with_arguments(call(raw))[1] is raw


@given(
    terms=st.builds(TenantTerms, isolate_cache=st.booleans()),
    theirs=st.none()
    | st.dictionaries(st.sampled_from(["mine", "a b", "ü", "tenants"]), st.text(max_size=3) | st.none()),
    first=st.booleans(),
    waited=st.just(0) | st.integers(10**6, 10**12),
    asks_for_ids=st.booleans(),
)
def test_what_a_key_granted_is_told_more_without_a_look_at_the_rest(
    terms: TenantTerms, theirs: dict[str, Any] | None, first: bool, waited: int, asks_for_ids: bool
) -> None:
    rest = {"prompt": 'says "vllm_xargs": {', "max_tokens": 3, "stream": True}
    own = {"vllm_xargs": theirs}
    raw = json.dumps({**own, **rest} if first else {**rest, **own}).encode()
    body, num_arguments_bytes = granted_body(raw, KeyHolder(TenantId("alice"), terms), None)
    asked = call(body, "alice", SLO(milliseconds(5)), waited)
    fast = msgspec.structs.replace(asked, num_arguments_bytes=num_arguments_bytes)
    if asks_for_ids:
        asked, fast = Resumption(asked).first_call(), Resumption(fast).first_call()
        assert fast.num_arguments_bytes == num_arguments_bytes
    slow_parts, parts = with_arguments(asked), with_arguments(fast)
    told = json.loads(b"".join(parts))
    assert told == json.loads(b"".join(slow_parts))
    assert told == {**rest, "vllm_xargs": told["vllm_xargs"]} | ({"return_token_ids": True} if asks_for_ids else {})
    assert {**(theirs or {}), "tenant": "alice"}.items() <= told["vllm_xargs"].items()
    assert isinstance(parts[1], memoryview), "a large one is not copied"
    assert parts[1].obj is fast.body


def test_a_call_that_is_written_anew_for_another_engine_is_told_anew() -> None:
    raw = rb'{"prompt":"x","max_tokens":9,"vllm_xargs":{"mine":"\u00e9\u00e9"}}'
    body, num_arguments_bytes = granted_body(raw, KeyHolder(TenantId("a"), TenantTerms()), None)
    asked = msgspec.structs.replace(call(body, "a"), num_arguments_bytes=num_arguments_bytes)
    resumption = Resumption(asked)
    resumption.prompt_token_ids, resumption.output_token_ids = [1, 2], [3]
    told = json.loads(b"".join(with_arguments(resumption.next_call())))
    assert (told["prompt"], told["max_tokens"]) == ([1, 2, 3], 8)
    assert told["vllm_xargs"] == {"mine": "éé", "tenant": "a"}


@pytest.mark.parametrize("value", ["9", -1, 0, float("nan"), 1e12, None, [1]])
def test_what_makes_no_sense_is_not_there(value: object) -> None:
    assert read_arguments({"slo_ttft_ms": value, "slo_tpot_ms": value, "waited_ms": value}) == Arguments()
