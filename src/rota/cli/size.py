"""`rota size`: the smallest fleet that keeps a promise."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rota.base.errors import ConfigError
from rota.cli.flags import Jobs, Json, Seed, at_least, positive, refuse_unwritable, writing
from rota.cli.output import Progress, print_json, print_lines, print_table, say
from rota.cli.targets import promise_of

if TYPE_CHECKING:
    from rota.serving.studies.size import Sizing


def size(
    trace: Annotated[Path, typer.Option(help="Trace file; the format is recognised from its content.")],
    slo: Annotated[str, typer.Option(help="Such as ttft=500ms,tpot=50ms,attainment=99%; 99 % unless said.")],
    profile: Annotated[
        list[str] | None, typer.Option(help="Model and accelerator: a shipped name or a TOML file. May be repeated.")
    ] = None,
    price: Annotated[
        list[str] | None, typer.Option(help="PROFILE=PRICE of one instance for an hour. May be repeated.")
    ] = None,
    stack: Annotated[Path | None, typer.Option(help="Stack file (TOML): which policies decide.")] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second: Poisson arrivals in place of the trace's own.")
    ] = None,
    num_requests: Annotated[int | None, typer.Option(help="Play only the first so many requests.")] = None,
    max_instances: Annotated[int, typer.Option(help="The largest fleet to think of.")] = 64,
    search_seeds: Annotated[int, typer.Option(help="Workloads drawn anew that a candidate must bear.")] = 5,
    check_seeds: Annotated[int, typer.Option(help="Fresh workloads that the answer is checked with.")] = 10,
    seed: Seed = 0,
    jobs: Jobs = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report that opens offline.")] = None,
    json: Json = False,
) -> None:
    """Find the smallest fleet whose requests meet their targets, and say how sure that is, which load it bears and what
    one instance more would buy.

    Exit code 1 if no fleet keeps the promise, or the one that was found does not keep it in every fresh workload.
    """
    from rota.serving.sim.run import SimulationConfig
    from rota.serving.stack import load_stack
    from rota.serving.studies.runner import LocalRunner
    from rota.serving.studies.size import SizeOptions
    from rota.serving.studies.size import size as run
    from rota.serving.studies.size_report import write_sizing

    targets, attainment = promise_of("--slo", slo)
    profiles = list(dict.fromkeys(profile or ["llama-3.1-8b-a100"]))
    common = SimulationConfig(
        trace=trace,
        stack=load_stack(stack),
        seed=seed,
        num_requests=None if num_requests is None else at_least("--num-requests", num_requests, 1),
        rate=None if rate is None else positive("--rate", rate),
        slo=targets,
    )
    options = SizeOptions(
        attainment=attainment,
        max_instances=at_least("--max-instances", max_instances, 1),
        num_search_seeds=at_least("--search-seeds", search_seeds, 0),
        num_check_seeds=at_least("--check-seeds", check_seeds, 1),
    )
    prices = _prices(price or [], profiles)
    refuse_unwritable("--report", report)
    with Progress("sizing", total=None, unit="runs") as progress, LocalRunner(jobs) as runner:
        sizing, observed = run(common, profiles, prices, options, runner, on_progress=progress.reached_of)
    if report is not None:
        with writing("--report", report):
            write_sizing(report, f"A fleet for {trace.name}", sizing, observed)
        say(f"report: {report}")
    if json:
        print_json(sizing)
    else:
        _print(sizing)
    best = sizing.best_fleet()
    if best is None or not best.is_sure:
        raise typer.Exit(1)


def _prices(given: list[str], profiles: list[str]) -> dict[str, float]:
    prices = {}
    for text in given:
        name, equals, value = text.rpartition("=")
        if not equals:
            raise ConfigError(
                f"--price: {text!r} is not of the form PROFILE=PRICE", hint="such as llama-3.1-8b-a100=2.5"
            )
        if name not in profiles:
            raise ConfigError(f"--price: {name!r} is none of the profiles", hint=f"they are {', '.join(profiles)}")
        try:
            prices[name] = positive("--price", float(value))
        except ValueError:
            raise ConfigError(f"--price: {value!r} is not a number") from None
    return prices


def _print(sizing: "Sizing") -> None:
    from rota.serving.studies.size_report import conclusions, fleet_row, trial_row

    rows = [fleet_row(fleet) for fleet in sizing.fleets]
    print_table(tuple(rows[0]), [tuple(row.values()) for row in rows])
    print()
    print_lines(conclusions(sizing))
    if sizing.knee is not None:
        print()
        loads = [trial_row(point) for point in sizing.knee.points]
        print_table(tuple(loads[0]), [tuple(row.values()) for row in loads])
