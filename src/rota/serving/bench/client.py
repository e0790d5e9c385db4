"""Sends one request to an OpenAI-compatible server, streaming, and notes when what came back."""

import asyncio
from collections.abc import Callable
from typing import Any, Literal

import aiohttp
import msgspec

from rota.base.errors import ConfigError, EngineError
from rota.base.instant import Instant, to_milliseconds
from rota.serving.bench.plan import Planned
from rota.serving.model.request import DEFAULT_TENANT

Endpoint = Literal["chat", "completions"]
Outcome = Literal["finished", "rejected", "failed", "aborted"]
PATHS: dict[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
REFUSALS = (429, 503, 529)
"""Statuses by which servers say that they could serve this, but not now."""

_ERROR_BYTES_MAX = 65_536
_DETAIL_CHARACTERS_MAX = 300


class Sent(msgspec.Struct):
    """What came of one request. Instants are of the generator's own clock."""

    planned: Planned
    scheduled_at: Instant
    sent_at: Instant
    """When it was handed to the connection."""
    ended_at: Instant = Instant(0)
    outcome: Outcome = "aborted"
    chunk_at: list[Instant] = []
    """When each chunk with text came."""
    num_output_tokens: int = 0
    has_usage: bool = False
    """Whether the server counted the tokens; if not, each chunk counts as one."""
    num_prompt_tokens: int | None = None
    """As the server counted them."""
    error_kind: str = ""
    detail: str = ""


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_parse_chunk = msgspec.json.Decoder(_Chunk).decode


class Target:
    """A server under load: how to ask it, and how to read its answers."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        base_url: str,
        clock: Callable[[], Instant],
        *,
        model: str,
        endpoint: Endpoint,
        ignore_eos: bool,
        timeout_seconds: float,
    ) -> None:
        self._session = session
        self._url = base_url + PATHS[endpoint]
        self._clock = clock
        self._model = model
        self._endpoint = endpoint
        self._ignore_eos = ignore_eos
        self._timeout_seconds = timeout_seconds

    def body(self, planned: Planned, text: str) -> bytes:
        """The request as JSON. `ignore_eos` and `priority` are vLLM's own fields and sent only if asked for."""
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": planned.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
        }
        if self._endpoint == "chat":
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = text
        if self._ignore_eos:
            body["ignore_eos"] = True
        return msgspec.json.encode(body)

    async def ask(self, planned: Planned, body: bytes, scheduled_at: Instant) -> Sent:
        """Send a request and read its answer to the end. Never raises, but for a cancellation, after which the request
        counts as aborted."""
        sent = Sent(planned, scheduled_at, self._clock(), chunk_at=[])
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await self._ask(sent, body)
        except TimeoutError:
            _fail(sent, "timeout", f"no end within {self._timeout_seconds:g} s")
        except aiohttp.ClientConnectorError as error:
            _fail(sent, "connect", str(error))
        except (aiohttp.ClientError, OSError) as error:
            _fail(sent, "broken", f"{type(error).__name__}: {error}")
        except asyncio.CancelledError:
            sent.outcome, sent.error_kind = "aborted", "interrupted"
        sent.ended_at = self._clock()
        if not sent.has_usage:
            sent.num_output_tokens = len(sent.chunk_at)
        return sent

    async def _ask(self, sent: Sent, body: bytes) -> None:
        async with self._session.post(self._url, data=body, headers=_headers(sent.planned)) as response:
            if response.status != 200:
                detail = (await response.content.read(_ERROR_BYTES_MAX)).decode("utf-8", "replace")
                _fail(sent, f"status {response.status}", detail)
                if response.status in REFUSALS:
                    sent.outcome = "rejected"
                return
            is_done = await self._read_events(sent, response.content)
        if sent.error_kind:
            return
        if not is_done:
            _fail(sent, "broken", "the stream ended without [DONE]")
        elif not sent.chunk_at and not (sent.has_usage and sent.num_output_tokens):
            _fail(sent, "empty", "an answer without a token")
        else:
            sent.outcome = "finished"

    async def _read_events(self, sent: Sent, content: aiohttp.StreamReader) -> bool:
        """Read server-sent events; returns whether the stream said that it was whole."""
        pending = b""
        async for data in content.iter_any():
            now = self._clock()
            lines = (pending + data).split(b"\n")
            pending = lines.pop()
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                payload = line[5:].strip()
                if payload == b"[DONE]":
                    return True
                _take_chunk(sent, payload, now)
                if sent.error_kind:
                    return False
        return False


def _take_chunk(sent: Sent, payload: bytes, now: Instant) -> None:
    try:
        chunk = _parse_chunk(payload)
    except (msgspec.MsgspecError, UnicodeError) as error:
        _fail(sent, "not a chunk", f"{error}: {payload[:100]!r}")
        return
    if chunk.error is not None:
        _fail(sent, "error in stream", str(chunk.error))
        return
    if chunk.usage is not None:
        sent.has_usage = True
        sent.num_prompt_tokens = chunk.usage.prompt_tokens
        sent.num_output_tokens = chunk.usage.completion_tokens
    if any(_has_text(choice) for choice in chunk.choices):
        sent.chunk_at.append(now)


def _has_text(choice: _Choice) -> bool:
    delta = choice.delta
    if delta is not None and (delta.content or delta.reasoning_content or delta.reasoning):
        return True
    return bool(choice.text)


def _fail(sent: Sent, kind: str, detail: str) -> None:
    sent.outcome, sent.error_kind = "failed", kind
    sent.detail = " ".join(detail.split())[:_DETAIL_CHARACTERS_MAX]


def _headers(planned: Planned) -> dict[str, str]:
    """Who asks, how urgent it is and what was promised, by the names that the field uses; nothing that is a default,
    since a server may refuse what it was not set up for."""
    headers = {"content-type": "application/json"}
    if planned.tenant != DEFAULT_TENANT:
        headers["x-gateway-inference-fairness-id"] = planned.tenant
    if planned.priority:
        headers["x-vllm-priority"] = str(planned.priority)
    if planned.session is not None:
        headers["x-session-id"] = planned.session
    for name, target in (("x-slo-ttft-ms", planned.slo.ttft), ("x-slo-tpot-ms", planned.slo.tpot)):
        if target is not None:
            headers[name] = f"{to_milliseconds(target):g}"
    return headers


async def first_model(session: aiohttp.ClientSession, base_url: str) -> str:
    """The first model that a server says it has. Raises `EngineError` if it cannot be reached or names none."""
    url = f"{base_url}/v1/models"
    try:
        async with asyncio.timeout(10), session.get(url) as response:
            status, data = response.status, await response.read()
    except aiohttp.InvalidURL:
        raise ConfigError(f"URL: {base_url!r} is not a URL", hint="such as http://127.0.0.1:8000") from None
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        said = str(error) or type(error).__name__
        raise EngineError(f"{url}: cannot be reached: {said}", hint="start the server, or check the URL") from None
    if status != 200:
        raise EngineError(f"{url}: answered {status}", hint="name the model with --model to go without this page")
    try:
        model = msgspec.json.decode(data)["data"][0]["id"]
    except (msgspec.MsgspecError, LookupError, TypeError):
        raise EngineError(f"{url}: names no model", hint="name it with --model") from None
    return str(model)
