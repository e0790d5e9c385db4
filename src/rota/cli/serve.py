"""`rota serve`: the router, over engines that it starts itself or that run already."""

import functools
import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rota.base.errors import ConfigError
from rota.base.nearest import did_you_mean
from rota.cli.flags import Json, Seed, at_least_zero, positive, writing
from rota.cli.keys import Keys, Tenancy, tenancy
from rota.cli.output import print_json, say
from rota.cli.ray_engines import LOCAL, RayChoice, ray_choice
from rota.cli.roles_flag import Roles, refuse_roles_without_hand_off, roles_by_id
from rota.cli.scale_flag import Scale, scaled
from rota.cli.targets import fleet_of

if TYPE_CHECKING:
    from rota.base.journal import Journal
    from rota.runtime.live import LiveLoop
    from rota.serving.assemble import System, SystemConfig
    from rota.serving.engines.engine import Engine
    from rota.serving.frontdoor.serve import Router, ServeConfig
    from rota.serving.live.fleet import Fleet
    from rota.serving.model.instance import InstanceId, Role
    from rota.serving.stack import StackConfig

VLLM, SIMULATED = "vllm", "simulated"
STOCK = ("fcfs", "priority")

HandOff = Annotated[
    bool | None,
    typer.Option(
        "--hand-off/--no-hand-off",
        help="Whether vLLMs pass running requests on with their blocks, over NIXL. "
        "Left out: where the package nixl is there and each engine has a core.",
    ),
]

ModelFolder = Annotated[
    Path | None, typer.Option("--model", help="Model folder for vLLM; a small packaged model if left out.")
]

TextCounts = Annotated[
    bool, typer.Option("--text-counts", help="Count each prompt's text (never keep it), to train and use `ranked`.")
]


def serve(
    engine: Annotated[
        list[str] | None,
        typer.Option(help="`vllm`, `simulated`, or the URL of a server that runs already (repeat for several)."),
    ] = None,
    instances: Annotated[int | None, typer.Option(help="Number of vLLM or simulated engines; 2 unless said.")] = None,
    roles: Roles = None,
    scale: Scale = None,
    stack: Annotated[Path | None, typer.Option(help="Stack file (TOML): which policies decide.")] = None,
    model: ModelFolder = None,
    stock: Annotated[
        str | None, typer.Option(help="Run vLLM without our scheduler, under its own `fcfs` or `priority`.")
    ] = None,
    engine_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A setting of each vLLM, such as max_num_seqs=16.")
    ] = None,
    hand_off: HandOff = None,
    profile: Annotated[str, typer.Option(help="Model and accelerator of simulated engines.")] = "llama-3.1-8b-a100",
    on: Annotated[
        str, typer.Option(metavar="local|ray|ray=ADDRESS", help="Where engines run: on this machine, or a Ray cluster.")
    ] = LOCAL,
    cpus_per_instance: Annotated[float | None, typer.Option(help="On Ray: CPUs of one engine; 1 if left out.")] = None,
    gpus_per_instance: Annotated[float | None, typer.Option(help="On Ray: GPUs of one engine.")] = None,
    resource: Annotated[
        list[str] | None, typer.Option(metavar="NAME=AMOUNT", help="On Ray: what else one engine takes of its node.")
    ] = None,
    await_nodes: Annotated[bool, typer.Option(help="On Ray: wait for nodes that an autoscaler will start.")] = False,
    keys: Keys = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 lets the system choose.")] = 8000,
    journal: Annotated[Path | None, typer.Option(help="Write events and decisions; for replay and explain.")] = None,
    journal_max_mb: Annotated[float, typer.Option(help="Where the journal stops growing.")] = 1024.0,
    run_dir: Annotated[Path, typer.Option(help="Logs and per-step facts of the engines.")] = Path("runs"),
    start_timeout: Annotated[float, typer.Option(metavar="SECONDS", help="For the first engine to be ready.")] = 600.0,
    text_counts: TextCounts = False,
    wait_for_all: Annotated[bool, typer.Option(help="Say that it is ready only when every engine is.")] = False,
    drain: Annotated[float, typer.Option(metavar="SECONDS", help="For requests under way, after Ctrl-C.")] = 30.0,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Serve the OpenAI API on one port, over several engines, until Ctrl-C.

    The stack's order, batch and memory policies run inside each vLLM (or simulated engine), its dispatch and admission
    policies here. A second Ctrl-C stops at once.
    """
    kinds = engine or [VLLM]
    _check(kinds, on, port, stock, roles, hand_off)
    fleet = fleet_of(instances, roles, default=2)
    config, num = scaled(stack, scale, len(fleet), can_start=_kind(kinds[0]) != "url")
    known = tenancy(keys, config, stack, run_dir)
    _run(
        kinds=kinds,
        num_instances=num,
        roles=roles_by_id("sim" if kinds[0] == SIMULATED else kinds[0], fleet, known.stack),
        stack_path=known.stack_path,
        stack=known.stack,
        model=model,
        stock=stock,
        options=engine_options(engine_option or []),
        hand_off=hand_off,
        profile=profile,
        serving=_serving(host, port, drain, start_timeout, known, text_counts),
        journal_path=journal,
        journal_max_bytes=round(positive("--journal-max-mb", journal_max_mb) * 1e6),
        run_dir=run_dir,
        ray=ray_choice(on, cpus_per_instance, gpus_per_instance, resource, await_nodes=await_nodes),
        wait_for_all=wait_for_all,
        seed=seed,
        json=json,
    )


def _check(
    kinds: Sequence[str], on: str, port: int, stock: str | None, roles: str | None, hand_off: bool | None
) -> None:
    if len({_kind(word) for word in kinds}) > 1 or (len(kinds) > 1 and _kind(kinds[0]) != "url"):
        raise ConfigError("--engine: give `vllm`, or `simulated`, or URLs, not a mixture")
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port: must be from 0 to 65535, not {port}")
    if on != LOCAL and _kind(kinds[0]) == "url":
        raise ConfigError("--on: engines that run already are where they are", hint="leave --on or the URLs out")
    if stock is not None and stock not in STOCK:
        raise ConfigError(f"--stock: unknown scheduling policy {stock!r} of vLLM", hint=did_you_mean(stock, STOCK))
    refuse_roles_without_hand_off(
        roles, runs_already=_kind(kinds[0]) == "url", is_on_ray=on != LOCAL, stock=stock, hand_off=hand_off
    )


def _kind(word: str) -> str:
    if word in (VLLM, SIMULATED):
        return word
    if "://" in word:
        return "url"
    raise ConfigError(
        f"--engine: {word!r} is neither `vllm`, `simulated` nor a URL", hint="such as http://127.0.0.1:8001"
    )


def engine_options(words: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` settings of a vLLM server, converted to the types of `VllmServer`."""
    import msgspec

    from rota.serving.engines.vllm.server import VllmServer

    known = {
        name: kind
        for name, kind in VllmServer.__annotations__.items()
        if name in ("dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size",
                    "num_gpu_blocks_override", "kv_cache_gib", "enforce_eager", "async_scheduling")
    }  # fmt: skip
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"--engine-option: {word!r} is not of the form KEY=VALUE")
        if key not in known:
            raise ConfigError(f"--engine-option: unknown setting {key!r}", hint=did_you_mean(key, known))
        try:
            options[key] = msgspec.convert(value, known[key], strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(f"--engine-option: {key}: {error}, in {value!r}") from None
    return options


def _serving(
    host: str, port: int, drain: float, start_timeout: float, known: Tenancy, text_counts: bool
) -> "ServeConfig":
    from rota.serving.frontdoor.serve import ServeConfig

    return ServeConfig(
        host=host,
        port=port,
        drain_seconds=at_least_zero("--drain", drain),
        start_timeout_seconds=positive("--start-timeout", start_timeout),
        keys=known.keys,
        keys_path=known.keys_path,
        text_counts=text_counts,
    )


def _run(
    *,
    kinds: Sequence[str],
    num_instances: int,
    roles: "dict[InstanceId, Role]",
    stack_path: Path | None,
    stack: Any,
    model: Path | None,
    stock: str | None,
    options: dict[str, Any],
    hand_off: bool | None,
    profile: str,
    serving: "ServeConfig",
    journal_path: Path | None,
    journal_max_bytes: int,
    run_dir: Path,
    ray: RayChoice | None,
    wait_for_all: bool,
    seed: int,
    json: bool,
) -> None:
    import uvloop

    from rota.runtime.clocks import SystemClock
    from rota.runtime.live import LiveLoop
    from rota.serving.assemble import build
    from rota.serving.frontdoor.serve import serve as serve_until_signal

    kind = _kind(kinds[0])
    config = _config(stack, seed, profile if kind == SIMULATED and ray is None else None, num_instances, roles)
    if kind == VLLM and stock is None:
        _refuse_what_vllm_cannot_host(stack)
    system = build(config)
    journal = _journal(config, journal_path, journal_max_bytes)
    at_most = num_instances if stack.scaling == "none" else stack.fleet.max_instances

    async def run() -> None:
        loop = LiveLoop(SystemClock(), journal)
        engines: Sequence[Engine]
        fleet: Fleet | None = None
        if ray is not None:
            plan = ray.plans(kind, run_dir, stack_path, model, stock, options, profile, seed)
            engines, fleet = ray.engines(plan, num_instances)
        elif kind == SIMULATED:
            engines, fleet = _simulated(loop, system, config, profile)
        elif kind == VLLM:
            vllms = functools.partial(_vllm, at_most, stack_path, model, stock, options, run_dir, hand_off, bool(roles))
            engines, fleet = _vllms(vllms, num_instances)
        else:
            engines = _at(kinds)
        say(f"starting {len(engines)} {'engines' if len(engines) > 1 else 'engine'} ({kind}); ready within minutes")
        await serve_until_signal(
            serving,
            loop=loop,
            machine=system.cluster,
            engines=engines,
            fleet=fleet,
            roles=roles,
            num_ready=len(engines) if wait_for_all else 1,
            on_ready=lambda router: _ready(router, json),
        )

    try:
        uvloop.run(run())
    finally:
        if ray is not None:
            ray.leave()
        if journal is not None:
            journal.close()
    say("stopped")


def _journal(config: "SystemConfig", path: Path | None, max_bytes: int) -> "Journal | None":
    from rota.base.journal import Journal
    from rota.serving.assemble import header_of

    if path is None:
        return None
    with writing("--journal", path):
        return Journal(header_of(config), path=path, max_bytes=max_bytes)


def _refuse_what_vllm_cannot_host(stack: "StackConfig") -> None:
    """Each engine would refuse such a stack when it starts; here it costs no start."""
    from rota.serving.engines.vllm.hosting import VLLM_CAPABILITIES, check_hostable
    from rota.serving.stack import engine_policies

    policies = engine_policies(stack, VLLM_CAPABILITIES, "vLLM 0.32")
    check_hostable(policies.order, policies.batch, policies.memory)


def _ready(router: "Router", json: bool) -> None:
    """It serves from now on."""
    # Whatever was imported and built stays. Else each full collection of garbage looks through it, amid the answers.
    gc.collect()
    gc.freeze()
    url = f"{router.url}/v1"
    if json:
        print_json({"url": url, "instances": [engine.id for engine in router.engines]})
    say(f"ready: {url} ({len(router.cluster.statuses)} of {len(router.engines)} instances answer; Ctrl-C stops)")


def _at(urls: Sequence[str]) -> "Sequence[Engine]":
    from rota.serving.engines.openai import OpenAIEngine
    from rota.serving.model.instance import InstanceId

    return [OpenAIEngine(InstanceId(f"e{index}"), url) for index, url in enumerate(urls)]


def _config(
    stack: "StackConfig", seed: int, profile: str | None, num_instances: int, roles: "dict[InstanceId, Role]"
) -> "SystemConfig":
    """What the journal's header has. Engines whose steps are ours are in it: those of a `profile`."""
    from rota.serving.assemble import SystemConfig
    from rota.serving.model.instance import InstanceId, InstanceSpec, Role
    from rota.serving.predictors.step_time.profiles import load_profile

    if profile is None:
        return SystemConfig(stack=stack, seed=seed)
    limits = load_profile(profile).instance_limits()
    ids = [InstanceId(f"sim-{index}") for index in range(num_instances)]
    specs = tuple(InstanceSpec(each, limits, role=roles.get(each, Role.MIXED)) for each in ids)
    return SystemConfig(stack=stack, instances=specs, seed=seed)


def _simulated(
    loop: "LiveLoop", system: "System", config: "SystemConfig", profile: str
) -> "tuple[Sequence[Engine], Fleet]":
    from rota.serving.live.fleet import LocalFleet
    from rota.serving.live.simulated import one_more, simulated_engines
    from rota.serving.predictors.step_time.profiles import load_profile

    facts = load_profile(profile)
    predictor, overhead = facts.predictor(), facts.step_overhead()
    hands_over = bool(config.roles)
    engines = simulated_engines(loop, system, config, predictor, step_overhead=overhead, hands_over=hands_over)
    return engines, LocalFleet(
        lambda instance_id: one_more(loop, config, instance_id, predictor, step_overhead=overhead)
    )


def _vllms(
    build: "Callable[[Sequence[str]], Sequence[Engine]]", num_instances: int
) -> "tuple[Sequence[Engine], Fleet]":
    from rota.serving.live.fleet import LocalFleet

    engines = build([f"vllm-{index}" for index in range(num_instances)])
    return engines, LocalFleet(lambda instance_id: build([instance_id])[0])


def _vllm(
    num_at_most: int,
    stack_path: Path | None,
    model: Path | None,
    stock: str | None,
    options: dict[str, Any],
    run_dir: Path,
    hand_off: bool | None,
    has_roles: bool,
    names: Sequence[str],
) -> "Sequence[Engine]":
    """One engine for each name, of `num_at_most` that there may be in all."""
    from rota.serving.engines.managed import ManagedEngine, free_port
    from rota.serving.engines.model_package import MODEL_NAME, prepare_model
    from rota.serving.engines.process import ProcessSpec
    from rota.serving.engines.vllm.engine import VllmEngine
    from rota.serving.engines.vllm.server import VllmServer
    from rota.serving.model.instance import InstanceId

    folder = prepare_model(say=say) if model is None else model
    if not folder.is_dir():
        raise ConfigError(f"--model: {folder} is not a folder", hint="give a folder that vLLM can load")
    with writing("--run-dir", run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    engines: list[Engine] = []
    plugin = stock is None
    sockets = [run_dir / f"{name}.sock" for name in names]
    hands_off = _hands_off(hand_off, plugin, stack_path, sockets, num_at_most, has_roles=has_roles)
    for name, control_socket in zip(names, sockets, strict=True):
        instance_id = InstanceId(name)
        server = VllmServer(
            model=folder,
            port=free_port(),
            served_model_name=MODEL_NAME if model is None else folder.name,
            plugin=plugin,
            stack=stack_path if plugin else None,
            facts=run_dir / f"{instance_id}.facts.jsonl" if plugin else None,
            control=control_socket if hands_off else None,
            nixl_port=free_port() if hands_off else None,
            scheduling_policy="priority" if stock == "priority" else "fcfs",
            # One core each, in turn: instances that share all cores stall each other.
            cores=str(int(name.rpartition("-")[2]) % (os.cpu_count() or 1)),
            **options,
        )
        process = ProcessSpec(
            name=instance_id,
            command=tuple(server.command()),
            log_path=str(run_dir / f"{instance_id}.log"),
            env=dict(server.environment()),
        )
        if server.facts is None:
            engines.append(ManagedEngine(instance_id, server.url, process))
        else:
            control, capabilities = server.control, server.capabilities
            engine = VllmEngine(
                instance_id, server.url, process, server.facts, control=control, capabilities=capabilities
            )
            engines.append(engine)
    return engines


def _hands_off(
    wanted: bool | None,
    plugin: bool,
    stack_path: Path | None,
    sockets: Sequence[Path],
    num_at_most: int,
    *,
    has_roles: bool = False,
) -> bool:
    """Whether engines with these control sockets are to hand requests over. Raises `ConfigError` where that is wanted,
    or roles need it, and it cannot be."""
    from importlib.util import find_spec

    from rota.serving.engines.vllm.control import PATH_BYTES_MAX
    from rota.serving.engines.vllm.hosting import VLLM_CAPABILITIES
    from rota.serving.stack import engine_policies, load_stack

    order = engine_policies(load_stack(stack_path), VLLM_CAPABILITIES, "vLLM 0.32").order if plugin else None
    obstacles = {
        "--stock runs vLLM without the plug-in that lets go of requests": not plugin,
        "the package nixl is missing; pip install 'rota[nixl]'": find_spec("nixl") is None,
        "the stack's order displaces, and NIXL may free blocks later than that": order is not None and order.displacing,
        # NIXL makes progress on the core that an engine computes on.
        f"{num_at_most} engines share {os.cpu_count()} cores": num_at_most > (os.cpu_count() or 1),
        f"a socket in --run-dir would have a path of more than {PATH_BYTES_MAX} bytes": any(
            len(str(path.absolute()).encode()) > PATH_BYTES_MAX for path in sockets
        ),
    }
    why_not = next((why for why, holds in obstacles.items() if holds), None)
    if (wanted or has_roles) and why_not is not None:
        flag = "--roles: blocks cannot go from engine to engine" if has_roles else "--hand-off"
        raise ConfigError(f"{flag}: {why_not}")
    return why_not is None and wanted is not False
