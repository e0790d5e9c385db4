"""From the steps of a live engine to a profile of it, with its error inside."""

from collections.abc import Sequence

import msgspec
import numpy as np

from rota.base.errors import DataError
from rota.base.instant import NANOSECONDS_PER_MILLISECOND, NANOSECONDS_PER_SECOND
from rota.serving.calibration.errors import errors_of, noise_of
from rota.serving.calibration.fit import Fit, choose
from rota.serving.calibration.steps import Floats, Steps
from rota.serving.calibration.terms import parameters_of
from rota.serving.engines.vllm.facts import EngineFacts, StepRecord
from rota.serving.predictors.step_time.fitted import Calibration, FrontEnd
from rota.serving.predictors.step_time.profiles import Limits, Profile, StepTimeChoice

_GAP_QUANTILE = 0.99
"""Gaps beyond are pauses of the machine, not work of the engine's."""


class Origin(msgspec.Struct, frozen=True):
    """What the one who measured knows beside the steps."""

    source: str
    date: str
    host: str
    accelerator: str


def calibrate(
    steps: Steps,
    records: Sequence[StepRecord],
    engine: EngineFacts | None,
    origin: Origin,
    *,
    front_end: FrontEnd | None = None,
) -> Profile:
    """Fit a profile to the steps that are not held out, and judge it by those that are.

    `engine` is what the engine said of itself; without it the profile has the facts' number of blocks and the limits
    that the steps were seen to reach. Raises `DataError` if nothing is left to fit or to judge by.
    """
    held_out = steps.held_out
    if not held_out.any() or held_out.all():
        raise DataError(f"{origin.source}: too few stretches to hold some out", hint="load the engine for longer")
    fitted, judged = steps.where(~held_out), steps.where(held_out)
    device = "unknown" if engine is None else engine.device
    chosen = choose(fitted, fitted.undisturbed(device)).scaled_to(fitted, fitted.step_ns)
    parameters = parameters_of(chosen.weights, chosen.shape)
    predicted = chosen.times(judged)
    limits = Limits(**msgspec.structs.asdict(engine.limits)) if engine is not None else _seen_limits(records)
    calibration = Calibration(
        engine="unknown" if engine is None else engine.engine,
        model="unknown" if engine is None else engine.model,
        device=device,
        dtype="unknown" if engine is None else engine.dtype,
        date=origin.date,
        host=origin.host,
        shape=chosen.shape.name,
        num_steps=len(fitted),
        num_held_out=len(judged),
        busy_seconds=round(float(steps.step_ns.sum()) / NANOSECONDS_PER_SECOND, 1),
        limits=None if engine is None else engine.limits,
        noise=noise_of(steps, steps.step_ns),
        cpu_mape=_cpu_error(fitted, judged, chosen),
        front_end=front_end,
        errors=errors_of(predicted, judged.step_ns, judged),
    )
    return Profile(
        model=calibration.model,
        accelerator=origin.accelerator,
        source=origin.source,
        step_time=StepTimeChoice("calibrated", parameters),
        limits=limits,
        step_overhead_ms=round(_overhead(fitted) / NANOSECONDS_PER_MILLISECOND, 4),
        front_end_ms=0.0 if front_end is None else round(front_end.total_ms, 3),
        calibration=calibration,
    )


def _overhead(steps: Steps) -> float:
    """Mean time between two steps of a busy engine, in ns, without the longest pauses."""
    gaps = steps.gap_ns[~np.isnan(steps.gap_ns)]
    if not len(gaps):
        return 0.0
    return float(gaps[gaps <= np.quantile(gaps, _GAP_QUANTILE)].mean())


def _cpu_error(fitted: Steps, judged: Steps, chosen: Fit) -> float | None:
    """Error of the same shape on CPU time; None where that was not recorded."""
    if np.isnan(fitted.cpu_ns).any() or np.isnan(judged.cpu_ns).any():
        return None
    of_cpu = choose(fitted, fitted.cpu_ns, [chosen.shape]).scaled_to(fitted, fitted.cpu_ns)
    times: Floats = of_cpu.times(judged)
    return errors_of(times, judged.cpu_ns, judged)[0].mape


def _seen_limits(records: Sequence[StepRecord]) -> Limits:
    """What the steps themselves show of an engine's limits: its blocks, and the largest batches."""
    return Limits(
        num_blocks=max(record.num_blocks for record in records),
        max_num_seqs=max(1, *(record.num_running for record in records)),
        max_num_batched_tokens=max(1, *(record.num_prefill_tokens + record.num_decodes for record in records)),
    )
