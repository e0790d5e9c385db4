"""One simulated run, from a trace to its summary: what `rota simulate` and tests call."""

import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from msgspec import UNSET

from rota import __version__
from rota.base.instant import Duration, Instant
from rota.base.journal import Header, Journal
from rota.base.random_streams import RandomStreams
from rota.serving.assemble import SystemConfig, header_of
from rota.serving.metrics.definitions import RequestRecord, Samples
from rota.serving.metrics.records_file import RecordsFile
from rota.serving.metrics.summary import RunFacts, Summary, Tally
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec, Role
from rota.serving.model.request import SLO, Request
from rota.serving.predictors.step_time.profiles import load_profile
from rota.serving.sim.cluster import EngineKind, SimulatedCluster, WorldOptions
from rota.serving.stack import StackConfig
from rota.serving.workload.arrivals import Arrival, to_request
from rota.serving.workload.followers import ArrivalFlow
from rota.serving.workload.formats import TraceReader, recognise
from rota.serving.workload.generator import SyntheticWorkload, generate
from rota.serving.workload.resampling import resample_blocks
from rota.serving.workload.retiming import scale_rate, take, with_poisson


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """What to simulate."""

    trace: Path
    num_instances: int = 1
    roles: tuple[Role, ...] = ()
    """One an instance; if empty, all of `num_instances` are mixed."""
    profile: str = "llama-3.1-8b-a100"
    stack: StackConfig = StackConfig()
    seed: int = 0
    num_requests: int | None = None
    """The first so many of the trace; all if None."""
    rate: float | None = None
    """Requests per second: replaces the trace's instants by a Poisson process."""
    slo: SLO = SLO()
    engine: EngineKind = "model"
    speedup: float = 1.0
    """The trace's own arrivals, so many times as fast."""
    resample_block: Duration | None = None
    """Draw another trace of the same kind, from blocks of so many nanoseconds; before it is sped up."""
    workload: SyntheticWorkload | None = None
    """Drawn in place of reading `trace`, which then only names it."""
    limits: InstanceLimits | None = None
    """In place of the profile's."""


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """What came of it."""

    summary: Summary
    records: list[RequestRecord]
    samples: dict[InstanceId, Samples]
    system: SystemConfig
    limit_differences: tuple[str, ...] = ()
    """Where the instances' limits are not those that the profile's step times belong to; KV capacity above all."""
    not_taken: Mapping[str, int] = field(default_factory=dict)
    """Rows of the trace that were not taken as they are, by what was done to them."""


def system_config(config: SimulationConfig) -> SystemConfig:
    """The machines of this run."""
    limits = limits_of(config)
    roles = config.roles or (Role.MIXED,) * config.num_instances
    width = len(str(max(len(roles) - 1, 0)))
    return SystemConfig(
        stack=config.stack,
        instances=tuple(
            InstanceSpec(id=InstanceId(f"i{number:0{width}d}"), limits=limits, role=role)
            for number, role in enumerate(roles)
        ),
        seed=config.seed,
    )


def limits_of(config: SimulationConfig) -> InstanceLimits:
    """What bounds the steps of every instance of this run."""
    return load_profile(config.profile).instance_limits() if config.limits is None else config.limits


def arrivals_of(config: SimulationConfig, reader: TraceReader | None = None) -> Iterator[Arrival]:
    """The trace of this run, cut, drawn anew and retimed as asked; each draw from a stream of its own. `reader` reads
    the trace, if it is read; without, one that recognises it."""
    streams = RandomStreams(config.seed)
    if config.workload is not None:
        read = generate(config.workload, streams)
    else:
        read = (reader or recognise(config.trace)).read(config.trace, streams)
    arrivals = read if config.num_requests is None else take(read, config.num_requests)
    if config.resample_block is not None:
        arrivals = resample_blocks(arrivals, config.resample_block, streams.stream("resample"))
    if config.speedup != 1.0:
        arrivals = scale_rate(arrivals, config.speedup)
    if config.rate is not None:
        arrivals = with_poisson(arrivals, config.rate, streams.stream("arrivals"))
    return arrivals


def arrival_flow(config: SimulationConfig, reader: TraceReader | None = None) -> ArrivalFlow:
    """The trace as requests with their true output lengths: open ones by iterating, others as those they wait for end.
    Raises `DataError` at the first bad row."""
    limits = limits_of(config)

    def build(arrival: Arrival, number: int, at: Instant | None) -> tuple[Request, int]:
        return to_request(
            arrival,
            f"r-{number}",
            Instant(0),
            max_model_len=limits.max_model_len,
            block_size=limits.block_size,
            slo=config.slo,
            arrived_at=at,
        )

    return ArrivalFlow(arrivals_of(config, reader), build)


def simulate(
    config: SimulationConfig,
    *,
    journal_path: Path | None = None,
    records_path: Path | None = None,
    with_digest: bool = True,
    keep_records: bool = True,
    on_progress: Callable[[int], None] | None = None,
) -> SimulationResult:
    """Play a trace through a stack. The journal goes to `journal_path`, if given; its digest is part of the summary
    unless `with_digest` is off, which saves encoding every row. The records stream into `records_path`, if given (see
    `RecordsFile`); with `keep_records` off they are nowhere else, and memory is what requests in flight take, however
    long the trace. `on_progress` is told the number of requests ended."""
    began = time.process_time()
    system = system_config(config)
    profile = load_profile(config.profile)
    header = header_of(system)
    journal = Journal(header, path=journal_path) if with_digest or journal_path is not None else None
    reader = recognise(config.trace) if config.workload is None else None
    flow = arrival_flow(config, reader)
    tally = Tally()
    records: list[RequestRecord] = []
    sinks = [tally.add, *([records.append] if keep_records else [])]

    def take_in(record: RequestRecord) -> None:
        for sink in sinks:
            sink(record)

    cluster = SimulatedCluster(
        system,
        flow,
        profile.predictor(),
        WorldOptions(step_overhead=profile.step_overhead(), front_end=profile.front_end()),
        journal=journal,
        engine=config.engine,
        on_ended=None if on_progress is None else lambda num_ended, _: on_progress(num_ended),
        followers=flow.ended,
        on_record=take_in,
    )
    with ExitStack() as open_files:
        if journal is not None:
            open_files.enter_context(journal)
        if records_path is not None:
            sinks.append(open_files.enter_context(RecordsFile(records_path)).add)
        cluster.run()
    facts = _facts(cluster, config, header, journal, time.process_time() - began)
    summary = tally.summary(facts)
    # All instances have the same limits.
    differences = profile.capacity_differences(system.instances[0].limits)
    not_taken = {} if reader is None else dict(reader.tally.counts)
    return SimulationResult(summary, records, cluster.sampler.series, system, tuple(differences), not_taken)


def _facts(
    cluster: SimulatedCluster, config: SimulationConfig, header: Header, journal: Journal | None, cpu_seconds: float
) -> RunFacts:
    statistics = [machine.statistics() for machine in cluster.machines()]
    return RunFacts(
        num_steps=sum(one.num_steps for one in statistics),
        num_preemptions=sum(one.num_preemptions for one in statistics),
        num_cached_tokens=sum(one.num_cached_tokens for one in statistics),
        num_queried_tokens=sum(one.num_prompt_tokens for one in statistics),
        cpu_seconds=cpu_seconds,
        peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        seed=config.seed,
        config_hash=header.config_hash,
        journal_digest=None if journal is None else journal.digest,
        version=__version__,
        lengths=cluster.predictions.facts() or UNSET,
    )
