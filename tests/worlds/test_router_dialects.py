"""What other servers say on the wire, byte for byte, and what the router makes of it.

Ollama's answers are written from its source (openai/openai.go and middleware/openai.go, August 2026). SGLang's, in the
folder `dialects`, were recorded from SGLang 0.5.23 on a CPU; of its metrics those lines that tell of load, with two
requests running and one waiting.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from rota.base.errors import EngineError
from rota.serving.engines.http_client import HttpClient
from rota.serving.engines.openai import OpenAIEngine
from rota.serving.frontdoor.serve import Router
from rota.testing.router import running_router
from rota.testing.scripted import Script, ScriptedServer, engines_of, framed, scripted

QUESTION = [{"role": "user", "content": "hi"}]
RECORDINGS = Path(__file__).with_name("dialects") / "sglang"


def answer(status: str, content_type: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def recorded(name: str) -> bytes:
    return (RECORDINGS / name).read_bytes()


def stream(*events: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(framed(b"data: " + event + b"\n\n") for event in events) + b"0\r\n\r\n"


def says(data: bytes) -> Script:
    async def script(body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return script


OLLAMA_GETS = {
    b"/health": answer("404 Not Found", "text/plain", b"404 page not found"),
    b"/metrics": answer("404 Not Found", "text/plain", b"404 page not found"),
    b"/v1/models": answer(
        "200 OK",
        "application/json",
        b'{"object":"list","data":[{"id":"smollm2:135m","object":"model","created":1795408751,"owned_by":"library"}]}\n',
    ),
}
OLLAMA_WITHOUT_MODELS = OLLAMA_GETS | {
    b"/v1/models": answer("200 OK", "application/json", b'{"object":"list","data":null}\n')
}
OLLAMA_WHOLE = answer(
    "200 OK",
    "application/json",
    b'{"id":"chatcmpl-416","object":"chat.completion","created":1795408760,"model":"smollm2:135m",'
    b'"system_fingerprint":"fp_ollama","choices":[{"index":0,"message":{"role":"assistant","content":"Hi."},'
    b'"finish_reason":"stop"}],"usage":{"prompt_tokens":31,"completion_tokens":3,"total_tokens":34}}\n',
)
OLLAMA_CHUNK = (
    b'{"id":"chatcmpl-416","object":"chat.completion.chunk","created":1795408760,"model":"smollm2:135m",'
    b'"system_fingerprint":"fp_ollama","choices":[{"index":0,"delta":{"role":"assistant","content":"Hi"},'
    b'"finish_reason":null}]}'
)
OLLAMA_FINISH = OLLAMA_CHUNK.replace(
    b'{"role":"assistant","content":"Hi"},"finish_reason":null', b'{},"finish_reason":"stop"'
)
OLLAMA_USAGE = (
    b'{"id":"chatcmpl-416","object":"chat.completion.chunk","created":1795408760,"model":"smollm2:135m",'
    b'"system_fingerprint":"fp_ollama","choices":[],"usage":{"prompt_tokens":31,"completion_tokens":3,"total_tokens":34}}'
)
OLLAMA_DIED = (
    b'{"id":"chatcmpl-416","object":"chat.completion.chunk","created":1795408760,"model":"",'
    b'"system_fingerprint":"fp_ollama","choices":[{"index":0,"delta":{"content":""},"finish_reason":null}]}'
)
"""What becomes of its own error in the middle of a stream: a chunk without text, after which the stream just ends."""
OLLAMA_NO_MODEL = answer(
    "404 Not Found",
    "application/json",
    b'{"error":{"message":"model \'llama9\' not found","type":"not_found_error","param":null,"code":null}}\n',
)

SGLANG_GETS = {
    b"/health": recorded("ping.http"),
    b"/ping": recorded("ping.http"),
    b"/v1/models": recorded("models.http"),
    b"/metrics": answer("200 OK", "text/plain; version=0.0.4; charset=utf-8", recorded("metrics.txt")),
}
ILL = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"


@dataclass
class Behind:
    """A router before servers that speak one dialect."""

    router: Router
    engines: list[OpenAIEngine]
    servers: list[ScriptedServer]
    client: openai.AsyncOpenAI


@asynccontextmanager
async def behind(gets: dict[bytes, bytes], *scripts: Script) -> AsyncIterator[Behind]:
    async with scripted(*scripts) as servers:
        for server in servers:
            server.gets = gets
        engines = await engines_of(servers)
        async with running_router(num_simulated=0, engines=engines) as running:
            client = openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
            yield Behind(running.router, engines, servers, client)


@pytest.mark.asyncio
async def test_ollama_answers_whole() -> None:
    async with behind(OLLAMA_GETS, says(OLLAMA_WHOLE)) as ollama:
        assert [model.id async for model in ollama.client.models.list()] == ["smollm2:135m"]
        whole = await ollama.client.chat.completions.create(model="smollm2:135m", messages=QUESTION)
        assert whole.choices[0].message.content == "Hi."
        assert await ollama.engines[0].report() is None, "it has no metrics"
        assert b"rota:generation_tokens_total 3.0" in ollama.router.door.telemetry.page()


@pytest.mark.asyncio
async def test_ollama_streams() -> None:
    events = (OLLAMA_CHUNK, OLLAMA_FINISH, OLLAMA_USAGE, b"[DONE]")
    async with behind(OLLAMA_GETS, says(stream(*events))) as ollama:
        chunks = await ollama.client.chat.completions.create(model="smollm2:135m", messages=QUESTION, stream=True)
        reasons = [chunk.choices[0].finish_reason async for chunk in chunks if chunk.choices]
        assert reasons == [None, "stop"]
        assert b"rota:generation_tokens_total 3.0" in ollama.router.door.telemetry.page()


@pytest.mark.asyncio
async def test_a_stream_that_ollama_ends_in_the_middle_is_said_to_be_lost() -> None:
    async with behind(OLLAMA_GETS, says(stream(OLLAMA_CHUNK, OLLAMA_DIED))) as ollama:
        chunks = await ollama.client.chat.completions.create(model="smollm2:135m", messages=QUESTION, stream=True)
        with pytest.raises(openai.APIError, match=r"without \[DONE\]") as caught:
            async for _ in chunks:
                pass
        assert caught.value.code == "engine_lost"


@pytest.mark.asyncio
async def test_a_stream_that_ends_before_it_began_is_asked_for_elsewhere() -> None:
    whole = stream(OLLAMA_CHUNK, OLLAMA_FINISH, b"[DONE]")
    async with behind(OLLAMA_GETS, says(stream()), says(whole)) as ollama:
        for _ in range(2):
            chunks = await ollama.client.chat.completions.create(model="smollm2:135m", messages=QUESTION, stream=True)
            assert [chunk.choices[0].finish_reason async for chunk in chunks] == [None, "stop"]
        assert ollama.servers[0].num_posts > 0


@pytest.mark.asyncio
async def test_ollamas_own_refusal_comes_back() -> None:
    async with behind(OLLAMA_GETS, says(OLLAMA_NO_MODEL)) as ollama:
        with pytest.raises(openai.NotFoundError, match="model 'llama9' not found"):
            await ollama.client.chat.completions.create(model="llama9", messages=QUESTION)


@pytest.mark.asyncio
async def test_an_ollama_without_models_is_well() -> None:
    async with behind(OLLAMA_WITHOUT_MODELS, says(OLLAMA_WHOLE)) as ollama:
        assert [model.id async for model in ollama.client.models.list()] == []


@pytest.mark.asyncio
async def test_a_stream_in_the_smallest_pieces_counts_as_whole() -> None:
    async def dribbles(body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        begun = stream(OLLAMA_CHUNK, OLLAMA_FINISH).removesuffix(b"0\r\n\r\n")
        for piece in (begun, *(framed(bytes((byte,))) for byte in b"data: [DONE]\n\n"), b"0\r\n\r\n"):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)

    async with behind(OLLAMA_GETS, dribbles) as ollama:
        client = HttpClient(f"http://127.0.0.1:{ollama.router.door.server.port}")
        body = b'{"model":"smollm2:135m","messages":[{"role":"user","content":"hi"}],"stream":true}'
        streamed = await client.fetch("POST", "/v1/chat/completions", timeout_seconds=10, body=body)
        client.close()
        assert streamed.endswith(b"data: [DONE]\n\n"), "and no error after it"


@pytest.mark.asyncio
async def test_sglang_answers_whole() -> None:
    async with behind(SGLANG_GETS, says(recorded("chat.http"))) as sglang:
        assert [model.id async for model in sglang.client.models.list()] == ["smollm2-135m"]
        whole = await sglang.client.chat.completions.create(model="smollm2-135m", messages=QUESTION)
        assert whole.choices[0].message.content == "Hello there! How"
        assert b"rota:generation_tokens_total 4.0" in sglang.router.door.telemetry.page()


@pytest.mark.parametrize("name", ["chat_stream.http", "text_stream.http"])
@pytest.mark.asyncio
async def test_what_sglang_streams_passes_as_it_came(name: str) -> None:
    async with behind(SGLANG_GETS, says(recorded(name))) as sglang:
        client = HttpClient(f"http://127.0.0.1:{sglang.router.door.server.port}")
        body = b'{"model":"smollm2-135m","messages":[{"role":"user","content":"hi"}],"stream":true}'
        streamed = await client.fetch("POST", "/v1/chat/completions", timeout_seconds=10, body=body)
        client.close()
        _, _, framed_events = recorded(name).partition(b"\r\n\r\n")
        events = [line for line in framed_events.split(b"\r\n") if line.startswith(b"data: ")]
        assert streamed == b"".join(events)
        assert b"rota:generation_tokens_total 4.0" in sglang.router.door.telemetry.page()


@pytest.mark.asyncio
async def test_sglangs_load_and_size_are_read_from_its_metrics() -> None:
    async with behind(SGLANG_GETS, says(recorded("chat.http"))) as sglang:
        report = await sglang.engines[0].report()
        assert report is not None
        assert (report.num_running, report.num_waiting) == (2, 1)
        assert (report.num_blocks, report.num_free_blocks) == (8192 // 16, 8192 // 16), "27 of 8192 tokens are used"


@pytest.mark.asyncio
async def test_a_busy_sglang_is_not_taken_for_ill() -> None:
    """Its /health generates a token, behind everything that it computes before; /ping says that the server lives."""
    async with scripted(says(recorded("chat.http"))) as (server,):
        server.gets = SGLANG_GETS | {b"/ping": ILL}
        (engine,) = await engines_of([server])
        await engine.probe()
        server.gets = SGLANG_GETS | {b"/health": ILL}
        await engine.probe()
        server.gets = SGLANG_GETS | {b"/health": ILL, b"/ping": ILL}
        with pytest.raises(EngineError, match="/ping: answered 503"):
            await engine.probe()
        server.gets = SGLANG_GETS | {b"/health": ILL}
        with pytest.raises(EngineError, match="/health: answered 503"):
            await engine.probe()
        server.gets = SGLANG_GETS
        await engine.probe()
        await engine.stop()


@pytest.mark.asyncio
async def test_an_old_sglang_without_a_ping_is_well() -> None:
    async with scripted(says(recorded("chat.http"))) as (server,):
        server.gets = {path: said for path, said in SGLANG_GETS.items() if path != b"/ping"}
        (engine,) = await engines_of([server])
        for _ in range(3):
            await engine.probe()
        await engine.stop()


@pytest.mark.asyncio
async def test_sglangs_own_refusal_comes_back() -> None:
    async with behind(SGLANG_GETS, says(recorded("too_long.http"))) as sglang:
        with pytest.raises(openai.BadRequestError, match="longer than the model's context length"):
            await sglang.client.completions.create(model="smollm2-135m", prompt="hi")
