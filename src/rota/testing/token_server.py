"""A server that tells token ids as vLLM does, computes them from nothing but the prompt, and breaks when told to.

Its tokens are numbers below 50, each a function of the three before it; ` 17` is the text of token 17. One that five
divides begins a character: it brings no text until the next one does. Like vLLM, the server repeats the whole prompt
when it is given one that ends inside a character, which nobody should do. Like a vLLM with our plug-in, it lets go of a
request when it is asked to, and takes one that another let go of.
"""

import asyncio
import contextlib
import json
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from rota.base.errors import EngineError
from rota.serving.engines.engine import RequestStays
from rota.serving.engines.openai import OpenAIEngine
from rota.serving.engines.vllm.tickets import Ticket
from rota.serving.model.capabilities import Capability
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import RequestId
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


BLOCK_SIZE = 4
BLOCK_BYTES = 100
HABITS = ("ticket_last", "ticket_first", "stays", "silent", "hang_up")
"""What comes of asking a server to let go of a request: its ticket after its stream has ended, or before; it stays; no
answer although it was let go of; or its stream breaks before the end, and the ticket comes."""


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


def lumped(events: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """The events with so many tokens in each, but for the rest."""
    lumps: list[dict[str, Any]] = []
    num_in_last = size
    for event in events:
        if size == 1 or _token_of(event) is None:
            lumps.append(event)
            num_in_last = size
        elif num_in_last == size:
            lumps.append(event)
            num_in_last = 1
        else:
            first, last = lumps[-1]["choices"][0], event["choices"][0]
            text = _text_of(first) + _text_of(last)
            choice = {**first, "token_ids": [*first["token_ids"], *last["token_ids"]]}
            choice |= {"delta": {"content": text}} if "delta" in first else {"text": text}
            choice["finish_reason"] = last["finish_reason"]
            lumps[-1] = {**event, "choices": [choice]}
            num_in_last += 1
    return lumps


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
        self.habits: list[str] = []
        """What comes of the next ones asked for; when there is none left, the first of `HABITS`."""
        self.num_pulled = 0
        """Requests that came with a ticket for exactly their blocks."""
        self.misfits: list[dict[str, Any]] = []
        """Those that came with another."""
        self.lump_size = 1
        """Tokens in each event of a stream, as when vLLM's clients are behind."""
        self._leaving: dict[str, _Leaving | None] = {}
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
        if head.startswith("post /detokenize"):
            is_inside = begins_character(body["tokens"][-1])
            writer.write(
                plain(200, {"prompt": "".join(f" {token}" for token in body["tokens"]) + "\ufffd" * is_inside})
            )
            return
        self.bodies.append(body)
        fault = self._breaks.pop(0) if self._breaks else None
        await self.answers_gets()
        request_id = head.split("x-request-id: ")[1].split("\r\n")[0]
        self._take_ticket(body)
        writer.write(STREAM_HEAD)
        self._leaving[request_id] = None
        try:
            await self._speak(body, request_id, fault, writer)
        finally:
            if (leaving := self._leaving.pop(request_id)) is not None:
                leaving.tell_soon(None)

    def _take_ticket(self, body: dict[str, Any]) -> None:
        params = body.get("kv_transfer_params") or {}
        if not params.get("do_remote_prefill"):
            return
        num_tokens = len(prompt_ids(body))
        fits = len(params["remote_block_ids"][0]) == -(-num_tokens // BLOCK_SIZE)
        if fits and params["remote_num_tokens"] >= num_tokens - 1:
            self.num_pulled += 1
        else:
            self.misfits.append(body)

    async def let_go(self, request_id: str) -> Ticket:
        """End a stream with its next token. Raises as an engine's `hand_off` does."""
        habit = self.habits.pop(0) if self.habits else HABITS[0]
        if request_id not in self._leaving or habit == "stays":
            raise RequestStays("it stays")
        self._leaving[request_id] = leaving = _Leaving(habit)
        ticket = await leaving.ticket
        if ticket is None:
            raise RequestStays("it has ended")
        if habit == "silent":
            raise EngineError("no answer")
        return ticket

    async def _speak(
        self, body: dict[str, Any], request_id: str, fault: Break | None, writer: asyncio.StreamWriter
    ) -> None:
        events = lumped(list(events_of(body, request_id, self._created)), self.lump_size)
        num_tokens = sum(_token_of(event) is not None for event in events)
        output: list[int] = []
        for index, event in enumerate(events):
            token, leaving = _token_of(event), self._leaving[request_id]
            output += [] if token is None else [token]
            is_boundary = (len(prompt_ids(body)) + len(output) - 1) % BLOCK_SIZE == 0
            if leaving is not None and token is not None and len(output) < num_tokens and not is_boundary:
                await self._leave(leaving, _ticket(body, request_id, output), event, writer)
                return
            if leaving is not None and leaving.habit == "ticket_first" and len(output) == num_tokens:
                leaving.tell(None)
            if fault is not None and fault.before == index:
                if leaving is not None:
                    leaving.tell(None)
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

    async def _leave(
        self, leaving: "_Leaving", ticket: Ticket, event: dict[str, Any], writer: asyncio.StreamWriter
    ) -> None:
        """The last token of this server's part: in vLLM's words an end by length, without the text of a character that
        has only begun."""
        if leaving.habit in ("ticket_first", "hang_up"):
            leaving.tell(ticket)
            await asyncio.sleep(0.005)
        choice = {**event["choices"][0], "finish_reason": "length"}
        if begins_character(ticket.output_token_ids[-1]):
            choice |= {"delta": {"content": ""}} if "delta" in choice else {"text": ""}
        if leaving.habit == "hang_up":
            writer.transport.abort()
            return
        leaving.tell_soon(ticket)
        usage = {"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1}
        for said_ in ({**event, "choices": [choice]}, {**event, "choices": [], "usage": usage}):
            writer.write(framed(b"data: " + json.dumps(said_, separators=(",", ":")).encode() + b"\n\n"))
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


class _Leaving:
    """A request that shall end with its next token."""

    def __init__(self, habit: str) -> None:
        self.habit = habit
        self.ticket: asyncio.Future[Ticket | None] = asyncio.get_running_loop().create_future()

    def tell(self, ticket: Ticket | None) -> None:
        if not self.ticket.done():
            self.ticket.set_result(ticket)

    def tell_soon(self, ticket: Ticket | None) -> None:
        """After what was written has got away."""
        asyncio.get_running_loop().call_later(0.002, self.tell, ticket)


def _token_of(event: dict[str, Any]) -> int | None:
    ids = event["choices"][0].get("token_ids") if event["choices"] else None
    return ids[0] if ids else None


def _text_of(choice: dict[str, Any]) -> str:
    text: str = choice["delta"]["content"] if "delta" in choice else choice["text"]
    return text


def _ticket(body: dict[str, Any], request_id: str, output: list[int]) -> Ticket:
    prompt = prompt_ids(body)
    num_tokens = len(prompt) + len(output) - 1
    params = {
        "do_remote_prefill": True,
        "remote_block_ids": [list(range(-(-num_tokens // BLOCK_SIZE)))],
        "remote_num_tokens": num_tokens,
    }
    max_tokens = body.get("max_completion_tokens") or body.get("max_tokens") or 16
    return Ticket(request_id, tuple(prompt), tuple(output), max_tokens - len(output), params, BLOCK_SIZE, BLOCK_BYTES)


class TokenEngine(OpenAIEngine):
    """Such a server, which can be asked to let go."""

    def __init__(self, instance_id: InstanceId, url: str, server: TokenServer, *, probe_timeout_seconds: float) -> None:
        capabilities = frozenset({Capability.HAND_OVER_KV})
        super().__init__(instance_id, url, capabilities=capabilities, probe_timeout_seconds=probe_timeout_seconds)
        self._server = server

    async def hand_off(self, request_id: RequestId, *, timeout_seconds: float) -> Ticket:
        async with asyncio.timeout(timeout_seconds):
            return await self._server.let_go(request_id)


async def token_engines(
    servers: list[TokenServer], *, probe_timeout_seconds: float = 0.1, hand_off: bool = False
) -> list[OpenAIEngine]:
    """Start the servers, and give an engine for each: `http-0`, `http-1`, …"""
    engines: list[OpenAIEngine] = []
    for index, server in enumerate(servers):
        name, url = InstanceId(f"http-{index}"), await server.start()
        if hand_off:
            engines.append(TokenEngine(name, url, server, probe_timeout_seconds=probe_timeout_seconds))
        else:
            engines.append(OpenAIEngine(name, url, probe_timeout_seconds=probe_timeout_seconds))
    return engines
