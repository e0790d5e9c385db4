"""Instances of a running router that are drained and taken back by command."""

import asyncio
import json
from collections.abc import Sequence

import openai
import pytest
from tests.worlds.test_router import FAST_WATCH, MESSAGES, SLOW_STEPS, assert_nothing_lost, client_of, until

from rota.base.replay import replay
from rota.serving.assemble import build
from rota.serving.frontdoor.http1 import HttpConnection
from rota.serving.frontdoor.serve import ServeConfig
from rota.serving.model.commands import Dispatch
from rota.serving.model.events import InstanceDraining
from rota.serving.stack import StackConfig
from rota.testing.router import RunningRouter, running_router


async def admin(
    running: RunningRouter, path: str, method: str = "POST", headers: Sequence[str] = ()
) -> tuple[int, object]:
    """Status and JSON of an answer below `/admin/instances`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.router.door.server.port)
    lines = [f"{method} /admin/instances{path} HTTP/1.1", "host: x", "connection: close", *headers]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), json.loads(body)


@pytest.mark.asyncio
async def test_a_drained_instance_finishes_what_it_has_and_gets_nothing_new_until_it_is_taken_back() -> None:
    serve = ServeConfig(port=0, watch=FAST_WATCH)
    async with running_router(
        num_simulated=2, step_time=SLOW_STEPS, serve=serve, stack=StackConfig(dispatch="round_robin")
    ) as running:
        client, (drained, other) = client_of(running), running.simulated
        counts: list[int] = []

        async def ask(num_tokens: int) -> None:
            answer = await client.chat.completions.create(
                model="m", messages=MESSAGES, max_tokens=num_tokens, extra_body={"ignore_eos": True}
            )
            assert answer.usage is not None
            counts.append(answer.usage.completion_tokens)

        early = [asyncio.ensure_future(ask(40)) for _ in range(4)]
        await until(lambda: len(drained._machine.unfinished()) == 2, "it has half of the work")
        status, state = await admin(running, "/sim-0/drain")
        assert (status, state) == (200, {"id": "sim-0", "object": "instance", "state": "draining", "num_requests": 2})
        assert (await admin(running, "/sim-0/drain"))[0] == 200, "draining twice is draining"
        await asyncio.gather(*(ask(2) for _ in range(4)))
        assert len(drained._machine.unfinished()) == 2, "nothing new came, and what was there goes on"
        await asyncio.gather(*early)
        assert sorted(counts) == [2] * 4 + [40] * 4

        _, listed = await admin(running, "", "GET")
        assert [entry["state"] for entry in listed["data"]] == ["drained", "ready"]  # type: ignore[index]
        drained.lose()  # by command is by command: a restart does not undo it
        await until(lambda: drained.id not in running.router.cluster.statuses, "the loss is noticed")
        drained.come_back()
        await until(lambda: drained.id in running.router.cluster.statuses, "the return is noticed")
        await asyncio.gather(*(ask(2) for _ in range(4)))
        before = dispatches(running, drained.id)
        assert before == 2

        status, state = await admin(running, "/sim-0/undrain")
        assert (status, state) == (200, {"id": "sim-0", "object": "instance", "state": "ready", "num_requests": 0})
        await asyncio.gather(*(ask(2) for _ in range(4)))
        assert dispatches(running, drained.id) == before + 2
        assert dispatches(running, other.id) > 0
        assert_nothing_lost(running)
    events = [type(row.event) for row in running.journal.rows if row.machine == "cluster"]
    assert events.count(InstanceDraining) == 1
    difference = replay(running.journal.rows, build(running.config).by_name())
    assert difference is None, str(difference)


def dispatches(running: RunningRouter, instance_id: str) -> int:
    commands = [command for row in running.journal.rows for command in row.commands]
    return sum(isinstance(command, Dispatch) and command.instance_id == instance_id for command in commands)


@pytest.mark.asyncio
async def test_a_router_without_an_instance_to_turn_to_says_so() -> None:
    async with running_router(num_simulated=1) as running:
        await admin(running, "/sim-0/drain")
        client = client_of(running)
        with pytest.raises(openai.InternalServerError) as caught:
            await client.get("../health", cast_to=object)
        assert caught.value.body == {
            "status": "unavailable",
            "num_ready": 0,
            "instances": {"sim-0": {"ready": False, "why_not": "drained"}},
        }
        assert (await client.models.list()).data == []
        held = asyncio.ensure_future(client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=2))
        await until(lambda: bool(running.router.cluster.flights), "the request is held")
        await admin(running, "/sim-0/undrain")
        assert (await held).usage is not None, "what was held goes to the instance that is taken back"


@pytest.mark.parametrize(
    ("path", "method", "headers", "status", "code", "words"),
    [
        ("/sim-9/drain", "POST", [], 404, "unknown_instance", "did you mean 'sim-0'"),
        ("/sim-0/stop", "POST", [], 404, "not_found", "/admin/instances/sim-0/stop"),
        ("/sim-0/drain", "GET", [], 405, "method_not_allowed", "takes POST"),
        ("", "POST", [], 405, "method_not_allowed", "takes GET"),
        ("/sim-0/drain", "POST", ["x-forwarded-for: 10.0.0.1"], 403, "not_local", "proxy"),
        ("/sim-0/drain", "POST", ["origin: http://elsewhere"], 403, "not_local", "browser"),
    ],
)
@pytest.mark.asyncio
async def test_what_is_no_command_is_answered_in_openais_shape(
    path: str, method: str, headers: list[str], status: int, code: str, words: str
) -> None:
    async with running_router(num_simulated=1) as running:
        answered, body = await admin(running, path, method, headers)
        assert answered == status
        error = body["error"]  # type: ignore[index]
        assert error["code"] == code
        assert words in error["message"]
        assert not running.router.cluster.drained


@pytest.mark.parametrize(
    ("address", "is_local"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::ffff:127.0.0.1", True), ("fe80::1%eth0", False),
     ("10.1.2.3", False), ("::ffff:10.1.2.3", False)],
)  # fmt: skip
@pytest.mark.asyncio
async def test_commands_are_taken_from_this_machine_only(
    address: str, is_local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_router(num_simulated=1) as running:
        made = HttpConnection.connection_made

        def from_elsewhere(connection: HttpConnection, transport: asyncio.BaseTransport) -> None:
            monkeypatch.setattr(transport, "get_extra_info", lambda name: (address, 1), raising=False)
            made(connection, transport)

        monkeypatch.setattr(HttpConnection, "connection_made", from_elsewhere)
        status, _ = await admin(running, "/sim-0/drain")
        assert status == (200 if is_local else 403)
        assert bool(running.router.cluster.drained) == is_local
