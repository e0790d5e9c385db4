"""What a sizing says, in sentences, and as a page that opens offline."""

from collections.abc import Mapping
from pathlib import Path

from rota.base.provenance import provenance
from rota.export.html import Figure, Section, Table, Text, write_report
from rota.serving.metrics.charts import latency_figure, line_figure, load_figure
from rota.serving.studies.observe import Observation
from rota.serving.studies.size import Check, Fleet, Knee, Sizing, Trial


def promise(sizing: Sizing) -> str:
    """The SLO in words."""
    targets = " and ".join(f"{name.upper()} within {value:g} ms" for name, value in sizing.targets_ms.items())
    return f"{targets}, for {100 * sizing.attainment:.4g} % of all requests"


def conclusions(sizing: Sizing) -> list[str]:
    """The answer, how sure it is, how much more load it bears, and what one instance more would buy; a sentence
    each."""
    fleet = sizing.best_fleet()
    if fleet is None or fleet.num_instances is None or fleet.check is None:
        return ["no fleet of the sizes that were tried keeps the promise"]
    said = [f"take {_named(fleet)}"]
    check, smaller = fleet.check, fleet.check_of_smaller
    sure = (
        f"it keeps the promise in {check.num_met} of {check.num_seeds} workloads that the search never saw; that is in "
        f"{check.low:.0%} to {check.high:.0%} of all such workloads, with 95 % confidence"
    )
    said.append(sure if fleet.is_sure else f"NOT SURE: {sure}")
    if smaller is not None:
        said.append(f"{smaller.num_instances} would keep it in {smaller.num_met} of {smaller.num_seeds}{_here(fleet)}")
    said += _of_loads(sizing.knee) + _of_next(fleet)
    if fleet.num_raised:
        said.append(f"the search found {fleet.num_instances - fleet.num_raised}; fresh workloads asked for more")
    if not fleet.is_monotone:
        said.append("a larger fleet did worse than a smaller one somewhere, so every size up to this one was tried")
    return said


def _named(fleet: Fleet) -> str:
    cost = "" if fleet.cost_per_hour is None else f", {fleet.cost_per_hour:.4g} an hour"
    return f"{fleet.num_instances} × {fleet.profile}{cost}"


def _here(fleet: Fleet) -> str:
    """Why the smaller fleet is not the answer."""
    trial = _trial_of(fleet, (fleet.num_instances or 0) - 1)
    if trial is None or trial.is_met:
        return ", but not in every one that the search saw"
    return f"; on the workload itself {trial.slo_attainment:.2%} of its requests are in time"


def _of_loads(knee: Knee | None) -> list[str]:
    if knee is None:
        return []
    if knee.load is None or knee.rps is None:
        return ["it keeps the promise at none of the loads that were tried"]
    most = max(point.load for point in knee.points)
    at_least = "at least " if knee.load == most else ""
    return [f"it bears {at_least}{knee.load:.3g} times this load, {knee.rps:.3g} requests a second"]


def _of_next(fleet: Fleet) -> list[str]:
    count = fleet.num_instances or 0
    now, more = _trial_of(fleet, count), _trial_of(fleet, count + 1)
    if now is None or more is None:
        return []
    price = "" if fleet.price_per_hour is None else f" for {fleet.price_per_hour:.4g} an hour"
    shares = f"in time {now.slo_attainment:.2%} → {more.slo_attainment:.2%}"
    ttft = f"TTFT p99 {_ms(now.ttft_p99_ms)} → {_ms(more.ttft_p99_ms)} ms"
    tpot = f"TPOT p99 {_ms(now.tpot_p99_ms)} → {_ms(more.tpot_p99_ms)} ms"
    return [f"one instance more{price}: {shares}, {ttft}, {tpot}"]


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _trial_of(fleet: Fleet, count: int) -> Trial | None:
    return next((trial for trial in fleet.trials if trial.num_instances == count), None)


def write_sizing(path: Path, title: str, sizing: Sizing, observed: Mapping[int, Observation]) -> None:
    """Write the report, replacing what is there."""
    sections: list[Section] = [
        Text("The promise", promise(sizing)),
        Text("The answer", "\n\n".join(f"{line[0].upper()}{line[1:]}." for line in conclusions(sizing))),
        Table("Kinds", [fleet_row(fleet) for fleet in sizing.fleets], _KINDS),
    ]
    for fleet in sizing.fleets:
        sections.append(Table(f"Sizes tried, {fleet.profile}", [trial_row(trial) for trial in fleet.trials]))
        if fleet.check is not None:
            sections.append(Figure(f"Fresh workloads, {fleet.profile}", _check_figure(sizing, fleet), _FRESH))
    if sizing.knee is not None:
        sections.append(Figure("Goodput against rate", _knee_figure(sizing.knee), _KNEE))
        sections.append(Table("Loads tried", [trial_row(point) for point in sizing.knee.points]))
    fleet_taken = sizing.best_fleet()
    if fleet_taken is not None and fleet_taken.num_instances is not None:
        count = fleet_taken.num_instances
        around = {f"{n} × {fleet_taken.profile}": observed[n] for n in (count - 1, count, count + 1) if n in observed}
        columns = {name: one.columns for name, one in around.items()}
        caption = "On the workload that was asked about."
        sections.append(Figure("How latencies spread", latency_figure(columns), caption))
        sections.append(Figure("Load over time", load_figure({name: one.load for name, one in around.items()})))
    write_report(path, title, sections, provenance(seed=sizing.seed, config_hash=sizing.config_hash))


_KINDS = "Fresh: of the workloads that the search never saw, those in which the promise is kept."
_FRESH = "Each point is a workload that the search never saw; both sizes meet the same ones."
_KNEE = "The workload that was asked about, faster and slower. On the diagonal every request is in time."


def fleet_row(fleet: Fleet) -> dict[str, object]:
    """A kind of instance, as a table shows it."""
    trial = None if fleet.num_instances is None else _trial_of(fleet, fleet.num_instances)
    return {
        "profile": fleet.profile,
        "instances": fleet.num_instances,
        "cost /h": fleet.cost_per_hour,
        "in time": None if trial is None else trial.slo_attainment,
        "ttft p99 ms": None if trial is None else trial.ttft_p99_ms,
        "tpot p99 ms": None if trial is None else trial.tpot_p99_ms,
        "fresh": _of(fleet.check),
        "one less": _of(fleet.check_of_smaller),
    }


def trial_row(trial: Trial) -> dict[str, object]:
    """A run, as a table shows it."""
    return {
        "instances": trial.num_instances,
        "load": trial.load,
        "requests /s": trial.offered_rps,
        "goodput /s": trial.goodput_rps,
        "in time": trial.slo_attainment,
        "ttft p99 ms": trial.ttft_p99_ms,
        "tpot p99 ms": trial.tpot_p99_ms,
        "kept": trial.is_met,
    }


def _of(check: Check | None) -> str:
    return "–" if check is None else f"{check.num_met} of {check.num_seeds}"


def _check_figure(sizing: Sizing, fleet: Fleet) -> object:
    lines = {
        f"{check.num_instances} instances": (list(range(1, check.num_seeds + 1)), list(check.attainments))
        for check in (fleet.check_of_smaller, fleet.check)
        if check is not None
    }
    figure = line_figure(
        lines, x="fresh workload", y="requests in time", tickformat=".1%", level=("promised", sizing.attainment)
    )
    lowest = min(min(values) for _, values in lines.values())
    margin = 0.08 * (1 - min(lowest, sizing.attainment)) + 0.0005
    figure.update_traces(mode="markers", marker={"size": 10})
    return figure.update_yaxes(range=[min(lowest, sizing.attainment) - margin, 1 + margin], rangemode="normal")


def _knee_figure(knee: Knee) -> object:
    points = [point for point in knee.points if point.offered_rps is not None]
    offered = [point.offered_rps or 0.0 for point in points]
    mark = None if knee.rps is None else ("kept up to here", knee.rps)
    return line_figure(
        {"goodput": (offered, [point.goodput_rps for point in points])},
        x="requests a second",
        y="in time, a second",
        mark=mark,
        diagonal=True,
    )
