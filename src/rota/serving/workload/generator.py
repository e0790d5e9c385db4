"""Synthetic workloads: when requests come, how long they are, what they share and whose they are; from seeded draws."""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from math import inf, sqrt

import msgspec

from rota.base.instant import NANOSECONDS_PER_SECOND, Duration
from rota.base.random_streams import RandomStreams, Stream
from rota.serving.model.request import DEFAULT_TENANT, TenantId
from rota.serving.workload.arrival_process import ArrivalProcess
from rota.serving.workload.arrivals import MAX_SHARED_TOKENS, Arrival
from rota.serving.workload.conversations import Conversations, ConversationSampler
from rota.serving.workload.distributions import Lengths, QuantileSampler, check, share_below
from rota.serving.workload.formats.prefixes import PREFIX_BLOCK_TOKENS
from rota.serving.workload.reuse import PrefixReuse, ReuseSampler

_GROUP_STRIDE = 2**32
"""Ids of one group's blocks lie below the next group's."""


class SharedPrefixes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A share of the requests belongs to one of `num_groups` groups, equally likely; those of a group begin alike."""

    num_groups: int
    num_tokens: int
    share: float = 1.0

    def __post_init__(self) -> None:
        check(1 <= self.num_groups < _GROUP_STRIDE, "num_groups", "at least 1", self.num_groups)
        check(1 <= self.num_tokens <= MAX_SHARED_TOKENS, "num_tokens", "at least 1 and at most 2^24", self.num_tokens)
        check(0 <= self.share <= 1, "share", "from 0 to 1", self.share)


class RequestClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A share of the requests that has its own priority and tenant, and may have its own lengths."""

    share: float
    priority: int = 0
    tenant: str = DEFAULT_TENANT
    prompt: Lengths | None = None
    output: Lengths | None = None

    def __post_init__(self) -> None:
        check(0 < self.share < inf, "share", "positive", self.share)
        check(bool(self.tenant), "tenant", "not empty", self.tenant)


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
    length_correlation: float = 0.0
    """Between prompt and output: of the normal scores of the two (a Gaussian copula), so that both distributions stay
    what they are."""
    reuse: PrefixReuse | None = None
    sessions: tuple[Conversations, ...] = ()
    """Kinds of session; every open row is the first of one then."""

    def __post_init__(self) -> None:
        check(1 <= self.num_requests <= 10**12, "num_requests", "from 1 to 10^12", self.num_requests)
        check(-1 <= self.length_correlation <= 1, "length_correlation", "from -1 to 1", self.length_correlation)
        kinds = [name for name in ("prefix", "reuse", "sessions") if getattr(self, name)]
        check(len(kinds) <= 1, " and ".join(kinds) or "prefix", "given one at a time", kinds)
        check(not (self.sessions and self.classes), "classes", "left out with sessions, which have their own", "both")


def generate(workload: SyntheticWorkload, streams: RandomStreams) -> Iterator[Arrival]:
    """Yield the workload's arrivals; the same workload and seed give the same ones.

    Each kind of draw has a stream of its own, so that e.g. another rate leaves the lengths alone.
    """
    instants = workload.arrivals.instants(streams.stream("workload.gaps"))
    if workload.sessions:
        yield from islice(_sessions(workload, instants, streams), workload.num_requests)
        return
    bodies = _Bodies(workload, streams)
    for at in islice(instants, workload.num_requests):
        yield bodies.draw(Duration(round(at * NANOSECONDS_PER_SECOND)))


def sized(workload: SyntheticWorkload, num_requests: int) -> SyntheticWorkload:
    """The same workload with so many requests."""
    return msgspec.structs.replace(workload, num_requests=num_requests)


def _sessions(workload: SyntheticWorkload, instants: Iterator[float], streams: RandomStreams) -> Iterator[Arrival]:
    sampler = ConversationSampler(workload.sessions, workload.prompt, workload.output, streams)
    for number, at in enumerate(instants):
        yield from sampler.session(f"s-{number}", round(at * NANOSECONDS_PER_SECOND))


class _Bodies:
    """Draws all of a request but when it comes."""

    def __init__(self, workload: SyntheticWorkload, streams: RandomStreams) -> None:
        self._prompts, self._outputs = (
            streams.stream("workload.prompt_tokens"),
            streams.stream("workload.output_tokens"),
        )
        self._classes, self._groups = streams.stream("workload.classes"), streams.stream("workload.prefixes")
        self._mix = _Mixture(workload)
        self._prefix = workload.prefix
        self._correlation = workload.length_correlation
        self._reuse = None if workload.reuse is None else ReuseSampler(workload.reuse, streams.stream("workload.reuse"))
        self._block_tokens = PREFIX_BLOCK_TOKENS if workload.reuse is None else workload.reuse.block_tokens

    def draw(self, at: Duration) -> Arrival:
        """The next request, at this instant."""
        kind, prompt, output = self._mix.draw(self._classes)
        num_prompt_tokens, num_output_tokens = self._lengths(prompt, output)
        if self._reuse is not None:
            hashes = self._reuse.prefix(num_prompt_tokens)
        else:
            hashes = _prefix(self._prefix, num_prompt_tokens, self._groups)
        return Arrival(
            at=at,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=num_output_tokens,
            prefix_hashes=hashes,
            hash_block_tokens=self._block_tokens,
            tenant=TenantId(kind.tenant),
            priority=kind.priority,
        )

    def _lengths(self, prompt: QuantileSampler, output: QuantileSampler) -> tuple[int, int]:
        if not self._correlation:
            return prompt.draw(self._prompts), output.draw(self._outputs)
        score = self._prompts.normal()
        other = self._correlation * score + sqrt(1 - self._correlation**2) * self._outputs.normal()
        return round(prompt.value(share_below(score))), round(output.value(share_below(other)))


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
