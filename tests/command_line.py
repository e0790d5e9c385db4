"""`rota` in this process, and small files to run it on."""

import io
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from rota.base.instant import Instant, seconds
from rota.base.journal import Journal
from rota.base.random_streams import RandomStreams
from rota.cli.main import main
from rota.runtime.faults import Fault, FaultPlan
from rota.serving.assemble import SystemConfig, header_of
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.model.request import Request, RequestId
from rota.serving.predictors.step_time.profiles import load_profile
from rota.serving.sim.cluster import SimulatedCluster, WorldOptions
from rota.serving.stack import StackConfig


class Ran(NamedTuple):
    """What a command line left behind."""

    code: int
    stdout: str
    stderr: str


def rota(*words: object) -> Ran:
    """Run a command line as the console script does."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in words])
    return Ran(code, out.getvalue(), err.getvalue())


CRASH_AND_LEAVE = (
    Fault(at=Instant(600_000_000), kind="crash", target="i1"),
    Fault(at=Instant(700_000_000), kind="client_leaves", target="r-20"),
)
"""What goes wrong in `write_journal`, unless told otherwise: an instance dies and restarts, a client leaves."""


def write_journal(path: Path, *, faults: Sequence[Fault] = CRASH_AND_LEAVE) -> SimulatedCluster:
    """A short run of two small instances under far too much load, two classes, by `strict_priority`; its world."""
    stream = RandomStreams(1).stream("arrivals")
    at, arrivals = 0.0, []
    for index in range(60):
        at += stream.exponential(1 / 40)
        request = Request(
            id=RequestId(f"r-{index}"),
            arrived_at=seconds(at),
            num_prompt_tokens=stream.integers(16, 600),
            max_tokens=200,
            priority=-1 if stream.random() < 0.2 else 0,
        )
        arrivals.append((request, stream.integers(1, 120)))
    limits = InstanceLimits(num_blocks=120, max_num_seqs=16, max_num_batched_tokens=512)
    config = SystemConfig(
        stack=StackConfig(order="strict_priority"),
        instances=tuple(InstanceSpec(id=InstanceId(f"i{number}"), limits=limits) for number in range(2)),
        seed=1,
    )
    with Journal(header_of(config), path=path) as journal:
        world = SimulatedCluster(
            config,
            arrivals,
            load_profile().predictor(),
            WorldOptions(restart_after=seconds(0.5)),
            journal=journal,
            faults=FaultPlan(faults),
        )
        world.run()
    return world
