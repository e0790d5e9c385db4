"""The router with the real `openai` client, over simulated engines and over scripted servers that misbehave."""

import asyncio
import json
from collections.abc import Callable

import openai
import pytest

from rota.base.instant import seconds
from rota.base.replay import replay
from rota.serving.assemble import build
from rota.serving.engines.http_client import HttpClient
from rota.serving.frontdoor.serve import ServeConfig
from rota.serving.live.watch import WatchSettings
from rota.serving.model.commands import Dispatch
from rota.serving.model.events import ClientLeft, RequestArrived, RequestFinished, SequenceAborted
from rota.serving.predictors.step_time.affine import AffineStepTime
from rota.testing.router import RunningRouter, running_router
from rota.testing.scripted import (
    Script,
    answers,
    breaks,
    drops_after_head,
    drops_at_once,
    drops_mid_stream,
    engines_of,
    hangs,
    plain,
    scripted,
    speaks_no_http,
)

MESSAGES = [{"role": "user", "content": "Say something."}]
FAST_WATCH = WatchSettings(interval_seconds=0.05, starting_interval_seconds=0.02, num_failures_max=2)
SLOW_STEPS = AffineStepTime(base_ms=20.0, token_us=0.0, kv_token_ns=0.0, seq_us=0.0)


def client_of(running: RunningRouter) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=running.url + "/v1", api_key="unused", max_retries=0, timeout=20)


async def until(holds: Callable[[], bool], what: str) -> None:
    for _ in range(500):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"never came true: {what}")


def assert_nothing_lost(running: RunningRouter) -> None:
    """Every request that arrived has ended, at the router and at every simulated engine."""
    machine = running.router.cluster.machine
    machine.check()
    assert not machine.unfinished()
    assert not running.router.cluster.flights
    for engine in running.simulated:
        engine._machine.check()
        assert not engine._machine.unfinished()


# --- what must hold ---------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_the_openai_client_talks_to_simulated_engines() -> None:
    async with running_router(num_simulated=2) as running:
        client = client_of(running)
        assert [model.id for model in (await client.models.list()).data] == ["simulated"]

        whole = await client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=8)
        assert whole.usage is not None
        assert 1 <= whole.usage.completion_tokens <= 8
        assert whole.choices[0].message.content

        stream = await client.chat.completions.create(
            model="m",
            messages=MESSAGES,
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        chunks = [chunk async for chunk in stream]
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert len(said.split()) == 8
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 8
        assert chunks[-2].choices[0].finish_reason == "length"

        text = await client.completions.create(model="m", prompt=[1, 2, 3], max_tokens=4, n=2)
        assert len(text.choices) == 2
        assert text.usage is not None
        assert text.usage.prompt_tokens == 3
        words = [
            chunk.choices[0].text
            async for chunk in await client.completions.create(model="m", prompt="hello", max_tokens=4, stream=True)
        ]
        assert "".join(words)
        assert_nothing_lost(running)
        finished = [row.event for row in running.journal.rows if isinstance(row.event, RequestFinished)]
        assert len(finished) == 4
        assert finished[1].num_output_tokens == 8


@pytest.mark.asyncio
async def test_the_synchronous_client_works_from_another_thread() -> None:
    async with running_router(num_simulated=1) as running:
        client = openai.OpenAI(base_url=running.url + "/v1", api_key="unused", max_retries=0, timeout=20)

        def talk() -> int:
            client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=3)
            stream = client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=3, stream=True)
            return sum(1 for _ in stream)

        assert await asyncio.to_thread(talk) >= 3
        client.close()
        assert_nothing_lost(running)


@pytest.mark.asyncio
async def test_identity_reaches_the_machine() -> None:
    async with running_router(num_simulated=1) as running:
        client = client_of(running)
        await client.chat.completions.create(
            model="m",
            messages=MESSAGES,
            max_tokens=1,
            extra_headers={
                "x-gateway-inference-fairness-id": "acme",
                "x-gateway-inference-objective": "5",
                "x-session-id": "s1",
                "x-slo-ttft-ms": "250",
                "x-request-id": "mine",
            },
            extra_body={"priority": 9, "vllm_xargs": {"agentic_context": {"program_id": "p1"}}},
        )
    request = next(row.event.request for row in running.journal.rows if isinstance(row.event, RequestArrived))
    assert (request.tenant, request.priority, request.session, request.program) == ("acme", -5, "s1", "p1")
    assert request.slo.ttft == seconds(0.25)
    assert request.id.startswith("mine-")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.asyncio
async def test_a_client_that_leaves_stops_its_request_at_the_engine(stream: bool) -> None:
    async with running_router(num_simulated=1, step_time=SLOW_STEPS) as running:
        client = client_of(running)
        machine = running.simulated[0]._machine
        extra = {"ignore_eos": True}
        if stream:
            answer = await client.chat.completions.create(
                model="m", messages=MESSAGES, max_tokens=1000, stream=True, extra_body=extra
            )
            await anext(aiter(answer))
            await answer.close()
        else:
            request = client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=1000, extra_body=extra)
            task = asyncio.ensure_future(request)
            await until(lambda: bool(machine.unfinished()), "the engine has the request")
            task.cancel()
        await until(lambda: not machine.unfinished(), "the engine stopped")
        events = [type(row.event) for row in running.journal.rows]
        assert ClientLeft in events
        assert SequenceAborted in events
        assert_nothing_lost(running)


@pytest.mark.asyncio
async def test_a_client_that_leaves_closes_the_connection_to_a_server() -> None:
    async with scripted(hangs) as servers:
        engines = await engines_of(servers)
        async with running_router(num_simulated=0, engines=engines) as running:
            request = client_of(running).chat.completions.create(model="m", messages=MESSAGES)
            task = asyncio.ensure_future(request)
            await until(lambda: servers[0].num_posts == 1, "the server has the request")
            task.cancel()
            await until(lambda: servers[0].num_dropped == 1, "the server saw the connection close")
            assert_nothing_lost(running)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("failing", [drops_at_once, drops_after_head, breaks, speaks_no_http])
@pytest.mark.asyncio
async def test_a_failure_before_the_first_byte_is_tried_again_elsewhere(failing: Script, stream: bool) -> None:
    async with scripted(failing, answers) as servers:
        engines = await engines_of(servers)
        async with running_router(num_simulated=0, engines=engines) as running:
            client = client_of(running)
            for _ in range(4):
                answer = await client.chat.completions.create(model="m", messages=MESSAGES, stream=stream)
                if stream:
                    assert [chunk.choices[0].delta.content async for chunk in answer] == ["hi", "hi"]
                else:
                    assert answer.choices[0].message.content == "fine"
            assert servers[0].num_posts >= 1, "the failing server was never asked"
            assert servers[1].num_posts == 4
            assert_nothing_lost(running)
            assert running.router.cluster.machine.counts().num_finished == 4


@pytest.mark.asyncio
async def test_a_hung_engine_is_given_up_if_asked_to() -> None:
    async with scripted(hangs, answers) as servers:
        engines = await engines_of(servers)
        serve = ServeConfig(port=0, first_byte_timeout_seconds=0.2)
        async with running_router(num_simulated=0, engines=engines, serve=serve) as running:
            for _ in range(3):
                await client_of(running).chat.completions.create(model="m", messages=MESSAGES)
            assert servers[0].num_dropped >= 1
            assert_nothing_lost(running)


@pytest.mark.asyncio
async def test_a_failure_mid_stream_ends_in_an_error_event() -> None:
    async with scripted(drops_mid_stream, drops_mid_stream) as servers:
        engines = await engines_of(servers)
        async with running_router(num_simulated=0, engines=engines) as running:
            stream = await client_of(running).chat.completions.create(model="m", messages=MESSAGES, stream=True)
            said = []
            with pytest.raises(openai.APIError) as raised:
                async for chunk in stream:
                    said.append(chunk.choices[0].delta.content)
            assert said == ["hi"]
            assert raised.value.code == "engine_lost"
            assert servers[0].num_posts + servers[1].num_posts == 1, "a stream that began was tried again"
            assert_nothing_lost(running)


@pytest.mark.asyncio
async def test_when_every_attempt_fails_the_client_is_told_why() -> None:
    async with scripted(drops_at_once, drops_at_once) as servers:
        engines = await engines_of(servers)
        async with running_router(num_simulated=0, engines=engines) as running:
            with pytest.raises(openai.InternalServerError) as raised:
                await client_of(running).chat.completions.create(model="m", messages=MESSAGES)
            assert raised.value.status_code == 502
            assert "attempts failed" in raised.value.message
            assert "http-0" in raised.value.message
            assert_nothing_lost(running)


@pytest.mark.asyncio
async def test_an_engines_refusal_passes_unchanged_and_is_not_tried_again() -> None:
    error = {"message": "no such model", "type": "NotFoundError", "param": "model", "code": 404}

    async def refuses(body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(plain(404, {"error": error}))
        await writer.drain()

    async with scripted(refuses, refuses) as servers:
        engines = await engines_of(servers)
        async with running_router(num_simulated=0, engines=engines) as running:
            with pytest.raises(openai.NotFoundError) as raised:
                await client_of(running).chat.completions.create(model="other", messages=MESSAGES)
            assert raised.value.body == error
            assert servers[0].num_posts + servers[1].num_posts == 1


@pytest.mark.asyncio
async def test_the_body_and_the_headers_reach_the_server_as_they_were_sent() -> None:
    bodies = []

    async def keeps(body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        bodies.append(body)
        await answers(body, reader, writer)

    async with scripted(keeps) as servers:
        engines = await engines_of(servers)
        async with running_router(num_simulated=0, engines=engines) as running:
            sent = b'{ "messages":[{"role":"user","content":"\\u00e9"}],\n "top_k" : 5, "max_tokens":null }'
            reader, writer = await asyncio.open_connection("127.0.0.1", running.router.door.server.port)
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\n"
                b"authorization: Bearer key\r\nconnection: keep-alive, x-private\r\nx-private: 1\r\n"
                b"x-gateway-inference-objective: 3\r\ncontent-length: %d\r\n\r\n%b" % (len(sent), sent)
            )
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            writer.close()
    head = servers[0].heads[0].lower()
    assert bodies == [sent]
    assert b"authorization: bearer key" in head
    assert b"x-vllm-priority: -3" in head
    assert b"x-private" not in head
    assert head.count(b"content-length") == 1


@pytest.mark.asyncio
async def test_a_lost_instance_is_noticed_its_requests_moved_and_it_may_come_back() -> None:
    serve = ServeConfig(port=0, watch=FAST_WATCH)
    async with running_router(num_simulated=2, step_time=SLOW_STEPS, serve=serve) as running:
        client, lost = client_of(running), running.simulated[0]
        requests = [
            asyncio.ensure_future(
                client.chat.completions.create(
                    model="m", messages=MESSAGES, max_tokens=20, extra_body={"ignore_eos": True}
                )
            )
            for _ in range(8)
        ]
        await until(lambda: bool(lost._machine.unfinished()), "the instance has work")
        lost.lose()
        done = await asyncio.gather(*requests)
        assert all(answer.usage is not None and answer.usage.completion_tokens == 20 for answer in done)
        await until(lambda: lost.id not in running.router.cluster.statuses, "the loss is noticed")
        lost.come_back()
        await until(lambda: lost.id in running.router.cluster.statuses, "the return is noticed")
        await until(lambda: not lost._machine.unfinished(), "its old step ran to its end")
        await asyncio.gather(
            *(client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=2) for _ in range(8))
        )
        attempts = [
            command
            for row in running.journal.rows
            for command in row.commands
            if isinstance(command, Dispatch) and command.attempt > 1
        ]
        assert attempts
        assert_nothing_lost(running)


@pytest.mark.asyncio
async def test_requests_at_a_server_that_turns_ill_are_moved() -> None:
    serve = ServeConfig(port=0, watch=FAST_WATCH)
    async with scripted(hangs, answers) as servers:
        engines = await engines_of(servers)
        async with running_router(num_simulated=0, engines=engines, serve=serve) as running:
            client = client_of(running)
            requests = [
                asyncio.ensure_future(client.chat.completions.create(model="m", messages=MESSAGES)) for _ in range(4)
            ]
            await until(lambda: servers[0].num_posts >= 1, "the server that hangs has a request")
            servers[0].healthy = False
            done = await asyncio.gather(*requests)
            assert all(answer.choices[0].message.content == "fine" for answer in done)
            assert servers[0].num_dropped == servers[0].num_posts
            assert_nothing_lost(running)


@pytest.mark.asyncio
async def test_health_and_metrics_tell_the_truth() -> None:
    serve = ServeConfig(port=0, watch=FAST_WATCH)
    async with running_router(num_simulated=1, serve=serve) as running:
        http = HttpClient(running.url)
        health = json.loads(await http.fetch("GET", "/health", timeout_seconds=5))
        assert health["num_ready"] == 1
        await client_of(running).chat.completions.create(model="m", messages=MESSAGES, max_tokens=2)
        page = (await http.fetch("GET", "/metrics", timeout_seconds=5)).decode()
        assert 'rota:requests_total{endpoint="/v1/chat/completions",status="200"} 1.0' in page
        assert 'rota:instance_ready{instance="sim-0"} 1.0' in page
        running.simulated[0].lose()
        await until(lambda: not running.router.cluster.statuses, "the loss is noticed")
        reader, writer = await asyncio.open_connection("127.0.0.1", running.router.door.server.port)
        writer.write(b"GET /health HTTP/1.1\r\nhost: t\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 503 " in head
        assert "simulated engine was lost" in (await reader.read(1000)).decode()
        writer.close()
        http.close()


@pytest.mark.asyncio
async def test_draining_finishes_what_is_under_way_and_takes_nothing_new() -> None:
    async with running_router(num_simulated=1, step_time=SLOW_STEPS) as running:
        client = client_of(running)
        stream = await client.chat.completions.create(
            model="m", messages=MESSAGES, max_tokens=10, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(aiter(stream))
        draining = asyncio.ensure_future(running.router.drain(10.0))
        await asyncio.sleep(0)
        with pytest.raises(openai.APIConnectionError):
            await client_of(running).chat.completions.create(model="m", messages=MESSAGES)
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].choices[0].finish_reason == "length"
        assert await draining == 0


@pytest.mark.asyncio
async def test_what_is_left_when_the_router_stops_ends_with_an_error() -> None:
    async with running_router(num_simulated=1, step_time=SLOW_STEPS) as running:
        client = client_of(running)
        request = client.chat.completions.create(
            model="m", messages=MESSAGES, max_tokens=1000, extra_body={"ignore_eos": True}
        )
        task = asyncio.ensure_future(request)
        await until(lambda: bool(running.router.cluster.flights), "the request is under way")
        await running.router.stop(drain_seconds=0.05)
        with pytest.raises(openai.InternalServerError) as raised:
            await task
        assert raised.value.status_code == 503
        running.router.cluster.machine.check()


@pytest.mark.asyncio
async def test_a_live_journal_replays_to_the_same_commands_under_load_and_loss() -> None:
    serve = ServeConfig(port=0, watch=FAST_WATCH)
    async with scripted(drops_at_once, drops_mid_stream) as servers:
        engines = await engines_of(servers)
        async with running_router(num_simulated=3, engines=engines, serve=serve, seed=7) as running:
            client = client_of(running)

            async def one(index: int) -> str:
                shared = "You are helpful. " * 40
                messages = [{"role": "system", "content": shared}, {"role": "user", "content": f"question {index % 5}"}]
                stream = index % 2 == 0
                try:
                    answer = await client.chat.completions.create(
                        model="m", messages=messages, max_tokens=20 + index % 30, stream=stream
                    )
                    if stream:
                        if index % 7 == 0:
                            await anext(aiter(answer))
                            await answer.close()
                            return "left"
                        async for _ in answer:
                            pass
                except openai.APIError:
                    return "failed"
                return "finished"

            requests = [asyncio.ensure_future(one(index)) for index in range(60)]
            await asyncio.sleep(0.05)
            running.simulated[0].lose()
            outcomes = await asyncio.gather(*requests)
            await until(lambda: not running.router.cluster.flights, "all ended")
            await until(lambda: not any(engine._machine.unfinished() for engine in running.simulated), "engines idle")
            assert_nothing_lost(running)
            counts = running.router.cluster.machine.counts()
    # The gate means nothing unless there was congestion, loss and departure.
    assert outcomes.count("finished") >= 30
    assert counts.num_arrived == 60
    assert counts.num_aborted >= 1
    retries = [
        command
        for row in running.journal.rows
        for command in row.commands
        if isinstance(command, Dispatch) and command.attempt > 1
    ]
    assert retries
    difference = replay(running.journal.rows, build(running.config).by_name())
    assert difference is None, str(difference)
