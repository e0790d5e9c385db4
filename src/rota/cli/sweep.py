"""`rota sweep`: many runs, over any parameters."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rota.base.errors import ConfigError
from rota.cli.flags import Jobs, Json, at_least, refuse_unwritable, writing
from rota.cli.output import Progress, print_json, print_table, say, warn
from rota.cli.targets import slo_of

if TYPE_CHECKING:
    from rota.serving.studies.runner import LocalRunner, RayRunner
    from rota.serving.studies.spec import SweepSpec
    from rota.serving.studies.sweep import SweepResult


class Where(StrEnum):
    """Where runs are carried out."""

    LOCAL = "local"
    RAY = "ray"


def sweep(
    spec: Annotated[Path | None, typer.Argument(help="Sweep file (TOML); or say it with --set and --vary.")] = None,
    set: Annotated[list[str] | None, typer.Option(help="NAME=VALUE that all runs have. May be repeated.")] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(help="NAME=V1,V2,… or NAME=FROM:TO:STEPS. May be repeated; all combinations run."),
    ] = None,
    sample: Annotated[int | None, typer.Option(help="Draw so many combinations at random in place of all.")] = None,
    out: Annotated[
        Path, typer.Option(help="Results, one row a run (Parquet). A sweep that was stopped goes on.")
    ] = Path("sweep.parquet"),
    best: Annotated[str, typer.Option(metavar="METRIC", help="What the best runs are best by.")] = "goodput_rps",
    on: Annotated[Where, typer.Option(help="This machine's cores, or a Ray cluster.")] = Where.LOCAL,
    jobs: Jobs = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report that opens offline.")] = None,
    json: Json = False,
) -> None:
    """Run all combinations of some parameters of stack, fleet and workload, or a random sample of them.

    Exit code 1 if a run failed; its row says why.
    """
    from rota.serving.studies.spec import Runs, load_spec
    from rota.serving.studies.sweep import sweep as run
    from rota.serving.studies.sweep_report import write_sweep

    given = load_spec(spec) if spec is not None else None
    folder = spec.parent if spec is not None else Path()
    whole = _with_flags(given, set or [], vary or [], sample)
    runs = Runs(whole, folder, slo_of)
    refuse_unwritable("--report", report)
    with Progress("sweeping", total=len(runs.points), unit="runs") as progress, _runner(on, jobs) as runner:
        result, rows = run(runs, out, runner, by=best, on_progress=progress.reached_of)
    if report is not None:
        with writing("--report", report):
            write_sweep(report, f"A sweep over {', '.join(result.varied)}", result, rows, is_sample=bool(whole.sample))
        say(f"report: {report}")
    if json:
        print_json(result)
    else:
        _print(result)
    if result.num_failed:
        warn(f"{result.num_failed} runs failed; the column error of {result.out} says why")
        raise typer.Exit(1)


def _runner(on: Where, jobs: int | None) -> "LocalRunner | RayRunner":
    from rota.serving.studies.runner import LocalRunner, RayRunner

    if on is Where.LOCAL:
        return LocalRunner(jobs)
    if jobs is not None:
        raise ConfigError("--jobs: is of this machine", hint="a Ray cluster runs as many as it has cores")
    return RayRunner()


def _with_flags(given: "SweepSpec | None", sets: list[str], varies: list[str], sample: int | None) -> "SweepSpec":
    """The sweep file with what the flags add to it or put in its place."""
    from rota.serving.studies.spec import Sample, SweepSpec

    base: dict[str, Any] = dict(given.base) if given else {}
    vary = dict(given.vary) if given else {}
    for text in sets:
        name, value = _pair("--set", text)
        base[name] = _value(value)
    for text in varies:
        name, value = _pair("--vary", text)
        vary[name] = _values(value)
    if not vary:
        raise ConfigError("--vary: nothing is varied", hint="give a sweep file, or such as --vary instances=1,2,4")
    drawn = given.sample if given else None
    if sample is not None:
        drawn = Sample(at_least("--sample", sample, 1), drawn.seed if drawn else 0)
    return SweepSpec(base, vary, drawn)


def _pair(flag: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise ConfigError(f"{flag}: {text!r} is not of the form NAME=VALUE")
    return name.strip(), value.strip()


def _values(text: str) -> Any:
    from rota.serving.studies.spec import Range

    parts = text.split(":")
    if len(parts) == 3:
        try:
            return Range(float(parts[0]), float(parts[1]), int(parts[2]))
        except ValueError as error:
            raise ConfigError(f"--vary: {text!r} is not FROM:TO:STEPS: {error}") from None
    return [_value(part.strip()) for part in text.split(",")]


def _value(text: str) -> bool | int | float | str:
    """A value as TOML would read it, but text needs no quotes."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _print(result: "SweepResult") -> None:
    metrics = ("goodput_rps", "slo_attainment", "ttft_p99_ms", "tpot_p99_ms")
    columns = ("run", *result.varied, *dict.fromkeys((result.by, *metrics)))
    print_table(columns, [tuple(row[name] for name in columns) for row in result.best])
    print()
    print(f"{result.num_runs} runs in {result.out}, of which {result.num_reused} were there already")
