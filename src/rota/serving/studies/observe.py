"""One run as the studies look at it: its summary, its columns, and how load stood over time."""

import dataclasses
from dataclasses import dataclass

from rota.base.instant import seconds
from rota.base.random_streams import RandomStreams
from rota.serving.metrics.columns import Columns, columns_of
from rota.serving.metrics.load import LoadOverTime, load_over_time
from rota.serving.metrics.summary import Summary
from rota.serving.sim.run import SimulationConfig, simulate
from rota.serving.workload.formats import recognise

DEFAULT_BLOCK = seconds(60)
"""Of a resampled trace: longer than the bursts of the public traces, and an hour holds enough of them."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What is kept of a run; some dozens of bytes for each request."""

    summary: Summary
    columns: Columns
    load: LoadOverTime


def observe(config: SimulationConfig) -> Observation:
    """Simulate, and keep what the studies need. A module-level function, so that other processes can call it."""
    result = simulate(config, with_digest=False)
    num_blocks = {spec.id: spec.limits.num_blocks for spec in result.system.instances}
    return Observation(result.summary, columns_of(result.records), load_over_time(result.samples, num_blocks))


def is_drawn(config: SimulationConfig) -> bool:
    """Whether its arrivals come from a law, so that another seed draws them anew; else they were recorded."""
    return config.rate is not None or config.workload is not None or recognise(config.trace).name == "synthetic"


def drawn_anew(config: SimulationConfig, count: int, purpose: str) -> list[SimulationConfig]:
    """The same run with `count` other seeds, a recorded trace resampled. Equal purposes of one seed give equal draws,
    others have nothing to do with each other."""
    seeds = RandomStreams(config.seed).stream(purpose)
    block = None if is_drawn(config) else DEFAULT_BLOCK
    return [dataclasses.replace(config, seed=seeds.integers(0, 2**31), resample_block=block) for _ in range(count)]
