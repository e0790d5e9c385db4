"""A stream that is followed: an event that is known at a glance is what it would have been had it been read."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rota.base.instant import Instant
from rota.serving.engines.engine import EngineCall
from rota.serving.live.events import EventReader
from rota.serving.live.resumption import CHAT, Resumption
from rota.serving.model.request import Request, RequestId

WITHIN = '","token_ids":[1],"text":"'


def call(*, is_chat: bool, wants_ids: bool) -> EngineCall:
    body = {"model": "m", "stream": True, **({"return_token_ids": True} if wants_ids else {})}
    request = Request(RequestId("r"), Instant(0), num_prompt_tokens=3, max_tokens=99)
    path = CHAT if is_chat else "/v1/completions"
    return EngineCall(request, path, [], json.dumps(body).encode(), stream=True)


def event(text: str | None, ids: list[int] | None, *, is_chat: bool, ascii_only: bool, **other: Any) -> bytes:
    """As vLLM writes them."""
    said = {"delta": {"content": text}} if is_chat else {"text": text}
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": None, "token_ids": ids, **other}
    kind = "chat.completion.chunk" if is_chat else "text_completion"
    whole = {"id": "c-1", "object": kind, "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(whole, separators=(",", ":"), ensure_ascii=ascii_only).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def unframed(data: bytes) -> bytes:
    size, _, rest = data.partition(b"\r\n")
    assert len(rest) == int(size, 16) + 2
    return rest[:-2]


def decoded(events: bytes) -> list[object]:
    """Blanks between values say nothing. Names of fields that are no text are not looked at, by either."""
    texts = [each.removeprefix(b"data: ").decode("utf-8", "replace") for each in events.split(b"\n\n")[:-1]]
    return [json.loads(text) for text in texts]


def state(reader: EventReader, resumption: Resumption) -> tuple[object, ...]:
    return resumption.output_token_ids, resumption.has_finished, resumption.why_not, reader.is_done, reader.broken


texts = st.text(max_size=6) | st.sampled_from(['"', "\\", WITHIN, "\n", "é", "\U0001f600"])
plain = st.tuples(texts, st.lists(st.integers(0, 10**19), min_size=1, max_size=2), st.just({}))
ended = st.tuples(texts, st.lists(st.integers(0, 9), max_size=2), st.just({"finish_reason": "stop"}))
odd = st.tuples(texts | st.none(), st.none() | st.lists(st.integers(0, 9), max_size=3), st.just({"stop_reason": None}))
broken = st.tuples(st.integers(0, 300), st.binary(min_size=1, max_size=4))


@given(
    st.lists(plain | plain | plain | odd | ended, min_size=1, max_size=12),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.dictionaries(st.integers(1, 11), broken, max_size=2),
)
@example([("a", [1], {}), ("b", [2], {"finish_reason": "stop"}), ("c", [3], {})], True, False, True, {})
@example([("a", [10**18 - 1], {}), ("b", [10**18 - 1], {}), ("c", [10**18], {})], True, False, True, {})
@example([("a", [1], {}), ("", [2], {}), ("b", [3], {})], True, False, True, {})
@example([("a", [1], {}), ("b", [2], {}), ("c", [3], {})], True, False, True, {2: (95, b"\xff")})
@example([("a", [1], {}), ("b", [2], {}), ("c", [3], {})], True, False, True, {2: (6, b"[")})
def test_what_is_known_at_a_glance_is_what_reading_it_would_tell(
    said: list[tuple[str | None, list[int] | None, dict[str, Any]]],
    is_chat: bool,
    wants_ids: bool,
    ascii_only: bool,
    spoiled: dict[int, tuple[int, bytes]],
) -> None:
    begun = call(is_chat=is_chat, wants_ids=wants_ids)
    glancing, reading = Resumption(begun), Resumption(begun)
    glancer, reader = EventReader(glancing), EventReader(reading)
    events = [event(text, ids, is_chat=is_chat, ascii_only=ascii_only, **other) for text, ids, other in said]
    for index, (at, garbage) in spoiled.items():
        if index < len(events):
            events[index] = events[index][:at] + garbage + events[index][at + len(garbage) :]
    for data in events:
        glanced = glancer.glance(chunk(data))
        got = glancer.feed(data) if glanced is None else unframed(glanced)
        assert decoded(got) == decoded(reader.feed(data))
        assert state(glancer, glancing) == state(reader, reading)
        if reader.broken is not None:
            return


@pytest.mark.parametrize("is_chat", [True, False])
@pytest.mark.parametrize("wants_ids", [True, False])
def test_plain_events_are_known_at_a_glance(is_chat: bool, wants_ids: bool) -> None:
    resumption = Resumption(call(is_chat=is_chat, wants_ids=wants_ids))
    reader = EventReader(resumption)
    reader.feed(event("one", [1], is_chat=is_chat, ascii_only=False))
    for number, text in enumerate([" two", "drei", " \U0001f600", 'a "quoted" \\ word\n']):
        token_id = 10 ** (2 * number)
        data = event(text, [token_id], is_chat=is_chat, ascii_only=False)
        glanced = reader.glance(chunk(data))
        assert glanced is not None
        (said,) = decoded(unframed(glanced))
        assert said["choices"][0]["token_ids"] == ([token_id] if wants_ids else None)  # type: ignore[index]
    assert resumption.output_token_ids == [1, 1, 100, 10_000, 1_000_000]


def test_what_says_more_than_text_and_one_id_is_read() -> None:
    reader = EventReader(Resumption(call(is_chat=True, wants_ids=False)))
    assert reader.glance(chunk(event("one", [1], is_chat=True, ascii_only=True))) is None  # nothing is known yet
    reader.feed(event("one", [1], is_chat=True, ascii_only=True))
    two = event("two", [2], is_chat=True, ascii_only=True)
    for data in (
        event("", [2], is_chat=True, ascii_only=True),  # the beginning of a character
        event("two", [2, 3], is_chat=True, ascii_only=True),
        event("two", [2], is_chat=True, ascii_only=True, finish_reason="stop"),
        two.replace(b"c-1", b"c-2"),
        two.replace(b"null", b"true"),
        two.replace(b"[2]", b"[02]"),
        two.replace(b"two", b"t\\qo"),
        two.replace(b"two", b"t\xffo"),
        two + two,
        b"data: [DONE]\n\n",
    ):
        assert reader.glance(chunk(data)) is None, data
    assert reader.glance(chunk(two)) is not None
