"""Step time as fitted to the steps of one live engine by `rota calibrate`."""

from collections.abc import Sequence
from itertools import pairwise

from rota.base.instant import Instant
from rota.serving.predictors.step_time.surface import Curve

_FRACTION_BITS = 20
"""Weights are integers of 2**-20 ns, so that equal work gives equal time whichever way it is added up."""

_POINTS_MAX = 1000
_WEIGHT_MAX = 1e12

Points = list[tuple[int, float]]
FLAT: Points = [(0, 0.0), (1, 0.0)]


class CalibratedStepTime:
    """A step costs `base + tokens(new tokens) + decodes(their number) + what attention reads`, each term fitted to the
    steps of a live engine and none of them falling.

    `tokens` and `decodes` are curves through given points: straight between them and on beyond the last. Its error on
    steps that the fit never saw is in the profile that holds it. It says nothing of other engines, and little of
    batches larger than any that the engine ran.
    """

    def __init__(
        self,
        *,
        base_ms: float,
        tokens_us: Points = FLAT,
        decodes_us: Points = FLAT,
        decode_kv_token_ns: float = 0.0,
        prefill_us: float = 0.0,
        prefill_pair_ns: float = 0.0,
        prefill_context_token_ns: float = 0.0,
    ) -> None:
        """What a step costs: `base_ms` any, `tokens_us` by the new tokens of all its sequences (matrix products),
        `decodes_us` by its number of decodes beside their tokens, `decode_kv_token_ns` each token of context that a
        decode reads, `prefill_us` each prefill chunk, `prefill_context_token_ns` each token of context that a chunk
        reads, `prefill_pair_ns` each pair of a new token and one at or before it (attention).

        Raises ValueError unless `base_ms` is positive, the others are not negative, and curves rise from (0, 0).
        """
        weights = {
            "base_ms": base_ms,
            "decode_kv_token_ns": decode_kv_token_ns,
            "prefill_us": prefill_us,
            "prefill_pair_ns": prefill_pair_ns,
            "prefill_context_token_ns": prefill_context_token_ns,
        }
        for name, value in weights.items():
            if not 0 <= value < _WEIGHT_MAX or (name == "base_ms" and value < 1e-6):
                raise ValueError(f"{name} must be {'positive' if name == 'base_ms' else 'at least 0'}, got {value!r}")
        one = 1 << _FRACTION_BITS
        self._base = round(base_ms * 1e6 * one)
        self._tokens = _curve("tokens_us", tokens_us)
        self._decodes = _curve("decodes_us", decodes_us)
        self._decode_kv = round(decode_kv_token_ns * one)
        self._prefill = round(prefill_us * 1e3 * one)
        self._half_pair = round(prefill_pair_ns * one / 2)
        self._context = round(prefill_context_token_ns * one)

    def step_time(
        self, *, prefills: Sequence[tuple[int, int]], num_decodes: int, decode_kv_tokens: int, now: Instant = Instant(0)
    ) -> int:
        """Nanoseconds for one step; 0 for an empty one."""
        if not prefills and not num_decodes:
            return 0
        num_tokens, half_pairs, num_context = num_decodes, 0, 0
        for new_tokens, context_tokens in prefills:
            num_tokens += new_tokens
            num_context += context_tokens
            half_pairs += new_tokens * (2 * context_tokens + new_tokens)
        total = self._base + self._decode_kv * decode_kv_tokens + self._half_pair * half_pairs
        total += self._prefill * len(prefills) + self._context * num_context
        total += self._tokens(num_tokens) + self._decodes(num_decodes)
        return total >> _FRACTION_BITS

    def decode_run(self, num_decodes: int, decode_kv_tokens: int, num_steps: int) -> list[int]:
        """Nanoseconds of each of `num_steps` decode-only steps in a row; see `DecodeRunPredictor`."""
        if not num_decodes:
            return [0] * num_steps
        first = self._base + self._tokens(num_decodes) + self._decodes(num_decodes) + self._decode_kv * decode_kv_tokens
        rise = self._decode_kv * num_decodes
        return [(first + step * rise) >> _FRACTION_BITS for step in range(num_steps)]


def _curve(name: str, points: Points) -> Curve:
    if not 2 <= len(points) <= _POINTS_MAX:
        raise ValueError(f"{name} must have from 2 to {_POINTS_MAX} points, got {len(points)}")
    if points[0] != (0, 0.0):
        raise ValueError(f"{name} must begin with the point [0, 0.0], got {list(points[0])}")
    for (at, value), (next_at, next_value) in pairwise(points):
        if next_at <= at or not value <= next_value < _WEIGHT_MAX:
            raise ValueError(f"{name} must rise from [{at}, {value!r}] to [{next_at}, {next_value!r}]")
    return Curve([at for at, _ in points], [value * 1e3 * (1 << _FRACTION_BITS) for _, value in points])
