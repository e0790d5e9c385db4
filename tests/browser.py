"""A real browser, headless: what a page asks the network for, and how it looks."""

import asyncio
import base64
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


class Looked(NamedTuple):
    """What came of opening a page."""

    requests: list[str]
    """Everything that was asked for, the page itself and inlined data left out."""
    errors: list[str]
    """What scripts complained of."""
    num_figures: int
    text: str
    """What a reader reads."""
    screenshot: bytes
    """PNG of the whole page, if asked for."""


def look(page: Path, *, scheme: str = "light", width: int = 1200, is_shot: bool = False) -> Looked:
    """Open a file, as a reader does who likes this colour scheme, and wait until its figures are drawn. A picture of
    the whole page takes a while, so it is taken only if asked for."""
    return asyncio.run(look_at(page.resolve().as_uri(), scheme=scheme, width=width, is_shot=is_shot))


async def look_at(url: str, *, scheme: str = "light", width: int = 1200, is_shot: bool = False) -> Looked:
    """The same for whatever is at a URL."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run")
        browser = await asyncio.create_subprocess_exec(
            CHROMIUM, *flags, f"--user-data-dir={profile}", "about:blank", stderr=asyncio.subprocess.PIPE
        )
        try:
            port = await asyncio.wait_for(_port(browser), 60)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    targets = await answer.json()
                debugger = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
                async with session.ws_connect(debugger, max_msg_size=0) as socket:
                    return await asyncio.wait_for(_open(_Protocol(socket), url, scheme, width, is_shot), 120)
        finally:
            browser.terminate()
            await browser.wait()


async def _port(browser: asyncio.subprocess.Process) -> int:
    assert browser.stderr is not None
    async for line in browser.stderr:
        if found := re.search(rb"ws://127\.0\.0\.1:(\d+)/", line):
            return int(found[1])
    raise AssertionError("the browser did not start")


class _Protocol:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self.events: list[dict[str, Any]] = []

    async def call(self, method: str, **parameters: object) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self._socket.receive()).data)
            if message.get("id") == self._number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    async def value(self, expression: str) -> Any:
        result = await self.call("Runtime.evaluate", expression=expression)
        return result["result"].get("value")


async def _open(protocol: _Protocol, page: str, scheme: str, width: int, is_shot: bool) -> Looked:
    for domain in ("Network", "Page", "Runtime"):
        await protocol.call(f"{domain}.enable")
    await protocol.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    await protocol.call("Emulation.setDeviceMetricsOverride", **size)
    await protocol.call("Page.navigate", url=page)
    drawn = "document.querySelectorAll('.js-plotly-plot .main-svg .xy').length"
    wanted = "document.querySelectorAll('.plotly-graph-div').length"
    for _ in range(200):
        await asyncio.sleep(0.1)
        if await protocol.value("document.readyState") == "complete" and await protocol.value(f"{drawn} >= {wanted}"):
            break
    await asyncio.sleep(0.5)
    shot = b""
    if is_shot:
        height = await protocol.value("Math.ceil(document.documentElement.scrollHeight)")
        await protocol.call("Emulation.setDeviceMetricsOverride", **{**size, "height": height})
        await asyncio.sleep(0.5)
        taken = await protocol.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        shot = base64.b64decode(taken["data"])
    asked = [
        event["params"]["request"]["url"]
        for event in protocol.events
        if event.get("method") == "Network.requestWillBeSent"
    ]
    errors = [
        json.dumps(event["params"]["exceptionDetails"].get("exception", {}).get("description", ""))
        for event in protocol.events
        if event.get("method") == "Runtime.exceptionThrown"
    ]
    outside = [url for url in asked if not url.startswith(("data:", "blob:")) and url != page]
    figures = await protocol.value(
        "document.querySelectorAll('.js-plotly-plot .main-svg').length > 0 ? " + wanted + " : 0"
    )
    return Looked(outside, errors, figures, await protocol.value("document.body.innerText"), shot)
