"""The socket into an engine: every command is answered, taken back, or refused; nobody waits for good."""

import asyncio
from pathlib import Path

import pytest

from rota.base.errors import ConfigError, EngineError
from rota.serving.engines.vllm.control import Asked, Command, ControlChannel, ask
from rota.serving.engines.vllm.tickets import Reply, Stays, Ticket

pytestmark = pytest.mark.asyncio

TICKET = Ticket("x", tuple(range(20_000)), (1, 2), 5)


async def taken(channel: ControlChannel) -> Asked:
    async with asyncio.timeout(10):
        while not (asked := channel.take()):
            await asyncio.sleep(0.005)
    (one,) = asked
    return one


async def test_a_step_takes_what_was_asked_and_its_answer_comes_back(tmp_path: Path) -> None:
    channel = ControlChannel(tmp_path / "s", lambda: False)
    try:
        waiting = asyncio.create_task(ask(channel.path, Command(hand_off="x"), timeout_seconds=10))
        asked = await taken(channel)
        assert asked.command.hand_off == "x"
        asked.answer(Reply(ticket=TICKET))
        assert (await waiting).ticket == TICKET
    finally:
        channel.close()
    assert not channel.path.exists()


async def test_an_engine_that_makes_no_step_says_so_by_itself(tmp_path: Path) -> None:
    channel = ControlChannel(tmp_path / "s", lambda: True)
    try:
        reply = await ask(channel.path, Command(hand_off="x"), timeout_seconds=10)
        assert reply.stays == Stays("it is not here (any more)")
        assert channel.take() == []
    finally:
        channel.close()


async def test_who_hangs_up_takes_the_command_back(tmp_path: Path) -> None:
    channel = ControlChannel(tmp_path / "s", lambda: False)
    try:
        with pytest.raises(EngineError, match="no answer"):
            await ask(channel.path, Command(hand_off="early"), timeout_seconds=0.2)
        async with asyncio.timeout(10):
            while channel._asked:
                await asyncio.sleep(0.005)
        waiting = asyncio.create_task(ask(channel.path, Command(hand_off="late"), timeout_seconds=10))
        asked = await taken(channel)
        assert asked.command.hand_off == "late"
        waiting.cancel()
        async with asyncio.timeout(10):
            while not asked.is_withdrawn:
                await asyncio.sleep(0.005)
        asked.answer(Reply(ticket=TICKET))
    finally:
        channel.close()


async def test_nonsense_is_refused(tmp_path: Path) -> None:
    channel = ControlChannel(tmp_path / "s", lambda: False)
    try:
        reader, writer = await asyncio.open_unix_connection(channel.path)
        writer.write(b'{"shut_down": true}\n')
        assert b"not a command" in await reader.readline()
        writer.close()
    finally:
        channel.close()
    with pytest.raises(EngineError, match="No such file"):
        await ask(channel.path, Command(hand_off="x"), timeout_seconds=1)


async def test_a_path_that_no_socket_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="107 bytes"):
        ControlChannel(tmp_path / ("x" * 120), lambda: True)
