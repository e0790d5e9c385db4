"""A router whose instances have roles: prompts are computed at one, answers go on at another, and no client notices."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tests.worlds.test_router_drain import admin
from tests.worlds.test_router_engines import InProcess
from tests.worlds.test_router_failover import ask, assert_whole, body_of, without_created
from tests.worlds.test_router_hand_off import assert_nothing_lost
from tests.worlds.test_router_moves import ask_router, settling

from rota.base.journal import Journal
from rota.base.replay import replay
from rota.cli.top import _drawn
from rota.runtime.clocks import SystemClock
from rota.runtime.live import LiveLoop
from rota.serving.api import Role
from rota.serving.assemble import SystemConfig, build, build_cluster, header_of
from rota.serving.board.picture import Picture
from rota.serving.cluster.migration import Cause
from rota.serving.frontdoor.serve import Router, ServeConfig
from rota.serving.live.simulated import SimulatedEngine, simulated_engines
from rota.serving.live.watch import WatchSettings
from rota.serving.model.commands import Commit, Dispatch, Migrate, RoomRefused, SetRole, Stay, Way
from rota.serving.model.events import InstanceStarted
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.predictors.step_time.affine import AffineStepTime
from rota.serving.stack import Parameters, StackConfig
from rota.testing.engine import check_engine
from rota.testing.router import RunningRouter, running_router
from rota.testing.token_server import HABITS, KINDS, LEAK, Break, TokenServer, token_engines

POOLS = StackConfig(dispatch="pools")
STACKS = (POOLS, StackConfig(dispatch="power_of_two_by_class"))
PREFILL = InstanceId("http-0")
WATCH = WatchSettings(interval_seconds=0.05, starting_interval_seconds=0.01)
STEP_TIME = AffineStepTime(base_ms=3.0, token_us=0.0, kv_token_ns=0.0, seq_us=0.0)


@asynccontextmanager
async def split(
    breaks: Iterable[Break | None] = (), stack: StackConfig = POOLS
) -> AsyncIterator[tuple[Router, list[TokenServer], Journal]]:
    """A router over three servers, of which the first is for prompts and the others are for decodes."""
    left = list(breaks)
    servers = [TokenServer(left, created=1 + index, pace=0.004) for index in range(3)]
    journal = Journal(header_of(SystemConfig()), keep_rows=True)
    engines = await token_engines(servers, probe_timeout_seconds=1.0, hand_off=True)
    roles = {engine.id: Role.PREFILL if engine.id == PREFILL else Role.DECODE for engine in engines}
    machine = build_cluster(stack, 0)
    config = ServeConfig(port=0, watch=WATCH)
    router = Router(config, LiveLoop(SystemClock(), journal), machine, engines, roles=roles)
    async with settling(router, servers):
        yield router, servers, journal


def commands(journal: Journal, kind: type[Any]) -> list[Any]:
    return [command for row in journal.rows or () for command in row.commands if isinstance(command, kind)]


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: stack.dispatch)
@pytest.mark.asyncio
async def test_prompts_are_computed_at_one_server_and_answers_go_on_at_another(stack: StackConfig) -> None:
    usage = {"include_usage": True}
    bodies = [body_of(chat=index % 2 == 0, max_tokens=40 + index, stream_options=usage) for index in range(6)]
    async with split(stack=stack) as (router, servers, journal):
        answers = await asyncio.gather(*(ask_router(router, body) for body in bodies))
    for body, (request_id, raw) in zip(bodies, answers, strict=True):
        assert_whole(without_created(raw), body, request_id)
        assert LEAK.encode() not in raw
    assert {each.instance_id for each in commands(journal, Dispatch)} == {PREFILL}
    moves = commands(journal, Migrate)
    assert {each.way for each in moves} == {Way.HAND_OFF}
    assert {each.source for each in moves} == {PREFILL}
    assert len({each.request_id for each in moves}) == len(commands(journal, Commit)) == 6
    assert sum(server.num_pulled for server in servers[1:]) == 6
    assert not any(server.misfits for server in servers)


@pytest.mark.asyncio
async def test_who_may_not_move_is_answered_where_its_prompt_was_computed() -> None:
    bodies = [body_of(max_tokens=20, seed=7, temperature=1.0), body_of(max_tokens=20, stop=["never said"])]
    async with split() as (router, servers, journal):
        await asyncio.gather(*(ask_router(router, body) for body in bodies))
    assert not commands(journal, Migrate)
    assert [len(server.bodies) for server in servers] == [2, 0, 0]


@settings(deadline=None, max_examples=6)
@given(
    habits=st.lists(st.sampled_from(HABITS), max_size=8),
    faults=st.lists(st.none() | st.builds(Break, st.integers(0, 20), st.sampled_from(KINDS)), max_size=3),
    max_tokens=st.integers(1, 40),
    chat=st.booleans(),
    stack=st.sampled_from(STACKS),
)
def test_whatever_servers_do_when_they_are_to_hand_over_no_token_is_lost_or_doubled(
    habits: list[str], faults: list[Break | None], max_tokens: int, chat: bool, stack: StackConfig
) -> None:
    usage = {"stream_options": {"include_usage": True}}
    bodies = [body_of(chat=chat, max_tokens=max_tokens), body_of(chat=not chat, max_tokens=20, **usage)]

    assert_nothing_lost(split(faults, stack), habits, len(faults), bodies)


# --- simulated engines -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def simulated(*roles: Role, stack: StackConfig = POOLS, **more: Any) -> AsyncIterator[RunningRouter]:
    more = {"serve": ServeConfig(port=0, watch=WATCH), "step_time": STEP_TIME, **more}
    async with running_router(roles=roles, stack=stack, **more) as running:
        yield running
        await until(lambda: not any(engine._machine.unfinished() for engine in running.simulated))
        for engine in running.simulated:
            engine._machine.check()
            assert not engine._speakers and not engine._leaving and not engine._coming
        running.router.cluster.machine.check()
    difference = replay(running.journal.rows, build(running.config).by_name())
    assert difference is None, str(difference)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.01)


def words(index: int, **extra: Any) -> dict[str, Any]:
    return body_of(chat=index % 2 == 0, max_tokens=30 + index, ignore_eos=True, **extra)


def said(raw: bytes) -> list[tuple[str, int]]:
    """Each token's text and id, as the client got them."""
    choices = [choice for line in raw.split(b"\n\n") if b"{" in line for choice in json.loads(line[6:])["choices"]]
    texts = [(choice.get("delta") or choice).get("content", choice.get("text")) or "" for choice in choices]
    ids = [choice.get("token_ids") or [] for choice in choices]
    return [(text, one) for text, each in zip(texts, ids, strict=True) for one in each]


@pytest.mark.asyncio
async def test_simulated_engines_hand_over_and_say_what_one_alone_would() -> None:
    bodies = [words(index, return_token_ids=True) for index in range(6)]
    async with running_router(num_simulated=1, step_time=STEP_TIME) as alone:
        expected = [said(raw) for _, raw in await asyncio.gather(*(ask(alone, body) for body in bodies))]
    async with simulated(Role.PREFILL, Role.DECODE) as running:
        answers = await asyncio.gather(*(ask(running, body) for body in bodies))
        counts = running.router.cluster.machine.migration_counts()
    assert [said(raw) for _, raw in answers] == expected
    assert all(len(each) == 30 + index for index, each in enumerate(expected))
    assert all(raw.count(b'finish_reason":"length') == 1 for _, raw in answers)
    assert counts.num_committed == 6
    assert counts.num_bytes > 0


@pytest.mark.asyncio
async def test_an_answer_that_is_handed_over_is_as_long_as_it_would_have_been(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its length is drawn once, at its beginning; the destination neither draws nor knows another."""
    drawn: list[int] = []
    draw = SimulatedEngine._draw_length

    def drawing(engine: SimulatedEngine, *of: Any) -> int:
        drawn.append(draw(engine, *of))
        return drawn[-1]

    monkeypatch.setattr(SimulatedEngine, "_draw_length", drawing)
    step_time = AffineStepTime(base_ms=0.2, token_us=0.0, kv_token_ns=0.0, seq_us=0.0)
    async with simulated(Role.PREFILL, Role.DECODE, step_time=step_time) as running:
        bodies = [body_of(max_tokens=1000, ignore_eos=False, return_token_ids=True) for _ in range(4)]
        heard = [len(said((await ask(running, body))[1])) for body in bodies]
        assert running.router.cluster.machine.migration_counts().num_committed == 4
    assert heard == drawn
    assert len(set(drawn)) > 1


@pytest.mark.parametrize("lost", [0, 1], ids=["prefill", "decode"])
@pytest.mark.asyncio
async def test_streams_outlive_the_loss_of_either_side(lost: int) -> None:
    bodies = [words(index, return_token_ids=True) for index in range(6)]
    async with running_router(num_simulated=1, step_time=STEP_TIME) as alone:
        expected = [said(raw) for _, raw in await asyncio.gather(*(ask(alone, body) for body in bodies))]
    async with simulated(Role.PREFILL, Role.DECODE) as running:
        asking = [asyncio.create_task(ask(running, body)) for body in bodies]
        await until(lambda: len(running.simulated[lost]._speakers) >= 3)
        running.simulated[lost].lose()
        answers = await asyncio.gather(*asking)
        running.simulated[lost].come_back()
    assert [said(raw) for _, raw in answers] == expected


@pytest.mark.asyncio
async def test_who_was_lost_where_it_decoded_is_handed_on_again() -> None:
    async with simulated(Role.PREFILL, Role.DECODE, Role.DECODE) as running:
        asking = asyncio.create_task(ask(running, words(300, return_token_ids=True)))
        await until(lambda: bool(commands(running.journal, Commit)))
        first = commands(running.journal, Migrate)[0].destination
        next(engine for engine in running.simulated if engine.id == first).lose()
        assert len(said((await asking)[1])) == 330
        again = commands(running.journal, Migrate)[1:]
        assert [each.instance_id for each in commands(running.journal, Dispatch)] == ["sim-0", "sim-0"]
    assert [(each.source, each.way) for each in again] == [("sim-0", Way.HAND_OFF)]
    assert {first, again[0].destination} == {"sim-1", "sim-2"}


@pytest.mark.asyncio
async def test_where_there_is_no_room_for_blocks_the_rest_is_computed_anew() -> None:
    """Two slots at each instance for six requests: the decode instance keeps no room for most, and queues them."""
    bodies = [words(index, return_token_ids=True) for index in range(6)]
    limits = InstanceLimits(num_blocks=4096, max_num_seqs=2)
    async with simulated(Role.PREFILL, Role.DECODE, limits=limits) as running:
        answers = await asyncio.gather(*(ask(running, body) for body in bodies))
        counts = running.router.cluster.machine.migration_counts()
    assert [len(said(raw)) for _, raw in answers] == [30 + index for index in range(6)]
    assert commands(running.journal, RoomRefused)
    assert Cause.TIMEOUT not in counts.num_aborted


@pytest.mark.asyncio
async def test_clients_that_leave_in_the_middle_of_it_leave_nothing_behind() -> None:
    async with simulated(Role.PREFILL, Role.DECODE) as running:
        for delay in (0.005, 0.01, 0.015, 0.02, 0.03, 0.05):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ask(running, words(600)), delay)
        await until(lambda: not running.router.cluster.flights)


@pytest.mark.asyncio
async def test_roles_are_shown() -> None:
    async with simulated(Role.PREFILL, Role.DECODE, Role.MIXED) as running:
        _, listed = await admin(running, "", "GET")
        assert [each.get("role") for each in listed["data"]] == ["prefill", "decode", None]
        page = running.router.door.telemetry.page().decode()
        assert 'rota:instance_role{instance="sim-0",role="prefill"} 1.0' in page
        assert 'rota:instance_role{instance="sim-2",role="mixed"} 1.0' in page
        async with aiohttp.ClientSession() as session, session.get(f"{running.router.url}/ui/state") as answer:
            shown = msgspec.json.decode(await answer.read(), type=Picture)
        assert [each.role for each in shown.instances] == [Role.PREFILL, Role.DECODE, Role.MIXED]
        console = Console(width=140, record=True, file=io.StringIO())
        console.print(*_drawn(shown, "router"))
        assert "sim-0     prefill  ready" in console.export_text()


@pytest.mark.asyncio
async def test_an_instance_that_is_idle_takes_the_other_role() -> None:
    """One of two prefill instances has nothing to do while the decode instance has: it decodes from then on."""
    stack = StackConfig(dispatch="power_of_two_by_class", parameters=Parameters(dispatch={"flip_after_seconds": 0.1}))
    limits = InstanceLimits(num_blocks=40)
    async with simulated(Role.PREFILL, Role.PREFILL, Role.DECODE, stack=stack, limits=limits) as running:
        asking = asyncio.create_task(ask(running, words(201, prompt="tell me more " * 40)))
        await until(lambda: bool(commands(running.journal, SetRole)))
        await asking
        (order,) = commands(running.journal, SetRole)
        assert order.role == Role.DECODE
        started = [row.event for row in running.journal.rows or () if isinstance(row.event, InstanceStarted)]
        assert (started[-1].spec.id, started[-1].spec.role) == (order.instance_id, Role.DECODE)
        _, listed = await admin(running, "", "GET")
        assert sorted(each["role"] for each in listed["data"]) == ["decode", "decode", "prefill"]
        (left,) = {"sim-0", "sim-1"} - {order.instance_id}
        await ask(running, words(1))
        assert commands(running.journal, Dispatch)[-1].instance_id == left
        assert not [each for each in commands(running.journal, Stay) if "cannot go" in each.reason]


@pytest.mark.asyncio
async def test_simulated_engines_that_hand_over_conform() -> None:
    @asynccontextmanager
    async def engine() -> AsyncIterator[Any]:
        config = SystemConfig(instances=(InstanceSpec(InstanceId("sim"), InstanceLimits(num_blocks=1024)),))
        loop = LiveLoop(SystemClock())
        (made,) = simulated_engines(loop, build(config), config, STEP_TIME, hands_over=True)
        yield InProcess(made)
        await made.stop()
        loop.close()

    await check_engine(engine)
