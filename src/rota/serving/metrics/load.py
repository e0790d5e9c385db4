"""How a fleet stood over time: queue and memory of all its instances together, on one grid of instants."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rota.base.instant import NANOSECONDS_PER_SECOND
from rota.serving.metrics.definitions import Samples
from rota.serving.model.instance import InstanceId

NUM_POINTS = 600
"""As many as a chart can show."""


@dataclass(frozen=True, slots=True)
class LoadOverTime:
    """Arrays of one length; requests are summed over the instances, blocks are a share of all blocks."""

    seconds: npt.NDArray[np.float64]
    """Since the first sample."""
    running: npt.NDArray[np.int64]
    waiting: npt.NDArray[np.int64]
    share_in_use: npt.NDArray[np.float64]
    """Of the fleet's KV blocks."""


def load_over_time(
    samples: Mapping[InstanceId, Samples], num_blocks: Mapping[InstanceId, int], num_points: int = NUM_POINTS
) -> LoadOverTime:
    """The fleet's load at `num_points` instants, evenly apart; between two samples an instance stands as it did at the
    earlier one, and before its first it is idle."""
    seen = {key: series for key, series in samples.items() if series.at}
    if not seen:
        empty = np.zeros(0)
        return LoadOverTime(empty, empty.astype(np.int64), empty.astype(np.int64), empty)
    begins = min(series.at[0] for series in seen.values())
    ends = max(series.at[-1] for series in seen.values())
    grid = np.linspace(begins, ends, num_points)
    running, waiting = np.zeros(num_points, dtype=np.int64), np.zeros(num_points, dtype=np.int64)
    in_use = np.zeros(num_points)
    for key, series in seen.items():
        index = np.searchsorted(np.asarray(series.at), grid, side="right") - 1
        running += _stepped(series.running, index)
        waiting += _stepped(series.waiting, index)
        in_use += num_blocks[key] - _stepped(series.free_blocks, index, before=num_blocks[key])
    total = sum(num_blocks.values())
    return LoadOverTime((grid - begins) / NANOSECONDS_PER_SECOND, running, waiting, in_use / total)


def _stepped(values: Sequence[int], index: npt.NDArray[np.intp], before: int = 0) -> npt.NDArray[np.int64]:
    return np.where(index >= 0, np.asarray(values, dtype=np.int64)[np.maximum(index, 0)], before)
