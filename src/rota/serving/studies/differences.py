"""Whether two stacks differ: paired differences on the same arrivals, how far chance could move them, and what is left
of them when many questions are asked at once.

Three designs, by what was repeated:

| design | the difference | its standard error | degrees of freedom |
|---|---|---|---|
| `windows`: one run each | of that run | spread of a bootstrap over windows of arrival time | windows − 1 |
| `resampled`: a recorded trace and N resamples of it | on the recorded trace | spread over the resamples | N − 1 |
| `drawn`: N workloads drawn from one law | mean over them | spread over them / √N | N − 1 |

A spread over resamples is the standard error itself, by the bootstrap's principle: more resamples make it surer, not
smaller. Every p value and interval is Student's t with that error.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from rota.base.random_streams import Stream
from rota.serving.metrics.columns import Columns, Floats
from rota.serving.studies.statistics import holm, t_quantile, t_two_sided

NUM_BOOTSTRAPS = 500
"""Enough for a standard error to within 3 %."""
NUM_WINDOWS_MAX, NUM_WINDOWS_MIN = 60, 10
NUM_REQUESTS_MIN = 50
"""Of a group; smaller ones are not asked about."""
NUM_FOR_P99 = 200
"""So that at least two requests lie beyond the percentile."""

Design = Literal["windows", "resampled", "drawn"]
Verdict = Literal["better", "worse", "no difference shown", "identical"]


class Quantity(NamedTuple):
    """What is compared: the mean or a percentile of one column."""

    name: str
    column: str
    percentile: float | None
    is_lower_better: bool = True

    def of(self, columns: Columns) -> float:
        """Its value; NaN where no request has one."""
        values = _values(columns, self.column)
        values = values[~np.isnan(values)]
        if not len(values):
            return math.nan
        return float(values.mean() if self.percentile is None else np.percentile(values, self.percentile))


LATENCIES = tuple(
    Quantity(f"{name}_{label}", name, percentile)
    for name in ("ttft", "tpot", "e2e")
    for label, percentile in (("mean_ms", None), ("p99_ms", 99.0))
)
FINISHED = Quantity("share_finished", "is_finished", None, is_lower_better=False)
ATTAINMENT = Quantity("slo_attainment", "is_met", None, is_lower_better=False)


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """How one stack differs from the baseline in one quantity."""

    stack: str
    baseline: str
    group: str
    """`all`, or the class."""
    quantity: str
    baseline_value: float
    value: float
    difference: float
    """`value` less `baseline_value`, in the quantity's unit."""
    margin: float
    """Half the width of the interval for this one difference."""
    relative: float | None
    """The difference as a share of the baseline's value; None if that is 0."""
    relative_margin: float | None
    p_value: float
    p_adjusted: float
    """After Holm, over all differences of the study."""
    verdict: Verdict


class Pair(NamedTuple):
    """The same arrivals through the baseline and through another stack; the same request in the same place of both."""

    baseline: Columns
    other: Columns


def questions(pairs: Sequence[Pair], *, has_slo: bool) -> list[tuple[str, Quantity]]:
    """The groups and quantities that these runs have enough requests to be asked about."""
    asked = []
    for group, chosen in _groups(pairs[0].baseline).items():
        count = int(chosen.sum())
        if count < NUM_REQUESTS_MIN:
            continue
        for quantity in (*LATENCIES, FINISHED, *((ATTAINMENT,) if has_slo else ())):
            if quantity.percentile is None or count >= NUM_FOR_P99:
                asked.append((group, quantity))
    return asked


def differences(
    pairs_of: Mapping[str, Sequence[Pair]],
    baseline: str,
    *,
    design: Design,
    has_slo: bool,
    confidence: float,
    stream: Stream,
) -> list[Difference]:
    """Every stack against the baseline in every quantity, with verdicts of which at most `1 - confidence` of all
    studies have a false one. `pairs_of` holds the repeats of each stack in one order; of the design `resampled` the
    first is the recorded trace, and `windows` has one. Raises `ValueError` for too few requests."""
    found: list[Difference] = []
    for stack, pairs in pairs_of.items():
        bootstrap = _Windows(pairs[0], stream) if design == "windows" else None
        for group, quantity in questions(pairs, has_slo=has_slo):
            measured = _measured(pairs, group, quantity)
            if np.isnan(measured).all(axis=0).any():
                continue  # one of them has no such latency at all: the share that finished says so
            deltas = measured[:, 1] - measured[:, 0]
            deltas = deltas[~np.isnan(deltas)]
            if bootstrap is not None:
                error, degrees = bootstrap.standard_error(group, quantity), bootstrap.num_windows - 1
            elif design == "resampled":
                error, degrees = _spread(deltas[1:]), len(deltas) - 2
            else:
                error, degrees = _spread(deltas) / math.sqrt(len(deltas)), len(deltas) - 1
            at = slice(None) if design == "drawn" else slice(0, 1)
            base, value = np.nanmean(measured[at], axis=0).tolist()
            found.append(_difference(stack, baseline, group, quantity, base, value, error, degrees, confidence))
    adjusted = holm([one.p_value for one in found])
    return [_judged(one, p, 1.0 - confidence) for one, p in zip(found, adjusted, strict=True)]


def _difference(
    stack: str,
    baseline: str,
    group: str,
    quantity: Quantity,
    base: float,
    value: float,
    error: float,
    degrees: int,
    confidence: float,
) -> Difference:
    delta = value - base
    if error > 0 and degrees > 0:
        p_value, margin = t_two_sided(delta / error, degrees), error * t_quantile(confidence, degrees)
    else:
        p_value, margin = (1.0 if delta == 0 or degrees <= 0 else 0.0), 0.0
    return Difference(
        stack=stack,
        baseline=baseline,
        group=group,
        quantity=quantity.name,
        baseline_value=base,
        value=value,
        difference=delta,
        margin=margin,
        relative=delta / abs(base) if base else None,
        relative_margin=margin / abs(base) if base else None,
        p_value=p_value,
        p_adjusted=p_value,
        verdict="identical" if delta == 0 and error == 0 else "no difference shown",
    )


def _judged(one: Difference, p_adjusted: float, level: float) -> Difference:
    verdict = one.verdict
    if p_adjusted <= level and one.difference:
        is_lower_better = one.quantity not in (FINISHED.name, ATTAINMENT.name)
        verdict = "better" if (one.difference < 0) == is_lower_better else "worse"
    return msgspec.structs.replace(one, p_adjusted=p_adjusted, verdict=verdict)


def _measured(pairs: Sequence[Pair], group: str, quantity: Quantity) -> Floats:
    """One row a repeat: the baseline's value and the other's."""
    rows = []
    for pair in pairs:
        nobody = np.zeros(len(pair.baseline), dtype=np.bool_)
        chosen = _groups(pair.baseline).get(group, nobody)
        rows.append([quantity.of(one.where(chosen)) for one in pair])
    return np.array(rows, dtype=np.float64)


def _groups(columns: Columns) -> dict[str, npt.NDArray[np.bool_]]:
    """Which requests belong to each group; all of them, and each class where there is more than one."""
    classes = np.unique(columns.priority).tolist()
    groups = {"all": np.ones(len(columns), dtype=np.bool_)}
    return groups | ({f"class {one}": columns.priority == one for one in classes} if len(classes) > 1 else {})


def _spread(values: Floats) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _values(columns: Columns, name: str) -> Floats:
    values: Floats = getattr(columns, name).astype(np.float64)
    return values


class _Windows:
    """The bootstrap over windows of arrival time of one pair of runs.

    Windows are as many as leave neighbours without a visible correlation, so that what carries over from one to the
    next (a queue that takes minutes to drain) lies inside a window.
    """

    def __init__(self, pair: Pair, stream: Stream) -> None:
        num_requests = len(pair.baseline)
        if num_requests < 5 * NUM_WINDOWS_MIN:
            raise ValueError(f"{num_requests} requests are too few to tell a difference from chance in one run")
        self._pair = pair
        self.num_windows = min(NUM_WINDOWS_MAX, num_requests // 5)
        while self.num_windows > NUM_WINDOWS_MIN and self._is_correlated():
            self.num_windows = max(NUM_WINDOWS_MIN, self.num_windows // 2)
        draws = [stream.integers(0, self.num_windows) for _ in range(NUM_BOOTSTRAPS * self.num_windows)]
        rows = np.array(draws).reshape(NUM_BOOTSTRAPS, self.num_windows)
        self._weights = np.array([np.bincount(row, minlength=self.num_windows) for row in rows], dtype=np.float64)

    def standard_error(self, group: str, quantity: Quantity) -> float:
        """Of the difference, over the bootstraps."""
        chosen = _groups(self._pair.baseline)[group]
        index = self._index()[chosen]
        drawn = [self._drawn(_values(one, quantity.column)[chosen], index, quantity.percentile) for one in self._pair]
        deltas = drawn[1] - drawn[0]
        deltas = deltas[~np.isnan(deltas)]
        # A bootstrap's spread is that of n values around their mean; the factor makes it one of n - 1.
        return _spread(deltas) * math.sqrt(self.num_windows / (self.num_windows - 1))

    def _drawn(self, values: Floats, index: npt.NDArray[np.int64], percentile: float | None) -> Floats:
        there = ~np.isnan(values)
        values, index = values[there], index[there]
        if percentile is None:
            sums = np.bincount(index, values, self.num_windows)
            counts = np.bincount(index, minlength=self.num_windows)
            with np.errstate(invalid="ignore"):
                means: Floats = (self._weights @ sums) / (self._weights @ counts)
            return means
        order = np.argsort(values, kind="stable")
        values, index = values[order], index[order]
        found = np.full(NUM_BOOTSTRAPS, np.nan)
        for number, weights in enumerate(self._weights):
            below = np.cumsum(weights[index])
            if len(below) and below[-1]:
                found[number] = values[np.searchsorted(below, percentile / 100 * below[-1])]
        return found

    def _index(self) -> npt.NDArray[np.int64]:
        """The window of each request, by when the baseline saw it; a call that waits for another may come at another
        moment in another stack, and is still the same request."""
        at = self._pair.baseline.arrived_at - self._pair.baseline.arrived_at.min()
        return at * self.num_windows // (int(at.max()) + 1)

    def _is_correlated(self) -> bool:
        """Whether neighbouring windows' differences hang together more than chance lets them, at a level of 5 %."""
        index = self._index()
        for name in ("ttft", "e2e"):
            values = np.nan_to_num(_values(self._pair.other, name) - _values(self._pair.baseline, name))
            centred = np.bincount(index, values - values.mean(), self.num_windows)
            centred = centred - centred.mean()
            power = float(centred @ centred)
            if power and float(centred[1:] @ centred[:-1]) / power > 1.65 / math.sqrt(self.num_windows):
                return True
        return False
