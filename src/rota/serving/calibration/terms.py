"""Step time as a sum of terms that mean something: each costs nothing at zero and never falls as its quantity grows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rota.serving.calibration.steps import Floats, Steps

_PLACES = 6
"""Significant digits that a profile keeps."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A form of the sum: where the curves over tokens and over sequences may bend. All else is straight."""

    name: str
    token_knots: tuple[int, ...] = (0,)
    decode_knots: tuple[int, ...] = (0,)


SHAPES = (
    Shape("straight"),
    Shape("bent", (0, 4, 16, 64, 256, 1024), (0, 8, 32, 128)),
    Shape(
        "finely bent",
        (0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192),
        (0, 2, 4, 8, 16, 24, 32, 64, 128, 256),
    ),
)
"""Simplest first."""


def matrix(steps: Steps, shape: Shape) -> Floats:
    """One row a step, one column a term; `parameters_of` turns its weights into parameters."""
    return np.stack(
        [
            np.ones(len(steps)),
            steps.decode_kv,
            steps.prefill_pairs,
            steps.prefill_context,
            steps.num_prefills,
            *_pieces(steps.num_tokens, shape.token_knots),
            *_pieces(steps.num_decodes, shape.decode_knots),
        ],
        axis=1,
    )


def parameters_of(weights: Floats, shape: Shape) -> dict[str, Any]:
    """The parameters of `CalibratedStepTime`, from the weights of `matrix`'s columns in ns."""
    base, decode_kv, pairs, context, prefill, *slopes = (float(weight) for weight in weights)
    num_knots = len(shape.token_knots)
    return {
        "base_ms": max(_rounded(base / 1e6), 1e-6),
        "tokens_us": _points(shape.token_knots, slopes[:num_knots]),
        "decodes_us": _points(shape.decode_knots, slopes[num_knots:]),
        "decode_kv_token_ns": _rounded(decode_kv),
        "prefill_us": _rounded(prefill / 1e3),
        "prefill_pair_ns": _rounded(pairs),
        "prefill_context_token_ns": _rounded(context),
    }


def predicted(parameters: Mapping[str, Any], steps: Steps) -> Floats:
    """What `CalibratedStepTime` with these parameters says of the steps, in ns, but for rounding."""
    return np.asarray(
        parameters["base_ms"] * 1e6
        + _curve(parameters["tokens_us"], steps.num_tokens)
        + _curve(parameters["decodes_us"], steps.num_decodes)
        + parameters["decode_kv_token_ns"] * steps.decode_kv
        + parameters["prefill_us"] * 1e3 * steps.num_prefills
        + parameters["prefill_pair_ns"] * steps.prefill_pairs
        + parameters["prefill_context_token_ns"] * steps.prefill_context
    )


def _curve(points: Sequence[Sequence[float]], x: Floats) -> Floats:
    """In ns: straight between points in us, and on beyond the last."""
    at, values = (np.asarray(column, dtype=np.float64) for column in zip(*points, strict=True))
    slope = (values[-1] - values[-2]) / (at[-1] - at[-2])
    return np.asarray(1e3 * (np.interp(x, at, values) + slope * np.maximum(0.0, x - at[-1])))


def _pieces(quantity: Floats, knots: tuple[int, ...]) -> list[Floats]:
    """How much of the quantity lies between each knot and the next."""
    uppers = (*knots[1:], np.inf)
    return [np.clip(quantity, low, high) - low for low, high in zip(knots, uppers, strict=True)]


def _points(knots: tuple[int, ...], slopes: list[float]) -> list[list[float]]:
    """A curve's points in µs. Beyond the last knot it goes on as from there to one point more."""
    far = max(2 * knots[-1], knots[-1] + 1)
    points: list[list[float]] = [[0, 0.0]]
    for (low, slope), high in zip(zip(knots, slopes, strict=True), (*knots[1:], far), strict=True):
        points.append([high, _rounded(points[-1][1] + slope * (high - low) / 1e3)])
    return points


def _rounded(value: float) -> float:
    return float(f"{value:.{_PLACES}g}")
