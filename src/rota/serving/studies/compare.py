"""Which stack serves a workload better: all of them on the same arrivals, with the same seeds of everything random."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import msgspec

from rota import __version__
from rota.base.config import config_hash
from rota.base.errors import CapabilityError, ConfigError, DataError
from rota.base.random_streams import RandomStreams
from rota.serving.assemble import build
from rota.serving.metrics.summary import Summary
from rota.serving.sim.predictions import IN_A_SIMULATION
from rota.serving.sim.run import SimulationConfig, system_config
from rota.serving.stack import StackConfig
from rota.serving.studies.differences import Design, Difference, Pair, differences
from rota.serving.studies.observe import Observation, drawn_anew, is_drawn, observe
from rota.serving.studies.runner import Runner

NUM_REPEATS_DRAWN = 10
"""Where arrivals are drawn and nothing else is said."""


class ComparedStack(msgspec.Struct, frozen=True, kw_only=True):
    """One of the stacks and what it got in the first repeat."""

    name: str
    stack: StackConfig
    summary: Summary


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The answer. The first stack is the baseline of all differences."""

    baseline: str
    design: Design
    num_repeats: int
    confidence: float
    seed: int
    stacks: tuple[ComparedStack, ...]
    differences: tuple[Difference, ...]
    config_hash: str
    version: str = __version__


def design_of(config: SimulationConfig, num_repeats: int | None) -> tuple[Design, int]:
    """What is repeated, and how often: a workload that is drawn is drawn anew, a recorded trace is resampled; one
    repeat makes do with windows of time. Unless told, drawn workloads repeat and recorded ones do not."""
    drawn = is_drawn(config)
    if num_repeats is None:
        num_repeats = NUM_REPEATS_DRAWN if drawn else 1
    if num_repeats == 1:
        return "windows", 1
    return ("drawn" if drawn else "resampled"), num_repeats


def compare(
    stacks: Mapping[str, StackConfig],
    common: SimulationConfig,
    runner: Runner,
    *,
    num_repeats: int | None = None,
    confidence: float = 0.95,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Comparison, dict[str, Observation]]:
    """Simulate every stack on the same arrivals and judge the differences from the first one; also returns what was
    observed of each stack's first repeat.

    `common` is what the runs share, its seed the one that the repeats' seeds are drawn from. `on_progress(runs done,
    runs in all)`. Raises `ConfigError` for a stack that cannot be built, before anything runs, and `DataError` for a
    workload of too few requests.
    """
    for name, stack in stacks.items():
        try:
            build(system_config(dataclasses.replace(common, stack=stack, num_instances=1)), IN_A_SIMULATION)
        except (ConfigError, CapabilityError) as error:
            raise ConfigError(f"{name}: {error.message}", hint=error.hint) from None
    design, num_repeats = design_of(common, num_repeats)
    repeats = repeats_of(common, design, num_repeats)
    configs = [dataclasses.replace(repeat, stack=stack) for repeat in repeats for stack in stacks.values()]
    observed: dict[int, Observation] = {}
    for index, observation in runner.map(observe, configs, lambda: on_progress(len(observed), len(configs))):
        observed[index] = observation
        on_progress(len(observed), len(configs))
    names = list(stacks)
    runs = [[observed[r * len(names) + s] for s in range(len(names))] for r in range(len(repeats))]
    pairs_of = {
        name: [Pair(run[0].columns, run[index].columns) for run in runs] for index, name in enumerate(names) if index
    }
    stream = RandomStreams(common.seed).stream("bootstrap")
    try:
        found = differences(
            pairs_of,
            names[0],
            design=design,
            has_slo=has_slo(common),
            confidence=confidence,
            stream=stream,
        )
    except ValueError as error:
        raise DataError(f"{common.trace}: {error}", hint="use more of the trace, or --repeats 10") from None
    first = dict(zip(names, runs[0], strict=True))
    comparison = Comparison(
        baseline=names[0],
        design=design,
        num_repeats=num_repeats,
        confidence=confidence,
        seed=common.seed,
        stacks=tuple(ComparedStack(name=n, stack=stacks[n], summary=first[n].summary) for n in names),
        differences=tuple(found),
        config_hash=config_hash(msgspec.to_builtins([system_config(c) for c in configs[: len(names)]])),
    )
    return comparison, first


def repeats_of(common: SimulationConfig, design: Design, num_repeats: int) -> Sequence[SimulationConfig]:
    """The workloads to play, each with a seed of its own. Of a recorded trace the first is as it was recorded."""
    if design == "windows":
        return [common]
    anew = drawn_anew(common, num_repeats, "repeats")
    return anew if design == "drawn" else [common, *anew]


def has_slo(config: SimulationConfig) -> bool:
    """Whether anything was promised."""
    return config.slo != type(config.slo)()
