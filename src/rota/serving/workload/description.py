"""What a trace is like, in numbers: how much comes when, how long it is, what it shares, what belongs together.

Everything is gathered in one pass. Memory grows with distinct lengths, distinct prefix blocks and distinct names, not
with rows.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import msgspec

from rota.base.instant import NANOSECONDS_PER_SECOND, to_seconds
from rota.serving.workload.arrivals import Arrival

DEFAULT_CACHE_BLOCKS = (1_000, 10_000, 100_000)
NUM_BINS_MAX = 512
"""Of arrivals over time; bins are widened by two when there are more."""


class Spread(msgspec.Struct, frozen=True):
    """How values are distributed. All None if there are none."""

    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    max: float | None = None
    min: float | None = None


class CacheHits(msgspec.Struct, frozen=True):
    """Share of prompt tokens that a cache for prefixes would have held."""

    num_blocks: int | None
    """None is a cache without end."""
    hit_rate: float


class Description(msgspec.Struct, frozen=True):
    """What a trace is like."""

    format: str
    num_rows: int
    num_open: int
    """Rows that come at an instant of their own; the others wait for rows before them."""
    span_seconds: float
    """From the first open row to the last."""
    rate: float | None
    """Open rows a second."""
    gap_cv: float | None
    """Coefficient of variation of the gaps between open rows; 1 is Poisson."""
    dispersion_1s: float | None
    """Variance over mean of open rows per second; 1 is Poisson."""
    dispersion_60s: float | None
    prompt_tokens: Spread
    output_tokens: Spread
    length_correlation: float | None
    """Of the logarithms of prompt and output length."""
    wait_seconds: Spread
    """From the end of what a row waits for until it comes."""
    num_programs: int
    """Open rows with others that wait for them."""
    num_sessions: int
    rows_per_session: Spread
    num_tenants: int
    priorities: tuple[int, ...]
    hash_block_tokens: int | None
    """Tokens of a block of the prefixes; None if nothing has any."""
    prefix_hits: tuple[CacheHits, ...]
    not_taken_as_they_are: dict[str, int]
    """Rows that the reader left out or changed, because it was asked to or by the rule of the format."""


class Gathering:
    """Takes the rows of a trace one by one, and says what they were like."""

    def __init__(self, format_name: str = "", cache_blocks: Sequence[int] = DEFAULT_CACHE_BLOCKS) -> None:
        self.num_rows = 0
        self.prompts: Counter[int] = Counter()
        self.outputs: Counter[int] = Counter()
        self.waits: Counter[int] = Counter()
        """In milliseconds."""
        self.over_time = OverTime()
        self._format = format_name
        self._arrivals = _Process()
        self._correlation = _Correlation()
        self._sessions: Counter[str] = Counter()
        self._tenants: set[str] = set()
        self._priorities: set[int] = set()
        self._num_programs = 0
        self._was_open = False
        self._caches = [PrefixCache(num_blocks) for num_blocks in (None, *cache_blocks)]
        self._block_tokens: int | None = None

    def take(self, arrival: Arrival) -> None:
        """The next row."""
        self.num_rows += 1
        prompt, output = arrival.num_prompt_tokens, arrival.num_output_tokens
        self.prompts[prompt] += 1
        self.outputs[output] += 1
        self._correlation.take(math.log(prompt), math.log(output))
        if arrival.after:
            self._num_programs += self._was_open
            self.waits[arrival.gap // 1_000_000] += 1
        else:
            self._arrivals.take(arrival.at)
            self.over_time.take(arrival.at)
        self._was_open = not arrival.after
        if arrival.session is not None:
            self._sessions[arrival.session] += 1
        self._tenants.add(arrival.tenant)
        self._priorities.add(arrival.priority)
        if arrival.prefix_hashes and self._block_tokens is None:
            self._block_tokens = arrival.hash_block_tokens
        for cache in self._caches:
            cache.take(arrival)

    def description(self, not_taken: dict[str, int] | None = None) -> Description:
        """What the rows so far were like."""
        process = self._arrivals
        per_session = Counter(self._sessions.values())
        has_prefixes = self._block_tokens is not None
        return Description(
            format=self._format,
            num_rows=self.num_rows,
            num_open=process.num_events,
            span_seconds=to_seconds(process.span),
            rate=process.rate,
            gap_cv=process.gap_cv,
            dispersion_1s=process.dispersion(1),
            dispersion_60s=process.dispersion(60),
            prompt_tokens=spread(self.prompts),
            output_tokens=spread(self.outputs),
            length_correlation=self._correlation.value,
            wait_seconds=spread(self.waits, scale=1e-3),
            num_programs=self._num_programs,
            num_sessions=len(self._sessions),
            rows_per_session=spread(per_session),
            num_tenants=len(self._tenants),
            priorities=tuple(sorted(self._priorities)),
            hash_block_tokens=self._block_tokens,
            prefix_hits=tuple(cache.hits for cache in self._caches) if has_prefixes else (),
            not_taken_as_they_are=not_taken or {},
        )


def describe(
    arrivals: Iterable[Arrival], format_name: str = "", cache_blocks: Sequence[int] = DEFAULT_CACHE_BLOCKS
) -> Description:
    """What a trace is like, in one pass."""
    gathering = Gathering(format_name, cache_blocks)
    for arrival in arrivals:
        gathering.take(arrival)
    return gathering.description()


def spread(counts: Counter[int], *, scale: float = 1.0) -> Spread:
    """Exact quantiles (the least value that so large a share does not exceed) of values and how often each came."""
    total = sum(counts.values())
    if not total:
        return Spread()
    values = sorted(counts)
    wanted = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    found: dict[str, float] = {}
    so_far = 0
    for value in values:
        so_far += counts[value]
        for name, share in wanted.items():
            if name not in found and so_far >= share * total:
                found[name] = value * scale
    mean = sum(value * count for value, count in counts.items()) / total
    return Spread(mean=mean * scale, max=values[-1] * scale, min=values[0] * scale, **found)


class PrefixCache:
    """Blocks of prefixes, the least recently used going first; counts what it would have spared."""

    def __init__(self, num_blocks: int | None) -> None:
        self.num_blocks = num_blocks
        self._held: OrderedDict[int, None] = OrderedDict()
        self._num_hit = self._num_tokens = 0

    def take(self, arrival: Arrival) -> int:
        """The next prompt; how many of its tokens are held, from the first on without a hole."""
        prompt, hashes = arrival.num_prompt_tokens, arrival.prefix_hashes
        self._num_tokens += prompt
        if not hashes:
            return 0
        held, bound = self._held, self.num_blocks
        num_found = 0
        for block in hashes:
            if block not in held:
                break
            num_found += 1
        for block in hashes:
            held[block] = None
            if bound is not None:
                held.move_to_end(block)
        if bound is not None:
            while len(held) > bound:
                held.popitem(last=False)
        hit = min(num_found * arrival.hash_block_tokens, prompt)
        self._num_hit += hit
        return hit

    @property
    def hits(self) -> CacheHits:
        return CacheHits(self.num_blocks, self._num_hit / self._num_tokens if self._num_tokens else 0.0)


class OverTime:
    """How many rows came in each bin of time, in at most `NUM_BINS_MAX` bins of a width that fits the span."""

    def __init__(self) -> None:
        self.width = NANOSECONDS_PER_SECOND
        self._bins: Counter[int] = Counter()

    def take(self, at: int) -> None:
        self._bins[at // self.width] += 1
        if len(self._bins) > NUM_BINS_MAX:
            self.width *= 2
            merged: Counter[int] = Counter()
            for index, count in self._bins.items():
                merged[index // 2] += count
            self._bins = merged

    def rates(self) -> tuple[list[float], list[float]]:
        """Seconds at which each bin begins, and rows a second in it; empty bins too, unless there are too many."""
        if not self._bins:
            return [], []
        first, last = min(self._bins), max(self._bins)
        each = range(first, last + 1) if last - first < 4 * NUM_BINS_MAX else sorted(self._bins)
        seconds = self.width / NANOSECONDS_PER_SECOND
        return [index * seconds for index in each], [self._bins[index] / seconds for index in each]


class _Process:
    """Moments of the gaps of a process, and of its counts in windows."""

    def __init__(self) -> None:
        self.num_events = 0
        self._first = self._last = 0
        self._sum = self._squares = 0.0
        self._windows = {seconds: _Windows(seconds * NANOSECONDS_PER_SECOND) for seconds in (1, 60)}

    def take(self, at: int) -> None:
        if self.num_events:
            gap = to_seconds(at - self._last)
            self._sum += gap
            self._squares += gap * gap
        else:
            self._first = at
        self._last = at
        self.num_events += 1
        for windows in self._windows.values():
            windows.take(at - self._first)

    @property
    def span(self) -> int:
        return self._last - self._first

    @property
    def rate(self) -> float | None:
        return (self.num_events - 1) / to_seconds(self.span) if self.span else None

    @property
    def gap_cv(self) -> float | None:
        num_gaps = self.num_events - 1
        if num_gaps < 2 or not self._sum:
            return None
        mean = self._sum / num_gaps
        return math.sqrt(max(0.0, self._squares / num_gaps - mean * mean)) / mean

    def dispersion(self, seconds: int) -> float | None:
        return self._windows[seconds].dispersion


class _Windows:
    """Counts in windows of one width, the last of which is not over yet and left out."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._index = 0
        self._count = self._sum = self._squares = 0

    def take(self, at: int) -> None:
        index = at // self._width
        if index != self._index:
            self._sum += self._count
            self._squares += self._count * self._count
            self._index, self._count = index, 0
        self._count += 1

    @property
    def dispersion(self) -> float | None:
        # Windows in which nothing came have a count of 0, and are in `_index` alone.
        if self._index < 2 or not self._sum:
            return None
        mean = self._sum / self._index
        return (self._squares / self._index - mean * mean) / mean


class _Correlation:
    """Pearson's correlation of pairs, in one pass (Welford's updates)."""

    def __init__(self) -> None:
        self._count = 0
        self._mean_x = self._mean_y = self._xx = self._yy = self._xy = 0.0

    def take(self, x: float, y: float) -> None:
        self._count += 1
        dx = x - self._mean_x
        self._mean_x += dx / self._count
        self._xx += dx * (x - self._mean_x)
        dy = y - self._mean_y
        self._mean_y += dy / self._count
        self._yy += dy * (y - self._mean_y)
        self._xy += dx * (y - self._mean_y)

    @property
    def value(self) -> float | None:
        spread = self._xx * self._yy
        return self._xy / math.sqrt(spread) if spread > 0 else None


def cumulative(counts: Counter[int], num_points: int = 1_000) -> tuple[list[int], list[float]]:
    """Values and the share of rows that do not exceed each, thinned to about so many points."""
    total = sum(counts.values())
    values: list[int] = []
    shares: list[float] = []
    so_far = 0
    for value in sorted(counts):
        so_far += counts[value]
        share = so_far / total
        if not shares or share - shares[-1] >= 1 / num_points or so_far == total:
            values.append(value)
            shares.append(round(share, 5))
    return values, shares
