"""The board of a running router: the page, its JSON, and who may see them."""

import asyncio
from pathlib import Path

import aiohttp
import msgspec
import openai
import pytest
from tests.browser import CHROMIUM, Looked, look_at

from rota.serving.board.board import Board
from rota.serving.board.picture import Picture
from rota.serving.frontdoor.exchange import Exchange
from rota.serving.model.instance import InstanceLimits
from rota.serving.stack import Parameters, StackConfig
from rota.testing.router import RunningRouter, running_router

MARKUP = "<img/src=x/onerror=document.title='taken'>"
STACK = StackConfig(parameters=Parameters(admission={"max_unfinished": 30}))


async def load(running: RunningRouter) -> None:
    """Some tenants and classes, of which one calls itself by markup, and refusals."""
    client = openai.AsyncOpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0)

    async def ask(index: int) -> None:
        tenant = (MARKUP, "careful", "hasty")[index % 3]
        headers = {"x-gateway-inference-fairness-id": tenant, "x-slo-ttft-ms": "50", "x-vllm-priority": str(index % 2)}
        try:
            await client.completions.create(
                model="m", prompt="Once upon a time " * 20, max_tokens=8, extra_headers=headers
            )
        except openai.APIStatusError as error:
            assert error.status_code in (429, 503)

    await asyncio.gather(*(ask(index) for index in range(60)))


async def state(running: RunningRouter) -> tuple[int, bytes]:
    async with aiohttp.ClientSession() as session, session.get(running.url + "/ui/state") as answer:
        return answer.status, await answer.read()


@pytest.mark.asyncio
async def test_a_live_router_and_its_journal_show_the_same() -> None:
    async with running_router(stack=STACK, limits=InstanceLimits(num_blocks=64)) as running:
        await load(running)
        status, body = await state(running)
        assert status == 200
        live = msgspec.json.decode(body, type=Picture)
        poured = Board().pour(running.journal.rows).picture()
    assert (live.num_finished, live.num_refused) == (poured.num_finished, poured.num_refused)
    assert live.num_finished >= 30
    assert live.num_refused > 0
    assert live.num_finished + live.num_refused == 60
    assert [(each.id, each.service, each.num_finished) for each in live.tenants] == [
        (each.id, each.service, each.num_finished) for each in poured.tenants
    ]
    assert {tenant.id for tenant in live.tenants} == {MARKUP, "careful", "hasty"}
    assert all(each.slo_attainment is not None for each in live.classes)
    assert [each.id for each in live.instances] == ["sim-0", "sim-1"]
    assert all((each.num_running, each.num_waiting, each.kv_use) == (0, 0, 0.0) for each in live.instances)
    assert any(each.step_ms is not None for each in live.instances), "somebody worked"
    assert "unfinished" in live.refusals[0].reason


@pytest.mark.asyncio
async def test_strangers_see_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_router() as running:
        for path in ("/ui", "/ui/state"):
            async with aiohttp.ClientSession() as session:
                for headers, status in (
                    ({}, 200),
                    ({"host": "localhost:8000"}, 200),
                    ({"host": "[::1]:8000"}, 200),
                    ({"host": "evil.example"}, 403),
                    ({"host": "evil.example:8000"}, 403),
                    ({"host": "localhost.evil.example"}, 403),
                    ({"origin": "http://evil.example"}, 403),
                    ({"x-forwarded-for": "192.0.2.7"}, 403),
                ):
                    async with session.get(running.url + path, headers=headers) as answer:
                        assert (answer.status, headers) == (status, headers)
                        policy = answer.headers.get("content-security-policy", "")
                        assert status != 200 or path != "/ui" or "default-src 'none'" in policy
        monkeypatch.setattr(Exchange, "is_from_here", False)
        assert (await state(running))[0] == 403


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.asyncio
async def test_a_browser_shows_names_as_text_and_asks_nobody_else() -> None:
    async with running_router(stack=STACK, limits=InstanceLimits(num_blocks=64)) as running:
        await load(running)
        looked: Looked = await look_at(running.url + "/ui")
    assert looked.errors == []
    assert {url.removeprefix(running.url) for url in looked.requests} == {"/ui/state"}
    assert MARKUP in looked.text
    assert "not reached" not in looked.text
    for shown in ("sim-0", "careful", "finished per second", "Last refusals"):
        assert shown in looked.text


def test_the_page_never_makes_markup_of_what_it_is_told() -> None:
    import rota

    page = (Path(rota.__file__).parent / "data" / "board.html").read_text()
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in page
