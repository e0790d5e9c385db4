"""A description fitted to a trace: what `synthetic` then draws has its rates, lengths, waits and sharing.

Fitted are the marginal distributions, by quantiles, and what ties them together: the rate over time, the correlation of
prompt and output, the reuse of prefixes by prompt length and age, the turns of sessions. Not fitted is what is left:
the order of lengths, dependence between gaps beyond that of the rate, differences between tenants in anything but their
share of the rows, programs that fork (they become chains).
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from math import ceil

import numpy as np

from rota.base.errors import ConfigError
from rota.base.instant import to_seconds
from rota.base.random_streams import RandomStreams
from rota.serving.model.request import DEFAULT_TENANT, shared_prefix_blocks
from rota.serving.workload.arrival_process import ArrivalProcess, RateWindows
from rota.serving.workload.arrivals import Arrival
from rota.serving.workload.conversations import Conversations
from rota.serving.workload.distributions import Amounts, Lengths, QuantileSampler
from rota.serving.workload.generator import RequestClass, SyntheticWorkload
from rota.serving.workload.reuse import MAX_LAG, PrefixReuse, ReuseBand
from rota.serving.workload.sorting import groups

GRID = (*(n / 100 for n in range(100)), 0.995, 0.999, 1.0)
"""Shares at which quantiles are stated: every percent, and the tail."""
NUM_STEPS_MAX = 64
"""Up to so many different values are stated as they are, with nothing in between."""
_STEP = 1e-9
NUM_BANDS = 5
"""Bands of prompt length, equally many rows in each."""
NUM_WINDOWS_MAX = 500
ROWS_PER_WINDOW = 50
"""So many rows at least in the mean, lest the rate follow the noise."""
MIN_WINDOW_SECONDS = 10.0
BATCHED_SHARE = 0.2
"""Of rows that come at the same instant as another: from here on, the trace is taken to come in batches."""
MOVING_FACTOR = 1.5
"""So many times as much as a steady process must counts vary for the rate to be taken to move."""
NUM_CLASSES_MAX = 64
DEFAULT_RATE = 1.0
"""Open rows a second of a trace that has no times."""


def fit(arrivals: Iterable[Arrival]) -> SyntheticWorkload:
    """Fit a description to a trace, in one pass. Memory grows with rows (some tens of bytes each) and with distinct
    prefix blocks. Raises `ConfigError` for a trace of fewer than two rows."""
    seen = _Seen()
    for group in groups(arrivals):
        seen.take(group)
    if len(seen.prompts) < 2:
        raise ConfigError(f"a trace of {len(seen.prompts)} rows cannot be fitted; it takes two at least")
    is_one_by_one = not any(kind.waits for kind in seen.kinds.values())
    return SyntheticWorkload(
        num_requests=len(seen.prompts),
        arrivals=_process(np.asarray(seen.instants)),
        prompt=lengths(np.asarray(seen.prompts)),
        output=lengths(np.asarray(seen.outputs)),
        length_correlation=_correlation(seen.prompts, seen.outputs) if is_one_by_one else 0.0,
        classes=_classes(seen.kinds) if is_one_by_one else (),
        reuse=seen.reuse.fitted() if is_one_by_one else None,
        sessions=() if is_one_by_one else _sessions(seen.kinds),
    )


def lengths(values: np.ndarray) -> Lengths:
    """Quantiles of whole numbers."""
    return Lengths({f"{share:.12g}": max(1, round(value)) for share, value in _quantiles(values)})


def amounts(values: np.ndarray, digits: int = 6) -> Amounts:
    """Quantiles of numbers."""
    return Amounts({f"{share:.12g}": round(max(0.0, value), digits) for share, value in _quantiles(values)})


def normal_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """The correlation of the normal scores of two columns, from that of their ranks (Pearson, 1907)."""
    ranks = [_ranks(values) for values in (first, second)]
    if min(np.ptp(rank) for rank in ranks) == 0:
        return 0.0
    spearman = float(np.corrcoef(ranks[0], ranks[1])[0, 1])
    return round(2.0 * float(np.sin(np.pi / 6.0 * spearman)), 4)


def _correlation(first: Sequence[int], second: Sequence[int]) -> float:
    return normal_correlation(np.asarray(first), np.asarray(second))


class _KindSeen:
    """The sessions of one tenant and priority."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.turns, self.new_tokens, self.first_prompts, self.outputs = array("q"), array("q"), array("q"), array("q")
        self.waits, self.kept = array("d"), array("d")


class _Seen:
    """What a pass over a trace collects."""

    def __init__(self) -> None:
        self.instants = array("d")
        self.prompts, self.outputs = array("q"), array("q")
        self.kinds: dict[tuple[str, int], _KindSeen] = {}
        self.reuse = _ReuseSeen()

    def take(self, group: Sequence[Arrival]) -> None:
        """An open row and those that wait for it."""
        kind = self.kinds.setdefault((group[0].tenant, group[0].priority), _KindSeen())
        self.instants.append(to_seconds(group[0].at))
        kind.turns.append(len(group))
        before: Arrival | None = None
        for arrival in group:
            kind.num_rows += 1
            self.prompts.append(arrival.num_prompt_tokens)
            for outputs in (self.outputs, kind.outputs):
                outputs.append(arrival.num_output_tokens)
            self.reuse.take(arrival)
            num_kept = 0 if before is None else _num_kept(before, arrival)
            if before is None or not num_kept:
                kind.first_prompts.append(arrival.num_prompt_tokens)
            else:
                kind.new_tokens.append(arrival.num_prompt_tokens - num_kept)
                kind.kept.append(num_kept / before.num_prompt_tokens)
            if before is not None:
                kind.waits.append(to_seconds(arrival.gap))
            before = arrival


def _num_kept(before: Arrival, arrival: Arrival) -> int:
    """Tokens of the prompt before that this one begins with; its last block may be partial."""
    shared = shared_prefix_blocks(before.prefix_hashes, arrival.prefix_hashes) * arrival.hash_block_tokens
    return min(shared, before.num_prompt_tokens, arrival.num_prompt_tokens - 1)


class _ReuseSeen:
    """Which prompts begin as earlier ones did, how far, and how long ago."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}
        self._num_rows = 0
        self._block_tokens: int | None = None
        self._prompts, self._lags = array("q"), array("q")
        self._kept = array("d")

    def take(self, arrival: Arrival) -> None:
        last, number = self._last, self._num_rows
        self._num_rows += 1
        depth = 0
        for block in arrival.prefix_hashes:
            if block not in last:
                break
            depth += 1
        if arrival.prefix_hashes and self._block_tokens is None:
            self._block_tokens = arrival.hash_block_tokens
        self._prompts.append(arrival.num_prompt_tokens)
        self._kept.append(min(1.0, depth * arrival.hash_block_tokens / arrival.num_prompt_tokens))
        self._lags.append(number - last[arrival.prefix_hashes[depth - 1]] if depth else 0)
        for block in arrival.prefix_hashes:
            last[block] = number

    def fitted(self) -> PrefixReuse | None:
        """The reuse in bands of prompt length; None if nothing is shared."""
        prompts, kept, lags = (np.asarray(values) for values in (self._prompts, self._kept, self._lags))
        if self._block_tokens is None or not lags.any():
            return None
        bounds = sorted({max(1, int(np.quantile(prompts, n / NUM_BANDS))) for n in range(1, NUM_BANDS + 1)})
        place = np.minimum(np.searchsorted(bounds, prompts), len(bounds) - 1)
        bands = []
        for index, bound in enumerate(bounds):
            inside = place == index
            shares = inside & (lags > 0)
            if not shares.any():
                kept_here, lags_here = np.zeros(1), np.ones(1)
            else:
                kept_here, lags_here = kept[shares], np.minimum(lags[shares], MAX_LAG)
            share = float(shares.sum() / inside.sum()) if inside.any() else 0.0
            correlation = normal_correlation(kept_here, lags_here)
            bands.append(ReuseBand(bound, round(share, 6), amounts(kept_here), amounts(lags_here, 0), correlation))
        return PrefixReuse(block_tokens=self._block_tokens, bands=tuple(bands))


def _process(instants: np.ndarray) -> ArrivalProcess:
    """The rate, and how it moves; the shape of the gaps once time is stretched so that the rate is even; batches."""
    instants = instants - instants[0]
    span = float(instants[-1])
    if span <= 0 or len(instants) < 3:
        return ArrivalProcess(rate=DEFAULT_RATE)
    rate = (len(instants) - 1) / span
    moments, sizes = np.unique(instants, return_counts=True)
    batch, moments_rate = None, rate
    if 2 < len(moments) < (1 - BATCHED_SHARE) * len(instants):
        # Batches keep a beat: gaps stay what they are, to the nanosecond, and the rate follows from them.
        batch = lengths(sizes)
        moments_rate = QuantileSampler(batch).mean / QuantileSampler(amounts(np.diff(moments), 9)).mean
    else:
        moments = instants
    steady = ArrivalProcess(rate=moments_rate, gaps=amounts(np.diff(moments), 9), batch=batch)
    seconds = max(MIN_WINDOW_SECONDS, ROWS_PER_WINDOW / rate, span / NUM_WINDOWS_MAX)
    num_windows = int(span / seconds)
    # The windows cover the span exactly: a part of one at its end would be taken for a lull.
    edges = np.linspace(0.0, span, num_windows + 1) if num_windows else np.zeros(1)
    if num_windows < 2 or not _moves(instants, steady, edges):
        return steady
    weights = np.histogram(instants[1:], edges)[0] * (num_windows / (len(instants) - 1))
    passed = np.interp(moments, edges, np.concatenate(([0.0], np.cumsum(weights))) * (span / num_windows))
    windows = RateWindows(seconds=span / num_windows, weights=tuple(round(float(weight), 6) for weight in weights))
    gaps = np.diff(passed)
    return ArrivalProcess(rate=rate, gaps=amounts(gaps, 9), batch=batch, windows=windows)


def _moves(instants: np.ndarray, steady: ArrivalProcess, edges: np.ndarray) -> bool:
    """Whether counts in windows vary more than those of a steady process with the same gaps do."""
    drawn = np.fromiter(islice(steady.instants(RandomStreams(0).stream("workload.fit")), len(instants)), float)
    counts = [np.histogram(times, edges)[0] for times in (instants[1:], drawn[drawn < edges[-1]])]
    # The last windows may be empty where the drawn rows came faster, and say nothing.
    counts[1] = counts[1][: max(2, int(np.searchsorted(edges, drawn[-1])) - 1)]
    seen, expected = (float(np.var(each) / max(1e-9, np.mean(each))) for each in counts)
    return seen > MOVING_FACTOR * expected


def _sessions(kinds: Mapping[tuple[str, int], _KindSeen]) -> tuple[Conversations, ...]:
    """A kind of session for every tenant and priority."""
    _refuse_many(kinds)
    found = []
    for (tenant, priority), kind in sorted(kinds.items()):
        num_later = len(kind.waits)
        found.append(
            Conversations(
                turns=lengths(np.asarray(kind.turns)),
                wait_seconds=amounts(np.asarray(kind.waits) if num_later else np.zeros(1)),
                new_tokens=lengths(np.asarray(kind.new_tokens) if kind.new_tokens else np.ones(1)),
                kept=amounts(np.asarray(kind.kept)) if kind.kept else None,
                continues=round(len(kind.new_tokens) / num_later, 6) if num_later else 1.0,
                share=float(len(kind.turns)),
                priority=priority,
                tenant=tenant,
                prompt=lengths(np.asarray(kind.first_prompts)),
                output=lengths(np.asarray(kind.outputs)),
            )
        )
    return tuple(found)


def _classes(kinds: Mapping[tuple[str, int], _KindSeen]) -> tuple[RequestClass, ...]:
    """Tenants and priorities by their share of the rows; one alone at its defaults is no class."""
    _refuse_many(kinds)
    if set(kinds) == {(DEFAULT_TENANT, 0)}:
        return ()
    return tuple(
        RequestClass(share=float(kind.num_rows), priority=priority, tenant=tenant)
        for (tenant, priority), kind in sorted(kinds.items())
    )


def _refuse_many(kinds: Mapping[tuple[str, int], _KindSeen]) -> None:
    if len(kinds) > NUM_CLASSES_MAX:
        raise ConfigError(
            f"{len(kinds)} pairs of tenant and priority; a description holds {NUM_CLASSES_MAX}",
            hint="rota trace convert --lossy --to burstgpt leaves tenants and priorities out",
        )


def _quantiles(values: np.ndarray) -> list[tuple[float, float]]:
    """Shares, and the least value that so large a share does not exceed. Few different values keep their shares."""
    ordered = np.sort(values)
    different, counts = np.unique(ordered, return_counts=True)
    if len(different) > NUM_STEPS_MAX:
        return [(share, float(ordered[max(0, ceil(share * len(ordered)) - 1)])) for share in GRID]
    ends = np.cumsum(counts) / len(ordered)
    points = [(0.0, float(different[0]))]
    for value, following, end in zip(different, different[1:], ends, strict=False):
        points += [(float(end), float(value)), (float(end) + _STEP, float(following))]
    return [*points, (1.0, float(different[-1]))]


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, equal values sharing the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2.0)[place]
