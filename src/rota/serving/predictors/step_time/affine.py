"""Step time as a weighted sum of what is in the step."""

from collections.abc import Sequence

from rota.base.instant import Instant

_FRACTION_BITS = 20
"""Weights are integers of 2**-20 ns, so that equal work gives equal time whichever way it is added up."""


class AffineStepTime:
    """A step costs `base_ms + token_us * new tokens + kv_token_ns * context tokens + seq_us * sequences`.

    New tokens are those of prefills and one for each decode; context tokens are those that any of them reads. Good
    for theory and for an engine of which little is known. The defaults are the best such sum for Llama-3.1-8B on one
    A100: 7 % off its table on average and 22 % at most, where matrix products jump by a tile.
    """

    def __init__(
        self, *, base_ms: float = 10.7, token_us: float = 54.5, kv_token_ns: float = 82.0, seq_us: float = 0.0
    ) -> None:
        """Raise ValueError unless `base_ms` is positive and the others are not negative."""
        weights = {"base_ms": base_ms, "token_us": token_us, "kv_token_ns": kv_token_ns, "seq_us": seq_us}
        for name, value in weights.items():
            if not 0 <= value < 1e9 or (name == "base_ms" and value < 1e-6):
                raise ValueError(f"{name} must be {'positive' if name == 'base_ms' else 'at least 0'}, got {value!r}")
        one = 1 << _FRACTION_BITS
        self._base = round(base_ms * 1e6 * one)
        self._token = round(token_us * 1e3 * one)
        self._kv_token = round(kv_token_ns * one)
        self._seq = round(seq_us * 1e3 * one)

    def step_time(
        self, *, prefills: Sequence[tuple[int, int]], num_decodes: int, decode_kv_tokens: int, now: Instant = Instant(0)
    ) -> int:
        """Nanoseconds for one step; 0 for an empty one."""
        if not prefills and not num_decodes:
            return 0
        num_tokens, num_kv_tokens = num_decodes, decode_kv_tokens
        for new_tokens, context_tokens in prefills:
            num_tokens += new_tokens
            num_kv_tokens += context_tokens
        num_seqs = len(prefills) + num_decodes
        total = self._base + self._token * num_tokens + self._kv_token * num_kv_tokens + self._seq * num_seqs
        return total >> _FRACTION_BITS

    def decode_run(self, num_decodes: int, decode_kv_tokens: int, num_steps: int) -> list[int]:
        """Nanoseconds of each of `num_steps` decode-only steps in a row; see `DecodeRunPredictor`."""
        if not num_decodes:
            return [0] * num_steps
        first = self._base + (self._token + self._seq) * num_decodes + self._kv_token * decode_kv_tokens
        rise = self._kv_token * num_decodes
        return [(first + step * rise) >> _FRACTION_BITS for step in range(num_steps)]
