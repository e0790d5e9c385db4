"""One simulated engine as a server of its own: `python -m rota.serving.frontdoor.simulated_server --port 8001`.

It has the surface of a vLLM server (chat, completions, models, health, version, metrics), with token ids on request and
prompts given as such, so that routers and clients can be tried against processes that can be killed.
"""

import argparse
import asyncio
import contextlib
import signal
from collections.abc import Callable

import msgspec

from rota.base.errors import ConfigError, RotaError
from rota.base.instant import Duration
from rota.runtime.clocks import SystemClock
from rota.runtime.live import LiveLoop
from rota.serving.api import StepTimePredictor
from rota.serving.assemble import SystemConfig, build
from rota.serving.engines.engine import EngineCall, Headers
from rota.serving.frontdoor.exchange import Exchange
from rota.serving.frontdoor.http1 import HttpServer
from rota.serving.frontdoor.intake import Intake
from rota.serving.frontdoor.problems import Problem
from rota.serving.frontdoor.reading import CHAT, COMPLETIONS
from rota.serving.live.simulated import SimulatedEngine, simulated_engines
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.predictors.step_time.affine import AffineStepTime
from rota.serving.predictors.step_time.profiles import load_profile
from rota.serving.stack import StackConfig, load_stack

_SPOKEN_VERSION = b"0.32.0"
"""Whose shape its answers have: from this vLLM on, streams go on elsewhere from token ids."""
_JSON: Headers = [(b"content-type", b"application/json")]


class SimulatedServer:
    """HTTP in front of one simulated engine."""

    def __init__(self, engine: SimulatedEngine, loop: LiveLoop, *, name: str = "sim") -> None:
        self.engine = engine
        self.server = HttpServer(self._handle)
        self._loop = loop
        self._intake = Intake(name=name, default_max_tokens=4096)
        self._pages: dict[str, Callable[[], tuple[Headers, bytes]]] = {
            "/health": lambda: (_JSON, b"{}"),
            "/v1/models": self._models,
            "/metrics": self._metrics,
            "/version": lambda: (_JSON, b'{"version":"%b"}' % _SPOKEN_VERSION),
        }

    def _handle(self, exchange: Exchange) -> None:
        request = exchange.request
        try:
            if request.method == "POST" and request.path in (CHAT, COMPLETIONS):
                call = self._intake.read(request, self._loop.now())
                conversation = _Conversation(self.engine, exchange, call)
                exchange.listener = conversation
                self.engine.submit(call, conversation)
                return
            page = self._pages.get(request.path)
            if request.method != "GET" or page is None:
                raise Problem(404, f"{request.method} {request.path} is not served here", code="not_found")
            exchange.respond(200, *page())
        except Problem as problem:
            exchange.respond(problem.status, problem.headers(), problem.body())

    def _models(self) -> tuple[Headers, bytes]:
        return _JSON, msgspec.json.encode({"object": "list", "data": self.engine.status().models})

    def _metrics(self) -> tuple[Headers, bytes]:
        load = self.engine.load()
        limits = self.engine.spec.limits
        used = 1.0 - load.num_free_blocks / load.num_blocks
        page = (
            f'vllm:cache_config_info{{block_size="{limits.block_size}",num_gpu_blocks="{limits.num_blocks}"}} 1.0\n'
            f"vllm:num_requests_running {load.num_running}\n"
            f"vllm:num_requests_waiting {load.num_waiting}\n"
            f"vllm:kv_cache_usage_perc {used}\n"
            f"vllm:num_preemptions_total {load.num_preemptions}\n"
        )
        return [(b"content-type", b"text/plain; version=0.0.4")], page.encode()


class _Conversation:
    """One request: hears the engine and writes the answer."""

    on_chunks = None

    def __init__(self, engine: SimulatedEngine, exchange: Exchange, call: EngineCall) -> None:
        self._engine = engine
        self._exchange = exchange
        self._call = call
        self._status = 0
        self._headers: Headers = []
        self._is_stream = False

    def client_left(self) -> None:
        self._engine.abort(self._call.request.id)

    def client_stalled(self, stalled: bool) -> None:
        self._engine.pause(self._call.request.id, stalled)

    def on_head(self, status: int, headers: Headers) -> None:
        self._status = status
        self._headers = headers
        self._is_stream = self._call.stream and status == 200
        if self._is_stream:
            self._exchange.start(status, headers)

    def on_data(self, data: bytes) -> None:
        if self._is_stream:
            self._exchange.write(data)
        else:
            self._exchange.respond(self._status, self._headers, data)

    def on_end(self) -> None:
        if self._is_stream:
            self._exchange.end()

    def on_failed(self, reason: str) -> None:
        if self._is_stream:
            self._exchange.cut()
        else:
            problem = Problem(500, reason)
            self._exchange.respond(problem.status, problem.headers(), problem.body())


def build_server(
    instance_id: InstanceId,
    limits: InstanceLimits,
    stack: StackConfig,
    step_time: StepTimePredictor,
    seed: int,
    *,
    step_overhead: Duration = Duration(0),
) -> SimulatedServer:
    """A server around one fresh simulated engine; it listens once its `server.start` is awaited."""
    config = SystemConfig(stack=stack, instances=(InstanceSpec(instance_id, limits),), seed=seed)
    loop = LiveLoop(SystemClock())
    (engine,) = simulated_engines(loop, build(config), config, step_time, step_overhead=step_overhead)
    return SimulatedServer(engine, loop, name=instance_id)


def _server_of(arguments: argparse.Namespace) -> SimulatedServer:
    stack = StackConfig(order=arguments.order, batch=arguments.batch)
    if arguments.stack is not None:
        stack = load_stack(arguments.stack)
    name, seed = InstanceId(arguments.name), arguments.seed
    if arguments.profile is None:
        limits = InstanceLimits(num_blocks=arguments.num_blocks)
        return build_server(name, limits, stack, AffineStepTime(base_ms=arguments.step_ms), seed)
    profile = load_profile(arguments.profile)
    overhead = profile.step_overhead()
    return build_server(name, profile.instance_limits(), stack, profile.predictor(), seed, step_overhead=overhead)


async def run(arguments: argparse.Namespace) -> None:
    """Serve until SIGINT or SIGTERM."""
    server = _server_of(arguments)
    try:
        await server.server.start(arguments.host, arguments.port)
    except OSError as error:
        raise ConfigError(f"cannot listen on {arguments.host}:{arguments.port}: {error.strerror}") from None
    print(f"http://{arguments.host}:{server.server.port}", flush=True)  # noqa: T201 - the one line of output
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await stopping.wait()
    server.server.close()


def main() -> None:
    """Entry point of `python -m`."""
    parser = argparse.ArgumentParser(prog="simulated_server", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0, the default, lets the system choose")
    parser.add_argument("--name", default="sim")
    parser.add_argument("--num-blocks", type=int, default=4096)
    parser.add_argument("--step-ms", type=float, default=11.5, help="time of a step that does almost nothing")
    parser.add_argument("--profile", help="model and accelerator, in place of --num-blocks and --step-ms")
    parser.add_argument("--stack", help="stack file, in place of --order and --batch")
    parser.add_argument("--order", default="fcfs")
    parser.add_argument("--batch", default="vllm_default")
    parser.add_argument("--seed", type=int, default=0)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            asyncio.run(run(parser.parse_args()))
        except RotaError as error:
            parser.exit(2, f"error: {error.message}\n")


if __name__ == "__main__":
    main()
