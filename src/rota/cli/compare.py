"""`rota compare`: which stack serves a workload better, and which differences are real."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rota.base.errors import ConfigError
from rota.cli.flags import Jobs, Json, Seed, at_least, between, positive, refuse_unwritable, writing
from rota.cli.output import Progress, print_json, print_table, say
from rota.cli.targets import slo_of

if TYPE_CHECKING:
    from rota.serving.studies.compare import Comparison


def compare(
    stacks: Annotated[list[str], typer.Argument(help="Stack files (TOML), or 'default'; the first is the baseline.")],
    trace: Annotated[Path, typer.Option(help="Trace file; the format is recognised from its content.")],
    profile: Annotated[
        str, typer.Option(help="Model and accelerator: a shipped name or a TOML file.")
    ] = "llama-3.1-8b-a100",
    instances: Annotated[int, typer.Option(help="Number of engines behind the router.")] = 1,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second: Poisson arrivals in place of the trace's own.")
    ] = None,
    num_requests: Annotated[int | None, typer.Option(help="Play only the first so many requests.")] = None,
    slo: Annotated[str | None, typer.Option(help="Targets, such as ttft=500ms,tpot=50ms.")] = None,
    repeats: Annotated[
        int | None,
        typer.Option(help="Workloads to play, each with a seed of its own; 10 if arrivals are drawn, 1 of a trace."),
    ] = None,
    confidence: Annotated[float, typer.Option(help="That no difference is called real which is not.")] = 0.95,
    seed: Seed = 0,
    jobs: Jobs = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report that opens offline.")] = None,
    json: Json = False,
) -> None:
    """Play the same arrivals through several stacks and say which differences are real.

    Everything random has the same seed in every stack. Exit code 0, whatever is found.
    """
    from rota.serving.sim.run import SimulationConfig
    from rota.serving.stack import load_stack
    from rota.serving.studies.compare import compare as run
    from rota.serving.studies.compare_report import write_comparison
    from rota.serving.studies.runner import LocalRunner

    if len(stacks) < 2:
        raise ConfigError("STACKS: two at least are needed", hint="such as rota compare default mine.toml --trace T")
    common = SimulationConfig(
        trace=trace,
        num_instances=at_least("--instances", instances, 1),
        profile=profile,
        seed=seed,
        num_requests=None if num_requests is None else at_least("--num-requests", num_requests, 1),
        rate=None if rate is None else positive("--rate", rate),
        slo=slo_of("--slo", slo),
    )
    named = dict(zip(_names(stacks), (load_stack(None if s == "default" else s) for s in stacks), strict=True))
    refuse_unwritable("--report", report)
    with Progress("comparing", total=None, unit="runs") as progress, LocalRunner(jobs) as runner:
        comparison, observed = run(
            named,
            common,
            runner,
            num_repeats=None if repeats is None else at_least("--repeats", repeats, 1),
            confidence=between("--confidence", confidence, 0.5, 0.9999),
            on_progress=progress.reached_of,
        )
    if report is not None:
        with writing("--report", report):
            write_comparison(report, f"{' and '.join(named)} on {trace.name}", comparison, observed)
        say(f"report: {report}")
    if json:
        print_json(comparison)
    else:
        _print(comparison)


def _names(stacks: list[str]) -> list[str]:
    """Short names, each once: the file's stem; where two have the same, a number tells them apart."""
    names: list[str] = []
    for stack in stacks:
        stem = Path(stack).stem
        taken = sum(name == stem or name.startswith(f"{stem}#") for name in names)
        names.append(f"{stem}#{taken + 1}" if taken else stem)
    return names


def _print(comparison: "Comparison") -> None:
    from rota.serving.studies.compare_report import label, sentence

    rows = []
    for stack in comparison.stacks:
        one = stack.summary
        ttft, tpot, e2e = one.ttft_ms, one.tpot_ms, one.e2e_ms
        p99 = None if e2e.p99 is None else e2e.p99 / 1000
        mean = None if e2e.mean is None else e2e.mean / 1000
        times = (ttft.mean, ttft.p99, tpot.mean, tpot.p99, mean, p99)
        rows.append((stack.name, one.num_requests, one.num_finished, *times, one.slo_attainment))
    columns = ("stack", "requests", "finished", "ttft mean ms", "p99", "tpot mean ms", "p99", "e2e mean s", "p99")
    print_table((*columns, "SLO met"), rows)
    print()
    base = comparison.baseline
    print_table(
        ("stack", "quantity", f"than {base}", "p, Holm"),
        [(one.stack, label(one), sentence(one), one.p_adjusted) for one in comparison.differences],
    )
