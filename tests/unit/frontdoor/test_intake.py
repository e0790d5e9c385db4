"""What is read of a request: identity, length, prefix, and what goes on to the engine."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rota.base.instant import Instant, milliseconds
from rota.serving.frontdoor.exchange import HttpRequest
from rota.serving.frontdoor.intake import Intake
from rota.serving.frontdoor.prompts import NUM_BLOCKS_MAX, TOKENS_PER_BLOCK, block_hashes
from rota.serving.frontdoor.reading import CHAT, COMPLETIONS
from rota.serving.model.request import Request, shared_prefix_blocks
from rota.serving.model.text_counts import text_counts

JSON = (b"content-type", b"application/json")


def read(path: str = CHAT, headers: dict[str, str] | None = None, **body: object) -> Request:
    named = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    http = HttpRequest("POST", path, [JSON, *named], json.dumps(body).encode())
    return Intake(name="t").read(http, Instant(5)).request


def chat(*contents: str, **fields: object) -> Request:
    return read(messages=[{"role": "user", "content": content} for content in contents], **fields)


def test_lengths_are_estimated_from_bytes_and_exact_for_token_ids() -> None:
    assert chat("x" * 400).num_prompt_tokens == 100 + 4
    assert chat("x" * 401).num_prompt_tokens == 101 + 4
    assert chat("é" * 100).num_prompt_tokens == 50 + 4
    assert read(COMPLETIONS, prompt="x" * 400).num_prompt_tokens == 100
    assert read(COMPLETIONS, prompt="").num_prompt_tokens == 1
    assert read(COMPLETIONS, prompt=list(range(77))).num_prompt_tokens == 77
    assert read(COMPLETIONS, prompt=[[1, 2], [3]]).num_prompt_tokens == 3
    assert read(COMPLETIONS, prompt=["abcd", "abcde"]).num_prompt_tokens == 3
    picture = [{"type": "text", "text": "abcd"}, {"type": "image_url", "image_url": {"url": "data:" + "x" * 10_000}}]
    assert read(messages=[{"role": "user", "content": picture}]).num_prompt_tokens == 4 + 1 + 256


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, 1024),
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 5, "max_completion_tokens": 7}, 7),
        ({"max_tokens": None}, 1024),
    ],
)
def test_the_limit_of_output_is_the_clients_or_the_default(body: dict[str, object], expected: int) -> None:
    assert chat("hi", **body).max_tokens == expected


def test_a_text_completion_has_openais_default() -> None:
    assert read(COMPLETIONS, prompt="hi").max_tokens == 16


def test_a_header_outranks_the_body_and_an_objective_counts_the_other_way() -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert read(messages=messages, priority=4).priority == 4
    assert read(headers={"x-vllm-priority": "2"}, messages=messages, priority=4).priority == 2
    both = {"x-vllm-priority": "2", "x-gateway-inference-objective": "7"}
    assert read(headers=both, messages=messages, priority=4).priority == -7
    assert read(headers={"x-gateway-inference-objective": "-1"}, messages=messages).priority == 1


def test_session_program_and_targets_come_by_the_fields_names() -> None:
    messages = [{"role": "user", "content": "hi"}]
    xargs = {"session_id": "x", "agentic_context": {"program_id": "p", "task_id": 5}}
    assert read(messages=messages, session_id="s").session == "s"
    assert read(messages=messages, vllm_xargs=xargs).session == "x"
    assert read(messages=messages, vllm_xargs=xargs).program == "p"
    headers = {"x-dynamo-session-id": "d", "x-dynamo-trajectory-id": "q", "x-slo-ttft-ms": "0.5", "x-slo-tpot-ms": "20"}
    request = read(headers=headers, messages=messages, vllm_xargs=xargs)
    assert (request.session, request.program) == ("d", "q")
    assert (request.slo.ttft, request.slo.tpot) == (milliseconds(0.5), milliseconds(20))


def test_ids_are_never_given_twice() -> None:
    intake = Intake(name="t")
    headers = [JSON, (b"x-request-id", b"mine")]
    http = HttpRequest("POST", COMPLETIONS, headers, b'{"prompt": "hi"}')
    ids = {intake.read(http, Instant(0)).request.id for _ in range(100)}
    assert len(ids) == 100


# --- prefixes ---------------------------------------------------------------------------------------------------------

LONG = "tell me about blocks and queues and steps " * 40


def test_a_chat_one_turn_later_shares_its_prefix() -> None:
    first, second = chat(LONG, model="m"), chat(LONG, "an answer", "and a question" * 50, model="m")
    shared = shared_prefix_blocks(first.block_hashes, second.block_hashes)
    assert shared == len(first.block_hashes) > 3


@pytest.mark.parametrize("other", [{"model": "n"}, {"cache_salt": "s"}, {"tools": [{"type": "function"}]}])
def test_what_a_cache_does_not_share_has_no_prefix_in_common(other: dict[str, object]) -> None:
    one, two = chat(LONG, model="m"), chat(LONG, **{"model": "m", **other})
    assert one.block_hashes
    assert shared_prefix_blocks(one.block_hashes, two.block_hashes) == 0


@given(st.binary(max_size=3000), st.binary(max_size=3000), st.binary(max_size=3000))
def test_hashes_agree_exactly_as_far_as_the_blocks_do(common: bytes, left: bytes, right: bytes) -> None:
    size = 4 * TOKENS_PER_BLOCK
    one, two = common + left, common + right
    hashes = [block_hashes(prompt, len(prompt), b"model") for prompt in (one, two)]
    agree = 0
    while agree < min(map(len, hashes)) and one[: (agree + 1) * size] == two[: (agree + 1) * size]:
        agree += 1
    assert shared_prefix_blocks(*hashes) == agree
    assert [len(found) for found in hashes] == [len(prompt) // size for prompt in (one, two)]


def test_there_are_never_more_hashes_than_the_bound_or_the_prompt_has_blocks() -> None:
    assert len(block_hashes(b"x" * 10_000_000, 10_000_000, b"")) == NUM_BLOCKS_MAX
    assert block_hashes(b"x" * 10_000, TOKENS_PER_BLOCK - 1, b"") == ()
    assert all(-(2**63) <= found < 2**63 for found in block_hashes(b"x" * 100_000, 10**6, b""))


@given(st.text(max_size=200), st.text(max_size=200))
def test_salts_do_not_run_into_each_other(first: str, second: str) -> None:
    prompt = b"x" * 256
    one = block_hashes(prompt, 64, first.encode(), second.encode())
    two = block_hashes(prompt, 64, (first + second).encode(), b"")
    assert (one == two) == (second == "")


def test_text_is_counted_where_that_is_asked_for_and_never_kept() -> None:
    def counted(path: str, **body: object) -> Request:
        http = HttpRequest("POST", path, [JSON], json.dumps(body).encode())
        return Intake(name="t", counts_text=True).read(http, Instant(5)).request

    parts = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    talk = [
        {"role": "user", "content": "Secret"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": parts},
    ]
    asked = counted(CHAT, messages=talk)
    assert asked.text_counts == text_counts([("user", "Secret"), ("assistant", ""), ("user", "What is it?")])
    assert b"ecret" not in msgspec.json.encode(asked) and b"What" not in msgspec.json.encode(asked)
    assert counted(COMPLETIONS, prompt="two words").text_counts == text_counts([("", "two words")], is_chat=False)
    assert counted(COMPLETIONS, prompt=["two", "words"]).text_counts[3] == 2
    assert counted(COMPLETIONS, prompt=[1, 2, 3]).text_counts == ()
    assert read(messages=talk).text_counts == (), "not asked for"
