"""A router over simulated engines, in this process and on a port of its own: to try clients and policies on."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from rota.base.journal import Journal, header_for
from rota.runtime.clocks import SystemClock
from rota.runtime.live import LiveLoop
from rota.serving.api import StepTimePredictor
from rota.serving.assemble import SystemConfig, build
from rota.serving.engines.engine import Engine
from rota.serving.frontdoor.serve import Router, ServeConfig
from rota.serving.live.fleet import Fleet, LocalFleet
from rota.serving.live.simulated import SimulatedEngine, one_more, simulated_engines
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec, Role
from rota.serving.predictors.step_time.affine import AffineStepTime
from rota.serving.stack import StackConfig


@dataclass(frozen=True)
class RunningRouter:
    """What a test holds of a router that runs."""

    router: Router
    config: SystemConfig
    journal: Journal
    simulated: Sequence[SimulatedEngine]

    @property
    def url(self) -> str:
        return self.router.url


@asynccontextmanager
async def running_router(
    *,
    num_simulated: int = 2,
    engines: Sequence[Engine] = (),
    stack: StackConfig | None = None,
    limits: InstanceLimits | None = None,
    step_time: StepTimePredictor | None = None,
    serve: ServeConfig | None = None,
    seed: int = 0,
    ready_seconds: float = 10.0,
    scales: bool = False,
    fleet: type[LocalFleet] | Fleet = LocalFleet,
    roles: Sequence[Role] = (),
) -> AsyncIterator[RunningRouter]:
    """Run a router over simulated engines `sim-0`, `sim-1`, …, and over any others that are given; its journal keeps
    its rows. Steps take about a millisecond unless `step_time` says otherwise. With `scales`, a `fleet`
    of simulated engines is there for the stack's scaling policy, or any other that is given. `roles` are those of the
    simulated engines, one each, which then hand requests over."""
    specs = tuple(
        InstanceSpec(InstanceId(f"sim-{index}"), limits or InstanceLimits(num_blocks=4096), role)
        for index, role in enumerate(roles or (Role.MIXED,) * num_simulated)
    )
    config = SystemConfig(stack=stack or StackConfig(), instances=specs, seed=seed)
    journal = Journal(header_for(config, seed), keep_rows=True)
    loop = LiveLoop(SystemClock(), journal)
    system = build(config)
    predictor = step_time or AffineStepTime(base_ms=1.0, token_us=0.0, kv_token_ns=0.0, seq_us=0.0)
    simulated = simulated_engines(loop, system, config, predictor, hands_over=bool(roles))
    more: Fleet | None = None
    if scales:
        another = partial(one_more, loop, config, step_time=predictor)
        more = fleet(another) if isinstance(fleet, type) else fleet
    router = Router(serve or ServeConfig(port=0), loop, system.cluster, [*simulated, *engines], more, config.roles)
    async with router:
        await router.wait_ready(len(router.engines), timeout_seconds=ready_seconds)
        yield RunningRouter(router, config, journal, simulated)
