"""Queue length and memory over time, in bounded space."""

from collections.abc import Sequence

from rota.base.instant import Instant
from rota.serving.metrics.definitions import Samples
from rota.serving.model.instance import InstanceId
from rota.serving.sim.instance import SimulatedMachine

NUM_POINTS_MAX = 4_000
"""For each instance; twice what a plot can show."""


class Sampler:
    """Takes the state of instances after their steps; where a series has grown too long, it keeps every other point and
    doubles the time between two."""

    def __init__(self, instance_ids: Sequence[InstanceId]) -> None:
        self.series = {instance_id: Samples() for instance_id in instance_ids}
        self._spacing = dict.fromkeys(instance_ids, 0)
        self._next_at = dict.fromkeys(instance_ids, 0)

    def add(self, instance_id: InstanceId) -> None:
        """One more instance."""
        self.series[instance_id] = Samples()
        self._spacing[instance_id] = self._next_at[instance_id] = 0

    def on_step(self, instance_id: InstanceId, at: Instant, machine: SimulatedMachine) -> None:
        """Note how an instance stands, unless it was noted a moment ago."""
        if at < self._next_at[instance_id]:
            return
        series = self.series[instance_id]
        series.at.append(at)
        series.running.append(len(machine.running))
        series.waiting.append(len(machine.waiting))
        series.free_blocks.append(machine.num_free_blocks)
        if len(series.at) >= NUM_POINTS_MAX:
            for values in (series.at, series.running, series.waiting, series.free_blocks):
                del values[::2]
            span = series.at[-1] - series.at[0]
            self._spacing[instance_id] = max(1, 2 * span // NUM_POINTS_MAX)
        self._next_at[instance_id] = at + self._spacing[instance_id]
