"""`rota calibrate`: a step-time profile of a live engine, with its error inside."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rota.base.errors import ConfigError
from rota.base.nearest import did_you_mean
from rota.cli.flags import Json, Seed, positive, writing
from rota.cli.output import Progress, print_json, print_table, say, warn

if TYPE_CHECKING:
    from rota.serving.calibration.collect import Collected
    from rota.serving.calibration.steps import Steps
    from rota.serving.engines.vllm.facts import EngineFacts
    from rota.serving.engines.vllm.server import VllmServer
    from rota.serving.predictors.step_time.fitted import FrontEnd
    from rota.serving.predictors.step_time.profiles import Profile

VLLM = "vllm"
INTERRUPTED = 130
DEFAULT_SECONDS = 240.0
_SECONDS_MIN = 30.0


def calibrate(
    url: Annotated[
        str | None,
        typer.Argument(metavar="[URL]", help="A running vLLM with our plug-in, such as http://127.0.0.1:8000."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The profile.")] = Path("profile.toml"),
    engine: Annotated[str | None, typer.Option(help="`vllm`: start one, measure it and stop it.")] = None,
    facts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The facts file that the engine at URL writes; without URL, fit to it as it is."
        ),
    ] = None,
    duration: Annotated[float, typer.Option(metavar="SECONDS", help="Of the load.")] = DEFAULT_SECONDS,
    model: Annotated[
        Path | None, typer.Option(help="Model folder for --engine; a small packaged model if left out.")
    ] = None,
    engine_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A setting of --engine, such as max_num_seqs=16.")
    ] = None,
    cores: Annotated[str | None, typer.Option(help="CPU cores of --engine, such as 0 or 0-3.")] = None,
    start_timeout: Annotated[float, typer.Option(metavar="SECONDS", help="For --engine to be ready.")] = 600.0,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Fit step times to a live engine and write them as a profile for --profile, with their error inside.

    Loads the engine with steady, rising and mixed load, keeps whole stretches of it out of the fit, and judges the fit
    by those. The steps are kept beside the profile, as NAME.facts.jsonl; --facts with that file fits them again.
    Ctrl-C ends the load early and fits what there is.
    """
    _check_flags(url, engine, facts, {"--model": model, "--engine-option": engine_option, "--cores": cores})
    with writing("--output", output):
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_name(output.name + ".part").open("ab").close()
        output.with_name(output.name + ".part").unlink()
    interrupted = False
    if url is None and engine is None:
        assert facts is not None
        profile = _refit(facts)
    else:
        if positive("--duration", duration) < _SECONDS_MIN:
            raise ConfigError(f"--duration: must be at least {_SECONDS_MIN:g}, not {duration:g}")
        timeout = positive("--start-timeout", start_timeout)
        server = (
            None if engine is None else _server(model, engine_option or [], cores, _beside(output, ".engine.jsonl"))
        )
        collected = _collect(url, server, facts, output, duration, timeout, seed)
        interrupted = collected.is_interrupted
        profile = _fit_collected(collected, output)
    from rota.serving.calibration.profile_file import write_profile

    with writing("--output", output):
        write_profile(profile, output)
    _show(profile, output, json)
    if interrupted:
        warn("interrupted; the profile is fitted to what was measured until then")
        raise typer.Exit(INTERRUPTED)


def _check_flags(url: str | None, engine: str | None, facts: Path | None, of_engine: dict[str, object]) -> None:
    if engine is not None and engine != VLLM:
        raise ConfigError(f"--engine: unknown engine {engine!r}", hint=did_you_mean(engine, [VLLM]))
    for flag, value in of_engine.items():
        if value and engine is None:
            raise ConfigError(f"{flag}: needs --engine vllm")
    if engine is not None and url is not None:
        raise ConfigError("--engine: give it or a URL, not both")
    if engine is not None and facts is not None:
        raise ConfigError("--facts: the engine that --engine starts writes its own")
    if url is not None and facts is None:
        raise ConfigError("--facts: needed with a URL", hint="name the file that the engine's `facts` setting names")
    if url is None and engine is None and facts is None:
        raise ConfigError("URL, --engine or --facts: one of them is needed", hint="such as --engine vllm")


# --- where the steps come from ----------------------------------------------------------------------------------------


def _refit(facts: Path) -> "Profile":
    from rota.serving.calibration.collect import records_of
    from rota.serving.calibration.steps import steps_of
    from rota.serving.engines.vllm.facts import read_engine

    records = records_of(facts)
    engine = read_engine(facts)
    if engine is None:
        warn(f"{facts} does not say which engine it is of: limits are those that its steps reached")
    return _fit(steps_of(records, str(facts)), records, engine, None, f"the steps in {facts.name}")


def _fit_collected(collected: "Collected", output: Path) -> "Profile":
    from rota.serving.calibration.front_end import front_end_of
    from rota.serving.calibration.steps import steps_of
    from rota.serving.engines.vllm.facts import FactsFile

    kept = _beside(output, ".facts.jsonl")
    with writing("--output", kept):
        kept.unlink(missing_ok=True)
        file = FactsFile(kept, engine=collected.engine, max_bytes=2**62)
        for record in collected.records:
            file.append(record)
        file.close()
    if collected.is_interrupted:
        say(f"interrupted; {len(collected.records)} steps are kept in {kept}")
    steps = steps_of(collected.records, str(kept))
    front_end = front_end_of(collected.sent, steps)
    if front_end is None:
        warn("too few requests met an idle engine to measure its front end; front_end_ms is 0")
    return _fit(steps, collected.records, collected.engine, front_end, f"the steps in {kept.name}")


def _fit(
    steps: "Steps", records: list[Any], engine: "EngineFacts | None", front_end: "FrontEnd | None", source: str
) -> "Profile":
    from rota.serving.calibration.calibrate import Origin
    from rota.serving.calibration.calibrate import calibrate as fit

    host = _host()
    device = "unknown" if engine is None else engine.device
    origin = Origin(
        source=f"rota calibrate, from {source}",
        date=time.strftime("%Y-%m-%d"),
        host=host,
        accelerator=host if device == "cpu" else device,
    )
    return fit(steps, records, engine, origin, front_end=front_end)


def _collect(
    url: str | None,
    server: "VllmServer | None",
    facts: Path | None,
    output: Path,
    duration: float,
    timeout: float,
    seed: int,
) -> "Collected":
    import asyncio
    import signal

    from rota.serving.calibration.collect import collect
    from rota.serving.calibration.engine import running

    async def run() -> "Collected | None":
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)

        async def load(at: str, written: Path) -> "Collected | None":
            if stop.is_set():
                return None
            with Progress("calibrating", total=round(duration), unit="s") as progress:
                return await collect(at, written, seconds=duration, seed=seed, stop=stop, on_progress=progress.reached)

        if server is None:
            assert url is not None
            assert facts is not None
            return await load(url.rstrip("/").removesuffix("/v1"), facts)
        assert server.facts is not None
        log = _beside(output, ".engine.log")
        say(f"starting vLLM; ready within minutes; its output goes to {log}")
        async with running(server, log, stop, timeout=timeout) as at:
            return await load(at, server.facts)

    try:
        collected = asyncio.run(run())
    finally:
        if server is not None and server.facts is not None:
            server.facts.unlink(missing_ok=True)
    if collected is None:
        raise KeyboardInterrupt
    return collected


def _server(model: Path | None, options: list[str], cores: str | None, facts: Path) -> "VllmServer":
    from rota.cli.serve import engine_options
    from rota.serving.engines.managed import free_port
    from rota.serving.engines.model_package import MODEL_NAME, prepare_model
    from rota.serving.engines.vllm.server import VllmServer

    settings = engine_options(options)
    folder = prepare_model(say=say) if model is None else model
    if not folder.is_dir():
        raise ConfigError(f"--model: {folder} is not a folder", hint="give a folder that vLLM can load")
    facts.unlink(missing_ok=True)
    return VllmServer(
        model=folder,
        port=free_port(),
        served_model_name=MODEL_NAME if model is None else folder.name,
        facts=facts,
        cores=cores,
        **settings,
    )


def _beside(output: Path, suffix: str) -> Path:
    return output.with_name(output.stem + suffix)


def _host() -> str:
    """This machine's processor, for people."""
    import os
    import platform

    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
            break
    return f"{name}, {os.cpu_count()} cores"


# --- what is said -----------------------------------------------------------------------------------------------------


def _show(profile: "Profile", output: Path, json: bool) -> None:
    calibration = profile.calibration
    assert calibration is not None
    if json:
        print_json({"profile": str(output), "calibration": calibration})
        return
    print_table(
        ("held out", "steps", "MAPE %", "p90 %", "bias %"),
        [(each.phase, each.num_steps, 100 * each.mape, 100 * each.p90, 100 * each.bias) for each in calibration.errors],
    )
    print()
    print_table(
        ("engine", "fitted to", "shape", "overhead ms", "front end ms", "noise %", "MAPE % in CPU time"),
        [
            (
                calibration.engine,
                calibration.num_steps,
                calibration.shape,
                profile.step_overhead_ms,
                profile.front_end_ms,
                None if calibration.noise is None else 100 * calibration.noise,
                None if calibration.cpu_mape is None else 100 * calibration.cpu_mape,
            )
        ],
    )
    say(f"profile: {output}")
