"""How far two traces are from each other: what a fitted description is judged by, on rows that it was not fitted to."""

from array import array
from collections.abc import Iterable
from itertools import pairwise

import msgspec
import numpy as np

from rota.base.instant import to_seconds
from rota.serving.workload.arrivals import Arrival
from rota.serving.workload.description import Description, Gathering

CACHE_BLOCKS = (1_000, 10_000)


class Distance(msgspec.Struct, frozen=True):
    """How far a distribution is from another."""

    ks: float
    """Kolmogorov and Smirnov's: the largest difference of the two cumulative shares, from 0 to 1."""
    wasserstein: float
    """The mean distance by which values must be moved, over the mean of the one that is judged against."""


class Comparison(msgspec.Struct, frozen=True):
    """A description, judged on the part of a trace that it was not fitted to.

    `noise` is the distance of the part it was fitted to from the other: what two parts of one trace differ by anyway.
    """

    num_train: int
    num_holdout: int
    num_drawn: int
    distances: dict[str, Distance]
    noise: dict[str, Distance]
    holdout: dict[str, float | None]
    drawn: dict[str, float | None]
    train: dict[str, float | None]


class Columns:
    """The values of a trace that are compared, and its numbers."""

    def __init__(self, arrivals: Iterable[Arrival]) -> None:
        gathering = Gathering(cache_blocks=CACHE_BLOCKS)
        prompts, outputs, instants, waits, turns = array("q"), array("q"), array("d"), array("d"), array("q")
        for arrival in arrivals:
            gathering.take(arrival)
            prompts.append(arrival.num_prompt_tokens)
            outputs.append(arrival.num_output_tokens)
            if arrival.after:
                waits.append(to_seconds(arrival.gap))
                turns[-1] += 1
            else:
                instants.append(to_seconds(arrival.at))
                turns.append(1)
        gaps = array("d", (after - before for before, after in pairwise(instants)))
        self.num_rows = len(prompts)
        self.values = {
            "prompt tokens": np.asarray(prompts),
            "output tokens": np.asarray(outputs),
            "gaps": np.asarray(gaps),
        }
        if waits:
            self.values |= {"waits": np.asarray(waits), "turns": np.asarray(turns)}
        self.numbers = _numbers(gathering.description())


def compare(train: Columns, holdout: Columns, drawn: Columns) -> Comparison:
    """Judge what was drawn against the holdout. A distribution that one of the three lacks is left out."""
    names = [
        name
        for name, values in holdout.values.items()
        if len(values) and np.mean(values) > 0 and all(len(each.values.get(name, ())) for each in (train, drawn))
    ]
    return Comparison(
        num_train=train.num_rows,
        num_holdout=holdout.num_rows,
        num_drawn=drawn.num_rows,
        distances={name: distance(drawn.values[name], holdout.values[name]) for name in names},
        noise={name: distance(train.values[name], holdout.values[name]) for name in names},
        holdout=holdout.numbers,
        drawn=drawn.numbers,
        train=train.numbers,
    )


def distance(values: np.ndarray, reference: np.ndarray) -> Distance:
    """How far values are from reference values; both must hold one, and the mean of these be above 0."""
    first, second = np.sort(values), np.sort(reference)
    at = np.unique(np.concatenate((first, second)))
    below = [np.searchsorted(each, at, side="right") / len(each) for each in (first, second)]
    apart = np.abs(below[0] - below[1])
    moved = float(np.sum(apart[:-1] * np.diff(at)))
    mean = float(np.mean(second))
    return Distance(ks=float(apart.max()), wasserstein=moved / mean)


def _numbers(description: Description) -> dict[str, float | None]:
    found: dict[str, float | None] = {
        "rate /s": description.rate,
        "gap CV": description.gap_cv,
        "dispersion 1 s": description.dispersion_1s,
        "dispersion 60 s": description.dispersion_60s,
        "length correlation": description.length_correlation,
    }
    for hits in description.prefix_hits:
        size = "without end" if hits.num_blocks is None else f"of {hits.num_blocks:,} blocks"
        found[f"prefix hits, cache {size}"] = hits.hit_rate
    return found
