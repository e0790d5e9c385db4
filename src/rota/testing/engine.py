"""The conformance suite of engines: what the live host relies on, asked of any engine."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec

from rota.base.errors import EngineError
from rota.base.instant import Instant
from rota.serving.engines.engine import Engine, EngineCall, Headers
from rota.serving.model.request import Request, RequestId


class EngineUnderTest(Protocol):
    """What the suite needs to know and do beside the engine itself."""

    engine: Engine
    """Started and ready."""

    def lose(self) -> None:
        """Make the engine fail as a crash would."""
        ...

    def num_unfinished(self) -> int:
        """Requests that the engine itself still works on, as seen from its own side."""
        ...


Factory = Callable[[], AbstractAsyncContextManager[EngineUnderTest]]


class RecordingSink:
    """Keeps what it hears, and objects to what it must not hear."""

    on_chunks = None

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.status = 0
        self.body = b""
        self.over = asyncio.Event()
        self.began = asyncio.Event()

    def on_head(self, status: int, headers: Headers) -> None:
        self._hear("head", allowed_after=("",))
        assert all(name == name.lower() for name, _ in headers), "header names must be lower-case"
        self.status = status

    def on_data(self, data: bytes) -> None:
        self._hear("data", allowed_after=("head", "data"))
        assert data, "empty data was handed on"
        self.body += data
        self.began.set()

    def on_end(self) -> None:
        self._hear("end", allowed_after=("head", "data"))
        self.over.set()

    def on_failed(self, reason: str) -> None:
        self._hear("failed", allowed_after=("", "head", "data"))
        assert reason, "a failure without a reason"
        self.over.set()

    def _hear(self, what: str, allowed_after: tuple[str, ...]) -> None:
        last = self.heard[-1] if self.heard else ""
        assert last in allowed_after, f"heard {what!r} after {last!r}"
        self.heard.append(what)


async def check_engine(factory: Factory, *, timeout_seconds: float = 20.0) -> None:
    """Assert the contract of `rota.serving.engines.engine.Engine`. `factory` gives a fresh engine each time.

    Checked: probe and report; a whole answer and a stream, each heard in order and once; many at once; an abort stops
    the work and silences the sink; unknown ids are ignored; a lost engine fails what is under way and what comes after,
    and its probe raises `EngineError`; the sink is never called from within `submit`. Raises `AssertionError`.
    """
    for check in (_answers, _streams, _serves_many, _aborts, _is_lost):
        async with asyncio.timeout(timeout_seconds), factory() as under_test:
            await check(under_test)


_ids = itertools.count(1)


def _call(stream: bool, max_tokens: int = 4) -> EngineCall:
    messages = [{"role": "user", "content": "hello"}]
    body = {"messages": messages, "max_tokens": max_tokens, "stream": stream, "ignore_eos": True}
    request = Request(RequestId(f"conformance-{next(_ids)}"), Instant(0), num_prompt_tokens=6, max_tokens=max_tokens)
    headers = [(b"content-type", b"application/json")]
    return EngineCall(request, "/v1/chat/completions", headers, msgspec.json.encode(body), stream)


def _submit(engine: Engine, call: EngineCall) -> RecordingSink:
    sink = RecordingSink()
    engine.submit(call, sink)
    assert not sink.heard, "the sink was called from within submit"
    return sink


async def _answers(under_test: EngineUnderTest) -> None:
    status = await under_test.engine.probe()
    assert status.spec.id == under_test.engine.id
    sink = _submit(under_test.engine, _call(stream=False))
    await sink.over.wait()
    assert sink.heard[-1] == "end", sink.heard
    assert sink.status == 200, sink.body
    assert b'"choices"' in sink.body
    report = await under_test.engine.report()
    if report is not None:
        assert report.instance_id == under_test.engine.id
        assert 0 <= report.num_free_blocks <= report.num_blocks


async def _streams(under_test: EngineUnderTest) -> None:
    sink = _submit(under_test.engine, _call(stream=True))
    await sink.over.wait()
    assert sink.heard[-1] == "end", sink.heard
    assert sink.body.rstrip().endswith(b"data: [DONE]"), sink.body[-200:]


async def _serves_many(under_test: EngineUnderTest) -> None:
    sinks = [_submit(under_test.engine, _call(stream=index % 2 == 0)) for index in range(20)]
    await asyncio.gather(*(sink.over.wait() for sink in sinks))
    assert all(sink.heard[-1] == "end" and sink.status == 200 for sink in sinks)
    assert under_test.num_unfinished() == 0


async def _aborts(under_test: EngineUnderTest) -> None:
    engine = under_test.engine
    engine.abort(RequestId("nobody"))
    begun, fresh = _call(stream=True, max_tokens=2000), _call(stream=False, max_tokens=2000)
    sinks = [_submit(engine, begun), _submit(engine, fresh)]
    await sinks[0].began.wait()
    for call in (begun, fresh):
        engine.abort(call.request.id)
        engine.abort(call.request.id)
    heard = [list(sink.heard) for sink in sinks]
    await _until(lambda: under_test.num_unfinished() == 0)
    await asyncio.sleep(0.05)
    assert [sink.heard for sink in sinks] == heard, "a sink heard something after its request was aborted"
    after = _submit(engine, _call(stream=False))
    await after.over.wait()
    assert after.heard[-1] == "end", "an abort broke the next request"


async def _is_lost(under_test: EngineUnderTest) -> None:
    engine = under_test.engine
    sinks = [_submit(engine, _call(stream=stream, max_tokens=2000)) for stream in (True, False)]
    await sinks[0].began.wait()
    under_test.lose()
    await asyncio.gather(*(sink.over.wait() for sink in sinks))
    assert all(sink.heard[-1] == "failed" for sink in sinks), [sink.heard for sink in sinks]
    late = _submit(engine, _call(stream=False))
    await late.over.wait()
    assert late.heard == ["failed"], late.heard
    assert await _raises(engine.probe()), "a lost engine says that it is healthy"


async def _raises(probe: Awaitable[object]) -> bool:
    try:
        await probe
    except EngineError:
        return True
    return False


async def _until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.01)
