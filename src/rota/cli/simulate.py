"""`rota simulate`: play a trace through a stack."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rota.cli.flags import Json, Seed, at_least, positive, refuse_unwritable, writing
from rota.cli.output import Progress, print_json, print_table, say, warn
from rota.cli.targets import fleet_of, slo_of

if TYPE_CHECKING:
    from rota.serving.api import InstanceLimits
    from rota.serving.metrics.summary import GroupSummary, Summary
    from rota.serving.sim.run import SimulationConfig, SimulationResult

HEADER_LINES = {"azure": 1, "burstgpt": 1, "mooncake": 0, "rota": 1}
"""Formats with a request a line, and how many lines come before."""


class Engine(StrEnum):
    """Who decides an instance's steps."""

    MODEL = "model"
    VLLM = "vllm"


def simulate(
    trace: Annotated[Path, typer.Option(help="Trace file; the format is recognised from its content.")],
    instances: Annotated[int | None, typer.Option(help="Number of engines behind the router; 1 unless said.")] = None,
    roles: Annotated[str | None, typer.Option(help="Their roles, such as prefill:2,decode:6.")] = None,
    profile: Annotated[
        str, typer.Option(help="Model and accelerator: a shipped name, a TOML file or a folder of layer tables.")
    ] = "llama-3.1-8b-a100",
    stack: Annotated[Path | None, typer.Option(help="Stack file (TOML): which policies decide.")] = None,
    seed: Seed = 0,
    num_requests: Annotated[int | None, typer.Option(help="Play only the first so many requests.")] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second: Poisson arrivals in place of the trace's own.")
    ] = None,
    slo: Annotated[str | None, typer.Option(help="Targets in ms, such as ttft=500,tpot=50.")] = None,
    engine: Annotated[
        Engine, typer.Option(help="Who decides steps: our model of the engine, or vLLM's scheduler with our plug-in.")
    ] = Engine.MODEL,
    engine_settings: Annotated[
        Path | None,
        typer.Option(help="JSON of a real engine's settings (KV blocks and limits); they win over the profile's."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report that opens offline.")] = None,
    journal: Annotated[
        Path | None, typer.Option(help="Write every event and decision; for replay and explain.")
    ] = None,
    records: Annotated[
        Path | None, typer.Option(help="Write a row for each request to a Parquet file, while the run goes on.")
    ] = None,
    digest: Annotated[bool, typer.Option(help="Hash the journal even if it is not written.")] = True,
    json: Json = False,
) -> None:
    """Play a trace through a router and simulated engines, in virtual time, and print what its requests got.

    The engines know a request's true output length only when it ends; policies never do.
    """
    from rota.serving.sim.run import SimulationConfig
    from rota.serving.sim.run import simulate as run
    from rota.serving.stack import load_stack

    config = SimulationConfig(
        trace=trace,
        roles=fleet_of(instances, roles, default=1),
        profile=profile,
        stack=load_stack(stack),
        seed=seed,
        num_requests=None if num_requests is None else at_least("--num-requests", num_requests, 1),
        rate=None if rate is None else positive("--rate", rate),
        slo=slo_of("--slo", slo),
        engine=engine.value,
        limits=None if engine_settings is None else _limits(profile, engine_settings),
    )
    for flag, path in {"--report": report, "--journal": journal, "--records": records}.items():
        refuse_unwritable(flag, path)
    with Progress("simulating", total=_num_requests(trace, num_requests), unit="requests") as progress:
        result = run(
            config,
            journal_path=journal,
            records_path=records,
            with_digest=digest,
            keep_records=report is not None,
            on_progress=progress.reached,
        )
    summary = result.summary
    _warn_of_input(result, trace, is_given=engine_settings is not None)
    if report is not None:
        _write_report(report, config, result)
    print_json(summary) if json else _print(summary)
    if summary.num_rejected or summary.num_failed:
        warn(f"{summary.num_rejected} requests were rejected and {summary.num_failed} failed; latencies leave them out")


def _warn_of_input(result: "SimulationResult", trace: Path, *, is_given: bool) -> None:
    """What of the trace and the engine's settings was not taken as it is; `is_given` if settings were."""
    what = "the engine's own is used" if is_given else "step times of other batches are a guess"
    for difference in result.limit_differences:
        warn(f"{difference}; {what}")
    for done, count in result.not_taken.items():
        warn(f"{trace}: {count} {done}")


def _num_requests(trace: Path, num_requests: int | None) -> int | None:
    """How many requests are about to be played, for progress only: the lines of the trace, which are counted and not
    read. None for formats that do not have a line a request."""
    from rota.base.config import load_toml
    from rota.serving.workload.formats import recognise
    from rota.serving.workload.generator import SyntheticWorkload

    name = recognise(trace).name
    if name == "synthetic":
        num_rows = load_toml(trace, SyntheticWorkload).num_requests
    elif name in HEADER_LINES:
        last = b"\n"
        num_rows = -HEADER_LINES[name]
        with trace.open("rb") as file:
            while block := file.read(1 << 20):
                num_rows += block.count(b"\n")
                last = block
        num_rows += not last.endswith(b"\n")
    else:
        return num_requests
    return num_rows if num_requests is None else min(num_rows, num_requests)


def _limits(profile: str, engine_settings: Path) -> "InstanceLimits":
    from rota.serving.predictors.step_time.engine_settings import read_engine_settings
    from rota.serving.predictors.step_time.profiles import load_profile

    return read_engine_settings(engine_settings).limits(load_profile(profile).instance_limits())


def _write_report(path: Path, config: "SimulationConfig", result: "SimulationResult") -> None:
    from rota.base.provenance import provenance
    from rota.serving.metrics.report import write_run_report

    summary = result.summary
    described = provenance(seed=config.seed, config_hash=summary.config_hash, journal_digest=summary.journal_digest)
    with writing("--report", path):
        write_run_report(
            path,
            f"{config.trace.name} on {len(result.system.instances)} × {config.profile}",
            records=result.records,
            summary=summary,
            samples=result.samples,
            num_blocks={spec.id: spec.limits.num_blocks for spec in result.system.instances},
            provenance=described,
        )
    say(f"report: {path}")


def _print(summary: "Summary") -> None:
    columns = ("", "requests", "finished", "ttft p50 ms", "p99", "tpot p50 ms", "p99", "e2e p50 s", "p99", "SLO met")
    rows = [_row("all", summary)]
    if len(summary.by_class) > 1:
        rows += [_row(f"class {group.priority}", group) for group in summary.by_class]
    if len(summary.by_tenant) > 1:
        rows += [_row(f"tenant {group.tenant}", group) for group in summary.by_tenant[:20]]
    print_table(columns, rows)
    print()
    print_table(
        ("goodput /s", "output tokens /s", "steps", "preemptions", "prefix hits", "span s", "CPU s", "peak MB"),
        [
            (
                summary.goodput_rps,
                summary.output_tokens_per_second,
                summary.num_steps,
                summary.num_preemptions,
                summary.prefix_hit_rate,
                summary.span_seconds,
                summary.cpu_seconds,
                summary.peak_rss_mb,
            )
        ],
    )

    if summary.lengths:
        print()
        print_table(
            ("output lengths by", "predictions", "CPU µs each", "cost µs each", "mean error", "bias", "Kendall's tau"),
            [
                (
                    f"{facts.predictor} (the truth)" if facts.is_oracle else facts.predictor,
                    facts.num_predictions,
                    facts.cpu_us,
                    facts.cost_us,
                    facts.mean_absolute_error,
                    facts.bias,
                    facts.kendall_tau,
                )
                for facts in summary.lengths
            ],
        )


def _row(name: str, group: "GroupSummary") -> tuple[object, ...]:
    ttft, tpot, e2e = group.ttft_ms, group.tpot_ms, group.e2e_ms
    return (
        name,
        group.num_requests,
        group.num_finished,
        ttft.p50,
        ttft.p99,
        tpot.p50,
        tpot.p99,
        None if e2e.p50 is None else e2e.p50 / 1000,
        None if e2e.p99 is None else e2e.p99 / 1000,
        group.slo_attainment,
    )
