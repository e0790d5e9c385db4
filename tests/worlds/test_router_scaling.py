"""A running router that starts and stops engines while streams are under way."""

import asyncio
from collections.abc import Sequence

import pytest
from tests.worlds.test_router import FAST_WATCH, MESSAGES, SLOW_STEPS, assert_nothing_lost, client_of, until

from rota.base.errors import ConfigError, EngineError
from rota.base.instant import milliseconds
from rota.serving.api import NOTHING, FleetRules, FleetView, Start, StartOffer, StartSource, Stop
from rota.serving.cluster.lifecycles import MemberState
from rota.serving.engines.engine import Engine
from rota.serving.frontdoor.serve import ServeConfig
from rota.serving.live.fleet import LocalFleet
from rota.serving.live.simulated import SimulatedEngine
from rota.serving.model.commands import Dispatch, StartInstance
from rota.serving.model.events import StartFailed
from rota.serving.model.instance import InstanceId
from rota.serving.stack import StackConfig
from rota.testing.router import RunningRouter, running_router

WISHES: list[Start | Stop] = []
"""What the policy of these tests wishes next. A running router has one policy, and each test its own router."""


class OnDemand:
    requires = NOTHING
    interval_seconds = 0.25

    def plan(self, fleet: FleetView) -> Sequence[Start | Stop]:
        shown = {view.id for view in fleet.instances if not view.is_draining}
        wishes = [each for each in WISHES if isinstance(each, Start) or each.instance_id in shown]
        WISHES.clear()
        return wishes


STACK = StackConfig(
    dispatch="round_robin",
    scaling="tests.worlds.test_router_scaling:OnDemand",
    fleet=FleetRules(min_instances=1, max_instances=3, cool_down_seconds=0.0, retry_seconds=0.1),
)
SERVE = ServeConfig(port=0, watch=FAST_WATCH)
NEW = InstanceId("scaled-1")


@pytest.fixture(autouse=True)
def no_wishes():
    WISHES.clear()


async def ask(running: RunningRouter, num_tokens: int) -> int:
    """Stream an answer; returns how many events with text came."""
    num_seen = 0
    stream = await client_of(running).chat.completions.create(
        model="m", messages=MESSAGES, max_tokens=num_tokens, stream=True, extra_body={"ignore_eos": True}
    )
    async for event in stream:
        num_seen += bool(event.choices and event.choices[0].delta.content)
    return num_seen


def dispatched_to(running: RunningRouter, instance_id: InstanceId) -> int:
    commands = [command for row in running.journal.rows for command in row.commands]
    return sum(isinstance(each, Dispatch) and each.instance_id == instance_id for each in commands)


@pytest.mark.asyncio
async def test_engines_start_and_drain_under_load_and_no_stream_is_lost() -> None:
    async with running_router(num_simulated=1, step_time=SLOW_STEPS, serve=SERVE, stack=STACK, scales=True) as running:
        router = running.router
        early = [asyncio.ensure_future(ask(running, 60)) for _ in range(3)]
        WISHES.append(Start("more"))
        await until(lambda: NEW in router.cluster.statuses, "the new instance is ready")
        later = [asyncio.ensure_future(ask(running, 40)) for _ in range(6)]
        await until(lambda: dispatched_to(running, NEW) >= 2, "it gets its share")
        WISHES.append(Stop(NEW, "fewer"))
        fleet = router.cluster.machine.fleet
        assert fleet is not None
        await until(lambda: fleet.states().get(NEW) is not MemberState.SERVING, "it drains")
        before = dispatched_to(running, NEW)
        last = [asyncio.ensure_future(ask(running, 5)) for _ in range(4)]
        counts = await asyncio.gather(*early, *later, *last)
        assert counts == [60] * 3 + [40] * 6 + [5] * 4
        assert dispatched_to(running, NEW) == before, "one that drains gets nothing"
        await until(lambda: NEW not in router.cluster.engines, "it is stopped when it is empty")
        await until(lambda: NEW not in fleet.states(), "and gone")
        assert [watch.engine.id for watch in router.watches] == ["sim-0"]
        assert_nothing_lost(running)


class Unable(LocalFleet):
    """No engine can be had, the first two times."""

    num_asked = 0

    async def start(self, instance_id: InstanceId, source: StartSource) -> Engine:
        self.num_asked += 1
        if self.num_asked <= 2:
            raise EngineError("there is no room")
        return await super().start(instance_id, source)


@pytest.mark.asyncio
async def test_a_start_that_fails_is_told_and_tried_again() -> None:
    async with running_router(num_simulated=1, serve=SERVE, stack=STACK, scales=True, fleet=Unable) as running:

        def orders() -> list[StartInstance]:
            commands = [command for row in running.journal.rows for command in row.commands]
            return [command for command in commands if isinstance(command, StartInstance)]

        async def wish_on() -> None:
            while len(running.router.cluster.statuses) < 2:
                if not WISHES:
                    WISHES.append(Start("more"))
                await asyncio.sleep(0.05)

        await asyncio.wait_for(wish_on(), 30)
        failed = [row.event for row in running.journal.rows if isinstance(row.event, StartFailed)]
        assert [each.reason for each in failed] == ["there is no room"] * 2
        assert len(orders()) >= 3


@pytest.mark.asyncio
async def test_one_that_dies_while_it_drains_is_stopped_and_its_requests_fail_or_go_on() -> None:
    async with running_router(num_simulated=2, step_time=SLOW_STEPS, serve=SERVE, stack=STACK, scales=True) as running:
        asked = [asyncio.ensure_future(ask(running, 200)) for _ in range(2)]
        await until(lambda: len(running.simulated[0]._machine.unfinished()) == 1, "each has one")
        WISHES.append(Stop(InstanceId("sim-0"), "fewer"))
        fleet = running.router.cluster.machine.fleet
        assert fleet is not None
        await until(lambda: fleet.states()[InstanceId("sim-0")] is MemberState.LEAVING, "it drains")
        running.simulated[0].lose()
        await until(lambda: "sim-0" not in running.router.cluster.engines, "it is stopped, though it was not empty")
        ended = await asyncio.gather(*asked, return_exceptions=True)
        assert 200 in ended
        assert await ask(running, 3) == 3


@pytest.mark.asyncio
async def test_a_stack_that_scales_needs_a_fleet() -> None:
    with pytest.raises(ConfigError, match="wants instances started"):
        async with running_router(num_simulated=1, stack=STACK):
            pass


def test_offers_are_told_as_starts_were_seen_here() -> None:
    fleet = LocalFleet(lambda instance_id: _never(), milliseconds(5))
    assert list(fleet.offers()) == [StartOffer(StartSource.PAGE_CACHE, milliseconds(5))]


def _never() -> SimulatedEngine:
    raise AssertionError("nothing is started")
