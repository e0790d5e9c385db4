"""What a step takes at least, known without asking the predictor each time."""

from rota.base.instant import Duration
from rota.serving.api import StepTimePredictor

CONTEXT_BITS = 9
KV_BITS = 14
_NUM_KNOWN_MAX = 16_384

Cell = tuple[int, int, int, int]
"""Steps of so many prefill tokens, over a context of so many times 512 tokens or more, with so many decodes over so
many times 16,384 tokens or more."""


class StepFloors:
    """The time of the least step of a cell: since a step never takes less time when work is added, none in the cell
    takes less. So that a few steps are predicted exactly, and not one for every instance.

    At most 16,384 are known at a time. They are kept for later requests, and so right for predictors that say the same
    at any instant, as all do that come with Rota.
    """

    __slots__ = ("_predictor", "known")

    def __init__(self, predictor: StepTimePredictor) -> None:
        self._predictor = predictor
        self.known: dict[Cell, Duration] = {}

    def ask(self, cell: Cell) -> Duration:
        """Predict the least step of a cell, and know it from then on."""
        if len(self.known) >= _NUM_KNOWN_MAX:
            self.known.clear()
        num_prefill, num_contexts, num_decodes, num_kv = cell
        time = self._predictor.step_time(
            prefills=[(num_prefill, num_contexts << CONTEXT_BITS)],
            num_decodes=num_decodes,
            decode_kv_tokens=num_kv << KV_BITS,
        )
        floor = self.known[cell] = Duration(time)
        return floor
