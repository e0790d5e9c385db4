"""Times of a run of decode-only steps: what a predictor may offer beside `step_time`, and what stands in for it.

In such a run the same sequences compute one token each, so every step has `num_decodes` tokens of context more.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from rota.serving.api import StepTimePredictor


@runtime_checkable
class DecodeRunPredictor(Protocol):
    """A predictor that can tell the times of many equal batches at once."""

    def decode_run(self, num_decodes: int, decode_kv_tokens: int, num_steps: int) -> list[int]:
        """Nanoseconds of each of `num_steps` steps, the first over `decode_kv_tokens` tokens of context in all.

        Exactly what `step_time` says when asked step by step.
        """
        ...


@runtime_checkable
class SkewPredictor(Protocol):
    """A predictor that knows what unlike decodes cost: a step waits for its longest sequence when the others are done.

    Nothing else about the mix of lengths is asked for, and so this stays apart from `step_time`, which counts the
    decodes of a step as if they shared their context evenly.
    """

    def skew_time(
        self, num_prefill_tokens: int, num_decodes: int, decode_kv_tokens: int, longest_decode_kv_tokens: int
    ) -> int:
        """Nanoseconds that a step takes beyond `step_time`, given the context of the longest of its decodes.

        The same for every step of a run of decodes, since all grow by one token a step.
        """
        ...


def decode_run(predictor: StepTimePredictor, num_decodes: int, decode_kv_tokens: int, num_steps: int) -> list[int]:
    """The times of a run of decode-only steps, from the predictor's own `decode_run` or else step by step."""
    own: Callable[[int, int, int], list[int]] | None = getattr(predictor, "decode_run", None)
    if own is not None:
        return own(num_decodes, decode_kv_tokens, num_steps)
    return [
        predictor.step_time(
            prefills=(), num_decodes=num_decodes, decode_kv_tokens=decode_kv_tokens + step * num_decodes
        )
        for step in range(num_steps)
    ]
