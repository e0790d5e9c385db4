"""One run as the studies look at it: its summary, its columns, and how load stood over time."""

from dataclasses import dataclass

from rota.serving.metrics.columns import Columns, columns_of
from rota.serving.metrics.load import LoadOverTime, load_over_time
from rota.serving.metrics.summary import Summary
from rota.serving.sim.run import SimulationConfig, simulate


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
