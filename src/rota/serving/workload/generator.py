"""Synthetic workloads: when requests come, how long they are, what they share and whose they are; from seeded draws."""

from bisect import bisect_right
from collections.abc import Iterator
from math import inf, nan

import msgspec

from rota.base.instant import NANOSECONDS_PER_SECOND, Duration
from rota.base.random_streams import RandomStreams, Stream
from rota.serving.model.request import DEFAULT_TENANT, TenantId
from rota.serving.workload.arrivals import MAX_TOKENS, Arrival

PREFIX_BLOCK_TOKENS = 16
"""Granularity of shared prefixes: vLLM's block size, so that no sharing is lost to rounding."""

_GROUP_STRIDE = 2**32
"""Ids of one group's blocks lie below the next group's."""


class ArrivalProcess(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests a second and how bursty: gamma-distributed gaps with coefficient of variation `cv`, 1 being Poisson."""

    rate: float
    cv: float = 1.0

    def __post_init__(self) -> None:
        _check(0 < self.rate < inf, "rate", "positive", self.rate)
        _check(0.01 <= self.cv <= 100, "cv", "from 0.01 to 100", self.cv)


class Lengths(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A distribution by its quantiles: `{"0" = 16, "0.5" = 512, "0.9" = 2048, "1" = 4096}`, straight lines in between.

    Quantiles 0 and 1 must be given; lengths are at least 1 and do not fall.
    """

    quantiles: dict[str, int]

    def __post_init__(self) -> None:
        points = self.points()
        at, values = [p for p, _ in points], [value for _, value in points]
        ends = bool(at) and at[0] == 0 and at[-1] == 1
        _check(ends, "quantiles", "given at 0 and at 1", list(self.quantiles))
        _check(len(set(at)) == len(at), "quantiles", "given once each", list(self.quantiles))
        _check(values[0] >= 1, "quantiles", "of lengths of at least 1", values[0])
        _check(values[-1] <= MAX_TOKENS, "quantiles", f"of lengths of at most {MAX_TOKENS}", values[-1])
        _check(values == sorted(values), "quantiles", "of lengths that do not fall", values)

    def points(self) -> list[tuple[float, int]]:
        """The quantiles as numbers, in order."""
        points = []
        for text, value in self.quantiles.items():
            try:
                at = float(text)
            except ValueError:
                at = nan
            _check(0 <= at <= 1, "quantiles", "keyed by numbers from 0 to 1", text)
            points.append((at, value))
        return sorted(points)


class SharedPrefixes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A share of the requests belongs to one of `num_groups` groups, equally likely; those of a group begin alike."""

    num_groups: int
    num_tokens: int
    share: float = 1.0

    def __post_init__(self) -> None:
        _check(1 <= self.num_groups < _GROUP_STRIDE, "num_groups", "at least 1", self.num_groups)
        _check(1 <= self.num_tokens <= MAX_TOKENS, "num_tokens", "at least 1", self.num_tokens)
        _check(0 <= self.share <= 1, "share", "from 0 to 1", self.share)


class RequestClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A share of the requests that has its own priority and tenant, and may have its own lengths."""

    share: float
    priority: int = 0
    tenant: str = DEFAULT_TENANT
    prompt: Lengths | None = None
    output: Lengths | None = None

    def __post_init__(self) -> None:
        _check(0 < self.share < inf, "share", "positive", self.share)
        _check(bool(self.tenant), "tenant", "not empty", self.tenant)


class SyntheticWorkload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of a synthetic workload but its seed. Shares of the classes are weights: they need not sum to one.

    These structs raise ValueError for values out of range, which `rota.base.config` turns into an error with its line.
    """

    num_requests: int
    arrivals: ArrivalProcess
    prompt: Lengths
    output: Lengths
    prefix: SharedPrefixes | None = None
    classes: tuple[RequestClass, ...] = ()

    def __post_init__(self) -> None:
        _check(self.num_requests >= 1, "num_requests", "at least 1", self.num_requests)


class QuantileSampler:
    """Draws lengths from a piecewise-linear inverse distribution function."""

    def __init__(self, lengths: Lengths) -> None:
        self._points = lengths.points()
        self._at = [at for at, _ in self._points]

    def draw(self, stream: Stream) -> int:
        """One length."""
        at = stream.random()
        # The quantile at 1 closes the last interval: random() is below 1.
        right = bisect_right(self._at, at)
        (low, below), (high, above) = self._points[right - 1], self._points[right]
        return round(below + (above - below) * (at - low) / (high - low))


def generate(workload: SyntheticWorkload, streams: RandomStreams) -> Iterator[Arrival]:
    """Yield the workload's arrivals; the same workload and seed give the same ones.

    Each kind of draw has a stream of its own, so that e.g. another rate leaves the lengths alone.
    """
    gaps, prompts = streams.stream("workload.gaps"), streams.stream("workload.prompt_tokens")
    outputs, classes = streams.stream("workload.output_tokens"), streams.stream("workload.classes")
    groups = streams.stream("workload.prefixes")
    # A gamma distribution has cv = 1 / sqrt(shape); the scale then sets the mean to 1 / rate.
    shape = 1.0 / workload.arrivals.cv**2
    scale = 1.0 / (workload.arrivals.rate * shape)
    mix = _Mixture(workload)
    at = 0.0
    for _ in range(workload.num_requests):
        at += gaps.gamma(shape, scale)
        kind, prompt, output = mix.draw(classes)
        num_prompt_tokens = prompt.draw(prompts)
        yield Arrival(
            at=Duration(round(at * NANOSECONDS_PER_SECOND)),
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=output.draw(outputs),
            prefix_hashes=_prefix(workload.prefix, num_prompt_tokens, groups),
            hash_block_tokens=PREFIX_BLOCK_TOKENS,
            tenant=TenantId(kind.tenant),
            priority=kind.priority,
        )


class _Mixture:
    """Picks a class by its share, with the samplers that it uses."""

    def __init__(self, workload: SyntheticWorkload) -> None:
        self._kinds: list[tuple[RequestClass, QuantileSampler, QuantileSampler]] = []
        self._until: list[float] = []
        total = 0.0
        for kind in workload.classes or (RequestClass(share=1.0),):
            total += kind.share
            self._until.append(total)
            prompt = QuantileSampler(kind.prompt or workload.prompt)
            output = QuantileSampler(kind.output or workload.output)
            self._kinds.append((kind, prompt, output))

    def draw(self, stream: Stream) -> tuple[RequestClass, QuantileSampler, QuantileSampler]:
        index = bisect_right(self._until, stream.random() * self._until[-1])
        return self._kinds[min(index, len(self._kinds) - 1)]


def _prefix(prefix: SharedPrefixes | None, num_prompt_tokens: int, stream: Stream) -> tuple[int, ...]:
    if prefix is None:
        return ()
    # Both draws are made for every request, so that the share leaves later groups alone.
    member, group = stream.random() < prefix.share, stream.integers(0, prefix.num_groups)
    if not member:
        return ()
    num_blocks = min(prefix.num_tokens, num_prompt_tokens) // PREFIX_BLOCK_TOKENS
    return tuple(range(group * _GROUP_STRIDE, group * _GROUP_STRIDE + num_blocks))


def _check(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {got!r}")
