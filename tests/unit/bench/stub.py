"""A server that answers as it is told to, in a thread of its own."""

import asyncio
import json
import threading
import time
from types import TracebackType
from typing import Any, Self

from aiohttp import web

NUM_TOKENS = 4
BEHAVIOURS = ("ok", "no_usage", "status_500", "status_503", "cut_short", "error_chunk", "empty", "nonsense", "hang")


class StubServer:
    """Does what the model's name in a request says, one of `BEHAVIOURS`. Notes what it was sent."""

    def __init__(self, models: tuple[str, ...] = ("ok",), delay_seconds: float = 0.0) -> None:
        self.models = models
        self.delay_seconds = delay_seconds
        self.heard: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(client_max_size=2**24)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_post("/v1/completions", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0]
        self.url = f"http://{host}:{port}"

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name} for name in self.models]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.heard.append((dict(request.headers), body))
        does = body["model"]
        if does.startswith("status_"):
            return web.json_response({"error": {"message": "as told"}}, status=int(does.removeprefix("status_")))
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        if does == "hang":
            await asyncio.sleep(60)
        await asyncio.sleep(self.delay_seconds)
        for event in self._events(does, is_chat=request.path.endswith("chat/completions")):
            await response.write(f"data: {event}\n\n".encode())
        return response

    def _events(self, does: str, *, is_chat: bool) -> list[str]:
        def chunk(text: str) -> dict[str, Any]:
            said = {"delta": {"content": text}} if is_chat else {"text": text}
            return {"id": "1", "created": int(time.time()), "choices": [{"index": 0, **said}]}

        if does == "nonsense":
            return ["{not json"]
        if does == "error_chunk":
            return [json.dumps({"error": {"message": "it broke"}})]
        texts = [] if does == "empty" else [f"word{number} " for number in range(NUM_TOKENS)]
        events: list[dict[str, Any]] = [chunk(""), *map(chunk, texts)]
        if does == "ok":
            # Two tokens came in the last chunk, so only `usage` tells their true number.
            usage = {"prompt_tokens": 11, "completion_tokens": NUM_TOKENS + 1}
            events.append({"id": "1", "choices": [], "usage": usage})
        lines = [json.dumps(event) for event in events]
        return lines if does == "cut_short" else [*lines, "[DONE]"]
