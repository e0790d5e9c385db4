"""The smallest fleet that keeps a promise: a search over simulations, a check with seeds that the search never saw, and
what a little more or less load or hardware would do."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import msgspec

from rota import __version__
from rota.base.config import config_hash
from rota.serving.assemble import build
from rota.serving.metrics.definitions import per_second
from rota.serving.sim.predictions import IN_A_SIMULATION
from rota.serving.sim.run import SimulationConfig, system_config
from rota.serving.studies.observe import Observation, drawn_anew, observe
from rota.serving.studies.runner import Runner
from rota.serving.studies.statistics import share_interval

NUM_KNEE_STEPS = 2
"""Times that the gap between a load that is borne and one that is not is cut to a third."""
LOADS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
"""Of the knee's chart, in multiples of the load that was asked about."""


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What one run of one fleet gave."""

    num_instances: int
    seed: int
    load: float
    """In multiples of the load that was asked about."""
    offered_rps: float | None
    goodput_rps: float | None
    slo_attainment: float
    ttft_p99_ms: float | None
    tpot_p99_ms: float | None
    is_met: bool


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """How a fleet fared with seeds that the search never saw."""

    num_instances: int
    num_seeds: int
    num_met: int
    low: float
    high: float
    """Clopper and Pearson's interval, 95 %, for the share of such workloads in which the promise is kept."""
    attainments: tuple[float, ...]


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """The answer for one kind of instance."""

    profile: str
    num_instances: int | None
    """None if no fleet up to the largest that was allowed keeps the promise."""
    price_per_hour: float | None
    """Of one instance, as the user gave it."""
    cost_per_hour: float | None
    is_monotone: bool
    """Whether no larger fleet that was tried did worse than a smaller one that kept the promise. If one did, every size
    up to the answer was tried."""
    check: Check | None
    check_of_smaller: Check | None
    """The fleet with one instance less, on the same fresh seeds."""
    num_raised: int
    """How often a check was missed and the fleet made larger by one."""
    trials: tuple[Trial, ...]
    """Those of the workload that was asked about, by size."""

    @property
    def is_sure(self) -> bool:
        """Whether it kept the promise with every fresh seed."""
        return self.check is not None and self.check.num_met == self.check.num_seeds


class Knee(msgspec.Struct, frozen=True, kw_only=True):
    """Up to which load the fleet keeps the promise."""

    load: float | None
    """In multiples of the load that was asked about; None if even the least that was tried is too much."""
    rps: float | None
    points: tuple[Trial, ...]
    """By load."""


class Sizing(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer. Cost decides where every kind has a price, else the number of instances does."""

    attainment: float
    """The share of requests that must meet every target."""
    targets_ms: dict[str, float]
    best: str | None
    """Profile of the fleet to take."""
    fleets: tuple[Fleet, ...]
    knee: Knee | None
    """Of the best fleet."""
    seed: int
    num_runs: int
    config_hash: str
    version: str = __version__

    def best_fleet(self) -> Fleet | None:
        """The fleet to take."""
        return next((fleet for fleet in self.fleets if fleet.profile == self.best), None)


@dataclasses.dataclass(frozen=True, slots=True)
class SizeOptions:
    """How hard to look."""

    attainment: float = 0.99
    max_instances: int = 64
    num_search_seeds: int = 5
    """Workloads drawn anew that a fleet must bear besides the one that was asked about, to be a candidate."""
    num_check_seeds: int = 10
    num_raises_max: int = 2


def size(
    common: SimulationConfig,
    profiles: Sequence[str],
    prices: Mapping[str, float],
    options: SizeOptions,
    runner: Runner,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Sizing, dict[int, Observation]]:
    """Find the smallest fleet of each kind, check it, and try the best one at other loads; also returns what was
    observed of the best kind on the workload that was asked about, by number of instances.

    `common` is what all runs share; its `slo` must promise something. `on_progress(runs done,
    runs in all)`, the latter a guess.
    """
    for profile in profiles:
        build(system_config(dataclasses.replace(common, profile=profile)), IN_A_SIMULATION)
    search = _Search(common, options, runner, on_progress, len(profiles))
    found = {profile: search.fleet(profile, prices.get(profile)) for profile in profiles}
    best = _best([fleet for fleet, _ in found.values()])
    knee = None
    if best is not None and best.num_instances is not None:
        knee = search.knee(best.profile, best.num_instances)
    promised = {name: getattr(common.slo, name) for name in ("ttft", "tpot", "e2e")}
    sizing = Sizing(
        attainment=options.attainment,
        targets_ms={name: value / 1e6 for name, value in promised.items() if value is not None},
        best=None if best is None else best.profile,
        fleets=tuple(fleet for fleet, _ in found.values()),
        knee=knee,
        seed=common.seed,
        num_runs=search.num_runs,
        config_hash=config_hash(msgspec.to_builtins(system_config(common))),
    )
    return sizing, {} if best is None else found[best.profile][1]


def _best(fleets: Sequence[Fleet]) -> Fleet | None:
    able = [fleet for fleet in fleets if fleet.num_instances is not None]
    if not able:
        return None
    if all(fleet.cost_per_hour is not None for fleet in able):
        return min(able, key=lambda fleet: (fleet.cost_per_hour or 0.0, fleet.profile))
    return min(able, key=lambda fleet: (fleet.num_instances or 0, fleet.profile))


class _Search:
    """Runs trials and remembers those of the workload that was asked about."""

    def __init__(
        self,
        common: SimulationConfig,
        options: SizeOptions,
        runner: Runner,
        on_progress: Callable[[int, int], None],
        num_kinds: int,
    ) -> None:
        self._common = common
        self._options = options
        self._runner = runner
        self._on_progress = on_progress
        self.num_runs = 0
        # Four for the search, one more for the next instance; the knee's last gap takes two runs at a time.
        per_kind = 5 + options.num_search_seeds + 2 * options.num_check_seeds
        self._num_planned = num_kinds * per_kind + len(LOADS) + 2 * NUM_KNEE_STEPS

    # --- runs --------------------------------------------------------------------------------------------------------

    def _observe(self, configs: Sequence[SimulationConfig]) -> list[Observation]:
        observed: dict[int, Observation] = {}

        def tell() -> None:
            self._on_progress(self.num_runs, max(self.num_runs, self._num_planned))

        for index, observation in self._runner.map(observe, configs, tell):
            observed[index] = observation
            self.num_runs += 1
            tell()
        return [observed[index] for index in range(len(configs))]

    def _trial(self, config: SimulationConfig, observation: Observation, load: float = 1.0) -> Trial:
        summary, at = observation.summary, observation.columns.arrived_at
        attainment = summary.slo_attainment or 0.0
        return Trial(
            num_instances=config.num_instances,
            seed=config.seed,
            load=load,
            offered_rps=per_second(len(at) - 1, int(at.max() - at.min())) if len(at) else None,
            goodput_rps=summary.goodput_rps,
            slo_attainment=attainment,
            ttft_p99_ms=summary.ttft_ms.p99,
            tpot_p99_ms=summary.tpot_ms.p99,
            is_met=attainment >= self._options.attainment,
        )

    # --- the smallest fleet ------------------------------------------------------------------------------------------

    def fleet(self, profile: str, price: float | None) -> tuple[Fleet, dict[int, Observation]]:
        """The smallest fleet of one kind, and what was observed of the sizes around it."""
        kind = dataclasses.replace(self._common, profile=profile)
        seen: dict[int, Observation] = {}
        count = self._smallest(kind, seen)
        count = self._borne_by_search_seeds(kind, count, seen)
        check = smaller = None
        num_raised = 0
        while count is not None:
            check, smaller = self._checks(kind, count, f"size.check.{num_raised}")
            is_last = num_raised == self._options.num_raises_max or count == self._options.max_instances
            if check.num_met == check.num_seeds or is_last:
                break
            num_raised, count = num_raised + 1, count + 1
        if count is not None:
            self._try(kind, [n for n in (count - 1, count, count + 1) if n > 0], seen)
        trials = [self._trial(dataclasses.replace(kind, num_instances=n), seen[n]) for n in sorted(seen)]
        fleet = Fleet(
            profile=profile,
            num_instances=count,
            price_per_hour=price,
            cost_per_hour=None if price is None or count is None else price * count,
            is_monotone=self._is_monotone(seen),
            check=check,
            check_of_smaller=smaller,
            num_raised=num_raised,
            trials=tuple(trials),
        )
        return fleet, seen

    def _try(self, kind: SimulationConfig, counts: Sequence[int], seen: dict[int, Observation]) -> None:
        """Play the workload that was asked about through fleets of these sizes, unless they were tried."""
        new = [count for count in counts if count not in seen]
        observed = self._observe([dataclasses.replace(kind, num_instances=count) for count in new])
        seen.update(zip(new, observed, strict=True))

    def _is_met(self, observation: Observation) -> bool:
        return (observation.summary.slo_attainment or 0.0) >= self._options.attainment

    def _is_monotone(self, seen: Mapping[int, Observation]) -> bool:
        verdicts = [self._is_met(seen[count]) for count in sorted(seen)]
        return verdicts == sorted(verdicts)

    def _smallest(self, kind: SimulationConfig, seen: dict[int, Observation]) -> int | None:
        """The smallest fleet that keeps the promise on the workload that was asked about: doubling, then cutting the
        gap, two sizes at a time since they can run side by side; all sizes where larger is seen not to be better."""
        most = self._options.max_instances
        low, high = 0, 1  # low misses, high is not known yet
        while True:
            pair = [high, min(2 * high, most)]
            self._try(kind, pair, seen)
            met = [count for count in pair if self._is_met(seen[count])]
            if met:
                low, high = (low if met[0] == pair[0] else pair[0]), met[0]
                break
            if pair[1] == most:
                return None
            low, high = pair[1], min(2 * pair[1], most)
        while high - low > 1:
            third = max(1, (high - low) // 3)
            pair = sorted({low + third, high - third} - {low, high})
            self._try(kind, pair, seen)
            for count in reversed(pair):
                if self._is_met(seen[count]):
                    high = count
            low = max([low, *(count for count in pair if count < high)])
        if self._is_monotone(seen):
            return high
        self._try(kind, range(1, high), seen)
        return min(count for count in seen if self._is_met(seen[count]))

    def _borne_by_search_seeds(
        self, kind: SimulationConfig, count: int | None, seen: dict[int, Observation]
    ) -> int | None:
        """The first size from `count` on that keeps the promise on every search seed, too."""
        if not self._options.num_search_seeds:
            return count
        while count is not None and count <= self._options.max_instances:
            sized = dataclasses.replace(kind, num_instances=count)
            configs = drawn_anew(sized, self._options.num_search_seeds, "size.search")
            self._try(kind, [count], seen)
            if self._is_met(seen[count]) and all(map(self._is_met, self._observe(configs))):
                return count
            count += 1
        return None

    def _checks(self, kind: SimulationConfig, count: int, purpose: str) -> tuple[Check, Check | None]:
        """The fleet and the one that is smaller by one, on the same fresh seeds."""
        num_seeds = self._options.num_check_seeds
        counts = [count - 1, count] if count > 1 else [count]
        configs = [
            config
            for each in counts
            for config in drawn_anew(dataclasses.replace(kind, num_instances=each), num_seeds, purpose)
        ]
        observed = self._observe(configs)
        checks = []
        for index, each in enumerate(counts):
            mine = observed[index * num_seeds : (index + 1) * num_seeds]
            num_met = sum(map(self._is_met, mine))
            low, high = share_interval(num_met, num_seeds)
            attainments = tuple(one.summary.slo_attainment or 0.0 for one in mine)
            checks.append(
                Check(
                    num_instances=each,
                    num_seeds=num_seeds,
                    num_met=num_met,
                    low=low,
                    high=high,
                    attainments=attainments,
                )
            )
        return checks[-1], checks[0] if len(checks) > 1 else None

    # --- other loads -------------------------------------------------------------------------------------------------

    def knee(self, profile: str, count: int) -> Knee:
        """Goodput against load, and up to which load the promise is kept on the workload that was asked about."""
        kind = dataclasses.replace(self._common, profile=profile, num_instances=count)
        points: dict[float, Trial] = {}
        self._try_loads(kind, LOADS, points)
        for _ in range(NUM_KNEE_STEPS):
            met, missed = _bracket(points)
            if met is None or missed is None:
                break
            self._try_loads(kind, [met + (missed - met) / 3, met + 2 * (missed - met) / 3], points)
        met, _ = _bracket(points)
        ordered = tuple(points[load] for load in sorted(points))
        return Knee(load=met, rps=None if met is None else points[met].offered_rps, points=ordered)

    def _try_loads(self, kind: SimulationConfig, loads: Sequence[float], points: dict[float, Trial]) -> None:
        configs = [at_load(kind, load) for load in loads]
        for load, config, one in zip(loads, configs, self._observe(configs), strict=True):
            points[load] = self._trial(config, one, load)


def at_load(config: SimulationConfig, load: float) -> SimulationConfig:
    """The same run with `load` times as many requests a second, everything else as it was."""
    if config.rate is not None:
        return dataclasses.replace(config, rate=config.rate * load)
    return dataclasses.replace(config, speedup=config.speedup * load)


def _bracket(points: Mapping[float, Trial]) -> tuple[float | None, float | None]:
    """The largest load below the first that is missed, and that one."""
    met: float | None = None
    for load in sorted(points):
        if not points[load].is_met:
            return met, load
        met = load
    return met, None
