"""What a fit is worth, on steps that it never saw, by phase."""

import numpy as np

from rota.serving.calibration.steps import PHASES, Flags, Floats, Steps
from rota.serving.predictors.step_time.fitted import PhaseError


def errors_of(predicted: Floats, measured: Floats, steps: Steps) -> list[PhaseError]:
    """A row for all steps and one for each phase that occurs."""
    rows = [_row("all", predicted, measured, np.ones(len(steps), dtype=bool))]
    for index, phase in enumerate(PHASES):
        chosen: Flags = steps.phase == index
        if chosen.any():
            rows.append(_row(phase, predicted, measured, chosen))
    return rows


def _row(phase: str, predicted: Floats, measured: Floats, chosen: Flags) -> PhaseError:
    off = np.abs(predicted[chosen] / measured[chosen] - 1)
    return PhaseError(
        phase=phase,
        num_steps=int(chosen.sum()),
        mape=_share(off.mean()),
        p90=_share(np.quantile(off, 0.9)),
        bias=_share(predicted[chosen].sum() / measured[chosen].sum() - 1),
    )


def noise_of(steps: Steps, times: Floats) -> float | None:
    """By how much two decode steps differ that are alike: one after the other, of the same sequences. No model that
    sees batches can err less. Mean deviation of one step from their mean, as a share; None if there are none."""
    alike = (steps.phase[1:] == 0) & (steps.phase[:-1] == 0) & (steps.num_decodes[1:] == steps.num_decodes[:-1])
    alike &= steps.decode_kv[1:] - steps.decode_kv[:-1] == steps.num_decodes[1:]
    if not alike.any():
        return None
    first, second = times[:-1][alike], times[1:][alike]
    # The difference of two is wider than the deviation of one, by the root of two for most shapes of noise.
    return _share(np.mean(np.abs(first - second) / (first + second)) * 2 / np.sqrt(2))


def _share(value: float) -> float:
    return round(float(value), 4)
