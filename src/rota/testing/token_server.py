"""A server that tells token ids as vLLM does, computes them from nothing but the prompt, and breaks when told to.

Its tokens are numbers below 50, each a function of the three before it; ` 17` is the text of token 17. One that five
divides begins a character: it brings no text until the next one does. Like vLLM, the server repeats the whole prompt
when it is given one that ends inside a character, which nobody should do.
"""

import asyncio
import contextlib
import json
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from rota.serving.engines.openai import OpenAIEngine
from rota.serving.model.instance import InstanceId
from rota.testing.scripted import STREAM_HEAD, ScriptedServer, framed, plain

NUM_IDS = 50
END = 7
"""The token that ends an answer."""
LEAK = "the whole prompt"
METRICS = (
    b'vllm:cache_config_info{block_size="16",num_gpu_blocks="4096"} 1.0\n'
    b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 0\n"
)
KINDS = ("kill", "end", "not_json", "not_sse", "wrong_type", "error", "abort", "early_done")
"""Ways to break before an event, all of which are noticed at once. After `hang` the whole server stands still, after
`stall` that stream alone."""


@dataclass(frozen=True)
class Break:
    """Before which event of a stream, and how, it breaks."""

    before: int
    kind: str


def prompt_ids(body: dict[str, Any]) -> list[int]:
    """The prompt as the server sees it."""
    given = (body.get("kv_transfer_params") or {}).get("prompt_token_ids")
    given = given or (body.get("prompt") if isinstance(body.get("prompt"), list) else None)
    if given:
        return list(given)
    text = json.dumps(body.get("messages") or body.get("prompt"))
    return [crc32(word.encode()) % NUM_IDS for word in text.split()] + [1]


def next_id(ids: list[int]) -> int:
    """The one token that follows."""
    return crc32(repr(ids[-3:]).encode()) % NUM_IDS


def begins_character(token_id: int) -> bool:
    return token_id % 5 == 0


def said(body: dict[str, Any]) -> Iterator[tuple[int, str, str | None]]:
    """Id, text and reason for the end, token by token."""
    ids = prompt_ids(body)
    pending = f" {LEAK}" if begins_character(ids[-1]) else ""
    max_tokens = body.get("max_completion_tokens") or body.get("max_tokens") or 16
    for index in range(max_tokens):
        ids.append(token := next_id(ids))
        is_end = token == END and not body.get("ignore_eos")
        reason = "stop" if is_end else "length" if index == max_tokens - 1 else None
        pending += "" if is_end else f" {token}"
        if begins_character(token) and reason is None:
            yield token, "", None
        else:
            yield token, pending, reason
            pending = ""
        if reason is not None:
            return


def events_of(body: dict[str, Any], request_id: str, created: int) -> Iterator[dict[str, Any]]:
    """The events of a stream, in vLLM's shape."""
    is_chat, wants_ids = "messages" in body, bool(body.get("return_token_ids"))
    kind = "chat.completion.chunk" if is_chat else "text_completion"
    name = ("chatcmpl-" if is_chat else "cmpl-") + request_id
    common = {"id": name, "object": kind, "created": created, "model": "m"}
    ids, num_tokens = prompt_ids(body), 0
    shown = ids if wants_ids else None
    if is_chat:
        role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        yield {**common, "choices": [role], "prompt_token_ids": shown}
    for token, text, reason in said(body):
        num_tokens += 1
        content = {"delta": {"content": text}} if is_chat else {"text": text}
        choice: dict[str, Any] = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        if not is_chat:
            choice["prompt_token_ids"], shown = shown, None
        choice["token_ids"] = [token] if wants_ids else None
        yield {**common, "choices": [choice]}
    if (body.get("stream_options") or {}).get("include_usage"):
        usage = {"prompt_tokens": len(ids), "total_tokens": len(ids) + num_tokens, "completion_tokens": num_tokens}
        yield {**common, "choices": [], "usage": usage}


class TokenServer(ScriptedServer):
    """One such server. `breaks` says how its next streams break, one each, or those of all servers that share it."""

    def __init__(
        self, breaks: list[Break | None], *, created: int = 1, version: bytes = b"0.32.0", pace: float = 0.0
    ) -> None:
        super().__init__(self._stream)
        self.bodies: list[dict[str, Any]] = []
        self.is_stopped = False
        """As after SIGSTOP: it takes connections and says nothing."""
        self.gets[b"/version"] = plain(200, {"version": version.decode()})
        self.gets[b"/metrics"] = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(METRICS), METRICS)
        self._breaks = breaks
        self._created = created
        self._pace = pace

    async def answers_gets(self) -> None:
        """Returns when the server runs."""
        while self.is_stopped:
            await asyncio.sleep(0.01)

    def _stream(
        self, raw: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Coroutine[Any, Any, None]:
        return self._answer(raw, self.heads[-1].decode().lower(), writer)

    async def _answer(self, raw: bytes, head: str, writer: asyncio.StreamWriter) -> None:
        body = json.loads(raw)
        self.bodies.append(body)
        fault = self._breaks.pop(0) if self._breaks else None
        await self.answers_gets()
        request_id = head.split("x-request-id: ")[1].split("\r\n")[0]
        writer.write(STREAM_HEAD)
        events = list(events_of(body, request_id, self._created))
        for index, event in enumerate(events):
            if fault is not None and fault.before == index:
                await self._break(fault.kind, event, writer)
                return
            writer.write(framed(b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"))
            await asyncio.sleep(self._pace)
            await self.answers_gets()
        if fault is not None and fault.before == len(events):
            writer.transport.abort()
            return
        writer.write(framed(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            await writer.drain()

    async def _break(self, kind: str, event: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if kind == "kill":
            await asyncio.sleep(0.002)  # What was written before gets out first.
            writer.transport.abort()
            return
        if kind == "end":
            writer.write(b"0\r\n\r\n")
        elif kind == "hang":
            self.is_stopped = True
            await asyncio.sleep(60)
        elif kind == "stall":
            await asyncio.sleep(60)
        else:
            writer.write(framed(garbage(kind, event)))
            await asyncio.sleep(60)


def garbage(kind: str, event: dict[str, Any]) -> bytes:
    """What comes in the place of an event, by kind."""
    if kind == "not_json":
        return b'data: {"id":"x","choices":[{"ind\n\n'
    if kind == "not_sse":
        return b"\x00\xff\x17 Segmentation fault\n\n"
    if kind == "error":
        return (
            b'data: {"error":{"message":"EngineCore died","type":"InternalServerError","code":500}}\n\ndata: [DONE]\n\n'
        )
    if kind == "early_done":
        return b"data: [DONE]\n\n" + b"data: " + json.dumps(event).encode() + b"\n\n"
    if kind == "wrong_type":
        return b'data: {"choices":[{"index":0,"text":3}]}\n\n'
    choice = {**(event["choices"] or [{"index": 0, "text": "x"}])[0], "finish_reason": "abort"}
    return b"data: " + json.dumps({**event, "choices": [choice]}).encode() + b"\n\n"


async def token_engines(servers: list[TokenServer], *, probe_timeout_seconds: float = 0.1) -> list[OpenAIEngine]:
    """Start the servers, and give an engine for each: `http-0`, `http-1`, …"""
    return [
        OpenAIEngine(InstanceId(f"http-{index}"), await server.start(), probe_timeout_seconds=probe_timeout_seconds)
        for index, server in enumerate(servers)
    ]
