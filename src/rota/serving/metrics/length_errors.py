"""How far predictions of output length were off, and what they cost."""

import msgspec
import numpy as np

NUM_RANKED_MAX = 2048
"""Pairs that are kept for Kendall's tau. Of a longer run, every second of them, every fourth, and so on."""


class LengthFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a predictor of output lengths was worth in a run. Errors are over the requests that were predicted once and
    then finished, by what was said first; None where there was none."""

    predictor: str
    is_oracle: bool
    """Whether it was told the truth, which nobody can be who is not in a simulation."""
    num_predictions: int
    cpu_us: float | None
    """Mean CPU time of a prediction on the machine that simulated, in microseconds."""
    cost_us: float
    """What each was taken to cost of an engine's time, in microseconds."""
    num_finished: int
    mean_absolute_error: float | None
    """In output tokens."""
    bias: float | None
    """Mean of predicted less true: above 0 is too long."""
    kendall_tau: float | None
    """From -1 to 1, ties counted (tau-b): how well the order of two requests is told. None where one side is all alike.
    Of at most 2,048 requests, spread over the run."""


class LengthErrors:
    """Takes pairs of predicted and true length, one at a time, in bounded space."""

    def __init__(self) -> None:
        self.num_pairs = 0
        self._sum = 0.0
        self._sum_absolute = 0.0
        self._stride = 1
        self._kept: list[tuple[float, int]] = []

    def add(self, predicted: float, true: int) -> None:
        """Take one more."""
        self._sum += predicted - true
        self._sum_absolute += abs(predicted - true)
        if self.num_pairs % self._stride == 0:
            if len(self._kept) == NUM_RANKED_MAX:
                del self._kept[1::2]
                self._stride *= 2
            if self.num_pairs % self._stride == 0:
                self._kept.append((predicted, true))
        self.num_pairs += 1

    @property
    def mean_absolute_error(self) -> float | None:
        return self._sum_absolute / self.num_pairs if self.num_pairs else None

    @property
    def bias(self) -> float | None:
        return self._sum / self.num_pairs if self.num_pairs else None

    @property
    def kendall_tau(self) -> float | None:
        return kendall_tau([pair[0] for pair in self._kept], [pair[1] for pair in self._kept])


def kendall_tau(left: list[float], right: list[int]) -> float | None:
    """Kendall's tau-b of two rankings of the same things; None where either ranks all alike. Costs the square of their
    number."""
    first, second = np.asarray(left, dtype=float), np.asarray(right, dtype=float)
    concordant = untied_first = untied_second = 0
    for index in range(len(first)):
        signs = np.sign(first[index + 1 :] - first[index]), np.sign(second[index + 1 :] - second[index])
        concordant += int((signs[0] * signs[1]).sum())
        untied_first += int(np.count_nonzero(signs[0]))
        untied_second += int(np.count_nonzero(signs[1]))
    if not untied_first or not untied_second:
        return None
    return float(concordant / (untied_first * untied_second) ** 0.5)
