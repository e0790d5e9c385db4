"""What lies between a client and the engine's steps, from both sides' clocks: they must be those of one machine."""

from collections.abc import Sequence

import numpy as np

from rota.base.instant import NANOSECONDS_PER_MILLISECOND
from rota.serving.bench.client import Sent
from rota.serving.calibration.steps import Steps
from rota.serving.predictors.step_time.fitted import FrontEnd

NUM_REQUESTS_MIN = 3


def front_end_of(sent: Sequence[Sent], steps: Steps) -> FrontEnd | None:
    """Both ways' medians; None if there are too few requests to tell.

    The way in is taken from requests that met an idle engine, whose next step is theirs; the way out from the first and
    last token of all, each against the last step that had ended by then.
    """
    ends = steps.at + steps.step_ns.astype(np.int64)
    ways_in: list[int] = []
    ways_out: list[int] = []
    for each in sent:
        if each.outcome != "finished" or not each.chunk_at:
            continue
        following = int(np.searchsorted(steps.at, each.sent_at))
        was_idle = 0 < following < len(steps) and ends[following - 1] < each.sent_at
        if was_idle and each.planned.class_name == "alone":
            ways_in.append(int(steps.at[following]) - each.sent_at)
        for chunk_at in (each.chunk_at[0], each.chunk_at[-1]):
            last = int(np.searchsorted(ends, chunk_at)) - 1
            if last >= 0:
                ways_out.append(chunk_at - int(ends[last]))
    if len(ways_in) < NUM_REQUESTS_MIN:
        return None
    return FrontEnd(request_ms=_median_ms(ways_in), response_ms=_median_ms(ways_out), num_requests=len(ways_out) // 2)


def _median_ms(values: Sequence[int]) -> float:
    return round(float(np.median(values)) / NANOSECONDS_PER_MILLISECOND, 3)
