"""What a load generator sends and when, decided before the first byte: from a rate, or from a trace."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Generic, TypeVar

import msgspec

from rota.base.instant import NANOSECONDS_PER_SECOND, Duration
from rota.base.random_streams import RandomStreams, Stream
from rota.serving.model.request import DEFAULT_TENANT, SLO, TenantId
from rota.serving.workload.arrivals import Arrival
from rota.serving.workload.followers import refuse_waiting
from rota.serving.workload.generator import Lengths, QuantileSampler

T = TypeVar("T")

DEFAULT_CLASS = "all"


class LoadClass(msgspec.Struct, frozen=True):
    """A share of the requests that is sent and reported apart."""

    name: str = DEFAULT_CLASS
    share: float = 1.0
    """A weight; shares need not sum to one."""
    priority: int | None = None
    """None leaves what the trace says."""
    tenant: TenantId | None = None
    slo: SLO = SLO()
    prompt: Lengths | None = None
    output: Lengths | None = None


class Planned(msgspec.Struct, frozen=True):
    """One request to be sent."""

    index: int
    at: Duration
    """Since the start of the run."""
    class_name: str
    num_prompt_tokens: int
    max_tokens: int
    priority: int = 0
    tenant: TenantId = DEFAULT_TENANT
    slo: SLO = SLO()
    session: str | None = None
    prefix_hashes: tuple[int, ...] = ()
    hash_block_tokens: int = 512


class TenantShare(msgspec.Struct, frozen=True):
    """How large a part of the requests a tenant sends."""

    tenant: TenantId
    share: float = 1.0


class Mix:
    """Who a request belongs to: one of the classes, of which there is at least one, and one of the tenants if any."""

    def __init__(self, classes: Sequence[LoadClass], tenants: Sequence[TenantShare], streams: RandomStreams) -> None:
        self._classes = _Weighted([*classes], [each.share for each in classes])
        self._tenants = _Weighted([*tenants], [each.share for each in tenants]) if tenants else None
        self._class_stream = streams.stream("bench.classes")
        self._tenant_stream = streams.stream("bench.tenants")

    def draw(self) -> tuple[LoadClass, TenantId | None]:
        """The class and the tenant of the next request; no tenant where none was asked for."""
        kind = self._classes.draw(self._class_stream)
        tenant = None if self._tenants is None else self._tenants.draw(self._tenant_stream).tenant
        return kind, kind.tenant or tenant


class _Weighted(Generic[T]):
    """Draws from options by their weights."""

    def __init__(self, options: Sequence[T], weights: Sequence[float]) -> None:
        self._options = options
        self._until: list[float] = []
        for weight in weights:
            self._until.append((self._until[-1] if self._until else 0.0) + weight)

    def draw(self, stream: Stream) -> T:
        place = bisect_right(self._until, stream.random() * self._until[-1])
        return self._options[min(place, len(self._options) - 1)]


def at_rate(
    rate: float,
    burstiness: float,
    prompt: Lengths,
    output: Lengths,
    mix: Mix,
    streams: RandomStreams,
) -> Iterator[Planned]:
    """Requests without end, `rate` a second. Gaps are gamma-distributed with shape `burstiness`: 1 is Poisson, less is
    burstier, more is steadier (as vLLM's `--burstiness`)."""
    gaps, prompts, outputs = (streams.stream(f"bench.{name}") for name in ("gaps", "prompt_tokens", "output_tokens"))
    samplers: dict[str, tuple[QuantileSampler, QuantileSampler]] = {}
    at = 0.0
    for index in count():
        at += gaps.gamma(burstiness, 1.0 / (rate * burstiness))
        kind, tenant = mix.draw()
        if kind.name not in samplers:
            samplers[kind.name] = QuantileSampler(kind.prompt or prompt), QuantileSampler(kind.output or output)
        prompt_lengths, output_lengths = samplers[kind.name]
        yield Planned(
            index=index,
            at=Duration(round(at * NANOSECONDS_PER_SECOND)),
            class_name=kind.name,
            num_prompt_tokens=prompt_lengths.draw(prompts),
            max_tokens=output_lengths.draw(outputs),
            priority=kind.priority or 0,
            tenant=tenant or DEFAULT_TENANT,
            slo=kind.slo,
        )


def from_trace(
    arrivals: Iterable[Arrival],
    speedup: float,
    mix: Mix,
    *,
    max_prompt_tokens: int | None = None,
    max_output_tokens: int | None = None,
) -> Iterator[Planned]:
    """The requests of a trace, `speedup` times as fast, with the trace's output length as `max_tokens`. Lengths beyond
    the caps are cut to them, for a model with a short context. Raises `DataError` at a row that waits for another."""
    for index, arrival in enumerate(refuse_waiting(arrivals)):
        kind, tenant = mix.draw()
        yield Planned(
            index=index,
            at=Duration(round(arrival.at / speedup)),
            class_name=kind.name,
            num_prompt_tokens=min(arrival.num_prompt_tokens, max_prompt_tokens or arrival.num_prompt_tokens),
            max_tokens=min(arrival.num_output_tokens, max_output_tokens or arrival.num_output_tokens),
            priority=arrival.priority if kind.priority is None else kind.priority,
            tenant=tenant or arrival.tenant,
            slo=kind.slo,
            session=arrival.session,
            prefix_hashes=arrival.prefix_hashes,
            hash_block_tokens=arrival.hash_block_tokens,
        )


def bounded(plan: Iterable[Planned], *, num_requests: int | None, duration: Duration | None) -> Iterator[Planned]:
    """The plan, cut after so many requests or at the first that would be sent after `duration`."""
    for planned in plan:
        if num_requests is not None and planned.index >= num_requests:
            return
        if duration is not None and planned.at > duration:
            return
        yield planned
