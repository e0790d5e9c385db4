"""Which streams may go on elsewhere, by their bodies."""

import json
from typing import Any

import pytest

from rota.serving.frontdoor.bodies import read_chat, read_completion
from rota.serving.frontdoor.travel import chat_travels, completion_travels

TRAVEL: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1},
    {"temperature": 0, "seed": 7},
    {"seed": None, "stop": None, "n": 1, "logprobs": None, "response_format": None},
    {"stop": [], "frequency_penalty": 0, "presence_penalty": 0.0, "response_format": {"type": "text"}},
    {"min_tokens": 3, "ignore_eos": True, "stop_token_ids": [5], "logit_bias": {"3": 1}},
    {"repetition_penalty": 1.1},
    {"stream_options": {"include_usage": True}, "return_token_ids": True, "user": "me"},
]
STAY: list[dict[str, Any]] = [
    {"seed": 7},
    {"seed": 7, "temperature": 0.5},
    {"n": 2},
    {"best_of": 2},
    {"stop": "END"},
    {"stop": ["END"]},
    {"frequency_penalty": 0.1},
    {"presence_penalty": -0.1},
    {"logprobs": 1},
    {"echo": True},
    {"response_format": {"type": "json_object"}},
    {"structured_outputs": {"regex": "a"}},
    {"guided_json": {}},
    {"bad_words": ["x"]},
    {"return_token_ids": False},
    {"use_beam_search": True},
    {"kv_transfer_params": {}},
    {"unheard_of": 1},
]


def chat(extra: dict[str, Any], content: Any = "hi") -> bool:
    raw = json.dumps({"messages": [{"role": "user", "content": content}], "stream": True, **extra}).encode()
    return chat_travels(raw, read_chat(raw)[1])


def completion(extra: dict[str, Any], prompt: Any = "hi") -> bool:
    raw = json.dumps({"prompt": prompt, "stream": True, **extra}).encode()
    return completion_travels(raw, read_completion(raw)[1])


@pytest.mark.parametrize("extra", TRAVEL, ids=str)
def test_what_is_the_same_in_the_middle_travels(extra: dict[str, Any]) -> None:
    assert chat(extra)
    assert completion(extra)


@pytest.mark.parametrize("extra", STAY, ids=str)
def test_what_depends_on_the_beginning_stays(extra: dict[str, Any]) -> None:
    assert not completion(extra)
    assert not chat({"logprobs": True} if "logprobs" in extra else extra)


def test_a_chat_stays_for_tools_and_media_and_a_completion_for_several_prompts() -> None:
    assert not chat({"tools": [{"type": "function", "function": {"name": "f"}}]})
    assert chat({"tools": None})
    assert not chat({}, [{"type": "text", "text": "what is this"}, {"type": "image_url", "image_url": {"url": "x"}}])
    assert chat({}, [{"type": "text", "text": "only words"}])
    assert completion({}, [1, 2, 3])
    assert completion({}, ["one"])
    assert not completion({}, ["one", "two"])
    assert not completion({}, [[1], [2]])
