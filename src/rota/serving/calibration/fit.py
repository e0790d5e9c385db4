"""Fits the terms of a step's time: no term may be negative, single disturbed steps count for little, and which shape is
worth its parameters is asked of stretches that the fit at hand has not seen."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rota.serving.calibration.steps import Flags, Floats, Ints, Steps
from rota.serving.calibration.terms import SHAPES, Shape, matrix

_NUM_FOLDS = 4
_NUM_ROUNDS = 8
_HUBER = 1.5
"""Residuals beyond so many deviations count in proportion, not squared."""
_DEVIATION_MIN = 0.01
_OUTLIER = 5.0
"""A step that takes longer than so many times what it should counts as that long in the sum of all."""
_WORTH = 0.97
"""A shape with more parameters must bring the error below so much of the simpler one's."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A shape and the weights of its columns, in ns."""

    shape: Shape
    weights: Floats
    inner_errors: dict[str, float]
    """Mean relative error of each shape in the cross-validation that chose among them."""

    def times(self, steps: Steps) -> Floats:
        """What the fit says the steps take, in ns."""
        return np.asarray(matrix(steps, self.shape) @ self.weights)

    def scaled_to(self, steps: Steps, times: Floats) -> "Fit":
        """The same, scaled so that the sum of these times is right: latencies are sums of steps, and steps that were
        disturbed, which only ever take longer, are a part of them. A pause of the machine is not."""
        said = self.times(steps)
        factor = float(np.minimum(times, _OUTLIER * said).sum() / said.sum())
        return Fit(self.shape, self.weights * factor, self.inner_errors)


def choose(steps: Steps, target: Floats, shapes: Sequence[Shape] = SHAPES) -> Fit:
    """The simplest shape that errs hardly more than the best, fitted to all of `steps`.

    Each shape is judged by whole stretches that were left out of its fit, in turn. `target` is the time to fit, in ns.
    """
    folds = _folds(steps.stretch)
    errors = {shape.name: _inner_error(steps, target, shape, folds) for shape in shapes}
    best = shapes[0]
    for shape in shapes[1:]:
        if errors[shape.name] < _WORTH * errors[best.name]:
            best = shape
    return Fit(best, fit(matrix(steps, best), target), errors)


def fit(columns: Floats, target: Floats) -> Floats:
    """Weights that are not negative, least squares of relative errors, with those of outliers held down (Huber's
    weights, found anew in each of a few rounds)."""
    scale = 1.0 / target
    weights = scale
    solution = np.zeros(columns.shape[1])
    for _ in range(_NUM_ROUNDS):
        solution = _not_negative(columns * weights[:, None], target * weights)
        off = np.abs(columns @ solution - target) * scale
        bound = _HUBER * max(_DEVIATION_MIN, 1.4826 * float(np.median(off)))
        weights = scale * np.sqrt(np.minimum(1.0, bound / np.maximum(off, 1e-12)))
    return solution


def _inner_error(steps: Steps, target: Floats, shape: Shape, folds: Ints) -> float:
    columns = matrix(steps, shape)
    off: list[Floats] = []
    for fold in np.unique(folds):
        out: Flags = folds == fold
        if out.all():
            continue
        off.append(np.abs(columns[out] @ fit(columns[~out], target[~out]) / target[out] - 1))
    return float(np.mean(np.concatenate(off))) if off else 0.0


def _folds(stretch: Ints) -> Ints:
    """A fold for each step, the same for all of a stretch."""
    _, rank = np.unique(stretch, return_inverse=True)
    return np.asarray(rank % _NUM_FOLDS, dtype=np.int64)


def _not_negative(columns: Floats, target: Floats) -> Floats:
    """Least squares with no negative weight (Lawson and Hanson, Solving Least Squares Problems, chapter 23), by normal
    equations of columns of unit length."""
    size = np.sqrt((columns**2).sum(axis=0))
    used = size > 0
    scaled = columns[:, used] / size[used]
    gram, moment = scaled.T @ scaled, scaled.T @ target
    num = len(moment)
    chosen = np.zeros(num, dtype=bool)
    x = np.zeros(num)
    tolerance = 1e-10 * float(np.abs(moment).max(initial=1e-300))
    for _ in range(3 * num):
        gradient = np.where(chosen, -np.inf, moment - gram @ x)
        best = int(np.argmax(gradient))
        if chosen.all() or gradient[best] <= tolerance:
            break
        chosen[best] = True
        while True:
            trial = np.zeros(num)
            trial[chosen] = _solved(gram[np.ix_(chosen, chosen)], moment[chosen])
            below = chosen & (trial <= 0)
            if not below.any():
                x = trial
                break
            share = float(np.min(x[below] / np.maximum(x[below] - trial[below], 1e-300)))
            x = x + share * (trial - x)
            chosen &= x > 1e-12
            x[~chosen] = 0.0
            if not chosen.any():
                break
    result = np.zeros(columns.shape[1])
    result[used] = x / size[used]
    return result


def _solved(gram: Floats, moment: Floats) -> Floats:
    # Columns may be the same in all steps that there are; then a trace of damping shares the weight between them.
    return np.asarray(np.linalg.solve(gram + 1e-11 * np.eye(len(moment)), moment))
