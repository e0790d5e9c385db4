"""Engine processes under supervision: they start, come back after a crash, and never outlive the router."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from rota.base.errors import EngineError
from rota.serving.engines.managed import ManagedEngine, free_port
from rota.serving.engines.process import EngineProcess, ProcessSpec, RestartRule
from rota.serving.frontdoor.serve import ServeConfig
from rota.serving.live.watch import WatchSettings
from rota.serving.model.instance import InstanceId
from rota.testing.router import running_router

FAST = RestartRule(first_delay_seconds=0.05, factor=1.5, delay_max_seconds=0.2, num_restarts_max=3)
WATCH = WatchSettings(interval_seconds=0.1, starting_interval_seconds=0.05, num_failures_max=3)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until(holds: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"never came true: {what}"
        await asyncio.sleep(0.02)


def shell(tmp_path: Path, script: str, **fields: object) -> ProcessSpec:
    log = str(tmp_path / "engine.log")
    return ProcessSpec("engine", ("/bin/sh", "-c", script), log, **fields)  # type: ignore[arg-type]


def simulated(tmp_path: Path, name: str) -> ManagedEngine:
    port = free_port()
    module = ("-m", "rota.serving.frontdoor.simulated_server", "--port", str(port), "--step-ms", "5")
    spec = ProcessSpec(name, (sys.executable, *module), str(tmp_path / f"{name}.log"))
    return ManagedEngine(InstanceId(name), f"http://127.0.0.1:{port}", spec, restart=FAST)


@pytest.mark.asyncio
async def test_stopping_ends_the_whole_group(tmp_path: Path) -> None:
    process = EngineProcess(shell(tmp_path, "trap '' TERM; sleep 1000 & echo $!; wait", stop_timeout_seconds=0.3))
    await process.start()
    await until(lambda: process.log_tail() != "", "the process wrote")
    child, pid = int(process.log_tail().splitlines()[0]), process.pid
    assert pid is not None
    assert is_alive(child)
    await process.stop()
    assert not is_alive(pid)
    await until(lambda: not is_alive(child), "what it started is gone")


@pytest.mark.parametrize("has_served", [True, False])
@pytest.mark.asyncio
async def test_a_crash_is_reported_and_restarted_until_it_is_hopeless(tmp_path: Path, has_served: bool) -> None:
    heard: list[str] = []
    spec = shell(tmp_path, "echo out of memory, as it were; exit 3")
    process = EngineProcess(spec, restart=FAST, exited=heard.append)
    process.has_served = has_served
    await process.start()
    await until(lambda: process.given_up is not None, "it was given up")
    assert process.num_restarts == (FAST.num_restarts_max if has_served else FAST.num_starts_max - 1)
    assert heard[0] == "exited with status 3"
    assert process.given_up is not None
    assert "out of memory, as it were" in process.given_up
    await process.stop()


@pytest.mark.asyncio
async def test_a_command_that_does_not_exist_is_a_clear_error(tmp_path: Path) -> None:
    process = EngineProcess(ProcessSpec("engine", ("/no/such/engine",), str(tmp_path / "log")))
    with pytest.raises(EngineError, match="engine cannot be started: /no/such/engine"):
        await process.start()
    await process.stop()


@pytest.mark.asyncio
async def test_a_taken_port_is_a_clear_error(tmp_path: Path) -> None:
    engine = simulated(tmp_path, "a")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", engine.client.port))
        taken.listen()
        with pytest.raises(EngineError, match=f"port {engine.client.port}"):
            await engine.start()
    await engine.stop()


@pytest.mark.asyncio
async def test_an_engine_that_does_not_get_ready_is_an_error_with_the_end_of_its_log(tmp_path: Path) -> None:
    spec = shell(tmp_path, "echo cannot load the model; exit 1")
    engine = ManagedEngine(InstanceId("a"), f"http://127.0.0.1:{free_port()}", spec, restart=FAST)
    with pytest.raises(EngineError, match="cannot load the model"):
        async with running_router(num_simulated=0, engines=[engine], serve=ServeConfig(port=0, watch=WATCH)):
            pass
    assert engine.process.pid is None


@pytest.mark.asyncio
async def test_killed_engines_are_survived(tmp_path: Path) -> None:
    engines = [simulated(tmp_path, name) for name in ("a", "b")]
    async with running_router(num_simulated=0, engines=engines, serve=ServeConfig(port=0, watch=WATCH)) as running:
        client = openai.AsyncOpenAI(base_url=running.url + "/v1", api_key="unused", max_retries=0, timeout=30)
        messages = [{"role": "user", "content": "hello"}]
        requests = [
            asyncio.ensure_future(
                client.chat.completions.create(
                    model="m", messages=messages, max_tokens=60, extra_body={"ignore_eos": True}
                )
            )
            for _ in range(10)
        ]
        await asyncio.sleep(0.1)
        killed = engines[0].process.pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        answers = await asyncio.gather(*requests)
        assert all(answer.usage is not None and answer.usage.completion_tokens == 60 for answer in answers)
        await until(lambda: engines[0].process.num_restarts == 1, "it was started again")
        await until(lambda: len(running.router.cluster.statuses) == 2, "it is ready again")
        running.router.cluster.machine.check()
        counts = running.router.cluster.machine.counts()
        assert (counts.num_arrived, counts.num_finished) == (10, 10)
        pids = [engine.process.pid for engine in engines]
    assert all(pid is not None and not is_alive(pid) for pid in pids), "an engine outlived its router"


ROUTER = """
import asyncio, json, sys
from rota.runtime.clocks import SystemClock
from rota.runtime.live import LiveLoop
from rota.serving.assemble import SystemConfig, build
from rota.serving.engines.managed import ManagedEngine, free_port
from rota.serving.engines.process import ProcessSpec
from rota.serving.frontdoor.serve import ServeConfig, serve

port = free_port()
command = (sys.executable, "-m", "rota.serving.frontdoor.simulated_server", "--port", str(port), "--step-ms", "20")
engine = ManagedEngine("a", f"http://127.0.0.1:{port}", ProcessSpec("a", command, sys.argv[1]))

def ready(router):
    print(json.dumps({"url": router.url, "engine": engine.process.pid}), flush=True)

asyncio.run(serve(ServeConfig(port=0, drain_seconds=30), loop=LiveLoop(SystemClock()),
                  machine=build(SystemConfig()).cluster, engines=[engine], on_ready=ready))
"""


LOSES_ITS_CHILDREN = """
import asyncio, os, signal, sys
from pathlib import Path
from rota.serving.engines.process import EngineProcess, ProcessSpec

async def main():
    await EngineProcess(ProcessSpec("e", ("/bin/sh", "-c", "sleep 1000 & echo $!; wait"), sys.argv[1])).start()
    while not Path(sys.argv[1]).read_text().endswith("\\n"):
        await asyncio.sleep(0.01)
    children = Path("/proc/self/task/%d/children" % os.getpid())
    while len(children.read_text().split()) != 1:  # the guard has not left yet
        await asyncio.sleep(0.01)
    os.kill(int(children.read_text()), signal.SIGKILL)
    os._exit(1)

asyncio.run(main())
"""


@pytest.mark.asyncio
async def test_nothing_is_left_where_all_children_are_killed_with_their_parent(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    ended = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", LOSES_ITS_CHILDREN, str(log)], check=False)
    assert ended.returncode == 1
    grandchild = int(log.read_text())
    await until(lambda: not is_alive(grandchild), "what the engine had started is gone", seconds=5)


def start_router(tmp_path: Path) -> tuple[subprocess.Popen[str], str, int]:
    router = subprocess.Popen(
        [sys.executable, "-c", ROUTER, str(tmp_path / "a.log")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert router.stdout is not None
    said = json.loads(router.stdout.readline())
    return router, said["url"], said["engine"]


@pytest.mark.asyncio
async def test_engines_die_with_a_router_that_is_killed(tmp_path: Path) -> None:
    router, _, engine = start_router(tmp_path)
    router.kill()
    router.wait()
    await until(lambda: not is_alive(engine), "the engine of the killed router is gone", seconds=5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.asyncio
async def test_a_signal_drains_and_a_second_one_hurries(tmp_path: Path, number: signal.Signals) -> None:
    router, url, engine = start_router(tmp_path)
    client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="unused", max_retries=0, timeout=30)
    stream = await client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=3000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    chunks = aiter(stream)
    await anext(chunks)
    router.send_signal(number)
    for _ in range(10):
        await anext(chunks)  # what is under way goes on
    assert router.poll() is None
    router.send_signal(number)
    assert await asyncio.to_thread(router.wait, 10) == 0
    assert not is_alive(engine)
    assert router.stderr is not None
    assert "Traceback" not in router.stderr.read()
    with pytest.raises(openai.APIError):
        async for _ in chunks:
            pass
