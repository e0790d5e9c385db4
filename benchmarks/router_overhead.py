"""CPU that the router adds to a request, beside a peer and the floor, in one run.

    python benchmarks/router_overhead.py [--peer PATH_TO_vllm-router] [--num-requests N] [--rounds R] > result.json

Two mock engines answer at once from a process of their own. The router has one core to itself; mocks and client share
another. The floor is `byte_pipe`: uvloop protocols that copy bytes between a client and an engine, look at none of them
and decide nothing. Counted is the time that the router's threads spent on a core (schedstat, all threads), kernel
included, which a busy machine disturbs less than requests per second. `stream_64` sends 64 events, each in a write and
a wake-up of its own, so nothing is coalesced unless the router falls behind; `stream_64_paced` sends one every 2 ms, as
engines do, and so costs the router 64 wake-ups, shared by the streams that run beside it. `rota` passes streams on
unread; `rota_following` keeps the token ids of each, so that a stream could go on at another engine. Every figure is
the median of the rounds, with the lowest and the highest beside it.
"""

import argparse
import asyncio
import itertools
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

NUM_EVENTS = 64
PACE_SECONDS = 0.002
TARGET_MS = 0.6
CASES = (
    # name, bytes of prompt, stream, paced, concurrency, share of the requests
    ("whole_500B", 500, False, False, 1, 0.5),
    ("whole_500B", 500, False, False, 32, 1.0),
    ("whole_20kB", 20_000, False, False, 32, 0.5),
    ("stream_64", 500, True, False, 1, 0.1),
    ("stream_64", 500, True, False, 32, 0.3),
    ("stream_64_paced", 500, True, True, 1, 0.02),
    ("stream_64_paced", 500, True, True, 32, 0.1),
    ("stream_64_paced", 500, True, True, 128, 0.1),
)

# --- the mock engines -----------------------------------------------------------------------------------------------

MESSAGE = {"role": "assistant", "content": "hello " * 20}
USAGE = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
CHOICE = {"index": 0, "message": MESSAGE, "finish_reason": "stop"}
WHOLE = json.dumps(
    {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [CHOICE], "usage": USAGE}
).encode()
DELTA = {"index": 0, "delta": {"content": " hello"}, "finish_reason": None}
EVENT = json.dumps(
    {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [DELTA]}
).encode()
FIRST_TOKENS = json.dumps(
    {**json.loads(EVENT), "choices": [{**DELTA, "token_ids": [1]}], "prompt_token_ids": list(range(100))}
).encode()
TOKENS = json.dumps({**json.loads(EVENT), "choices": [{**DELTA, "token_ids": [19556]}]}, separators=(",", ":")).encode()
LAST_TOKENS = TOKENS.replace(b'"finish_reason":null', b'"finish_reason":"length"')
METRICS = (
    b'vllm:cache_config_info{block_size="16",num_gpu_blocks="4096"} 1.0\n'
    b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n"
)
VERSION = b'{"version":"0.32.0"}'
MODELS = b'{"object":"list","data":[{"id":"m","object":"model"}]}'


def sized(status: bytes, body: bytes) -> bytes:
    head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(body)) + body


def framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM_EVENT = framed(b"data: " + EVENT + b"\n\n")
FIRST_TOKENS_EVENT, TOKENS_EVENT, LAST_TOKENS_EVENT = (
    framed(b"data: " + event + b"\n\n") for event in (FIRST_TOKENS, TOKENS, LAST_TOKENS)
)
STREAM_END = framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class MockEngine(asyncio.Protocol):
    """Answers at once; parses no more than it must."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            found = re.search(rb"content-length: *(\d+)", head)
            length = int(found.group(1)) if found else 0
            if len(self.buffer) < end + 4 + length:
                return
            body = self.buffer[end + 4 : end + 4 + length]
            self.buffer = self.buffer[end + 4 + length :]
            self.answer(head, body)

    def answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"get /metrics"):
            self.transport.write(sized(b"200 OK", METRICS))
        elif head.startswith(b"get /version"):
            self.transport.write(sized(b"200 OK", VERSION))
        elif head.startswith(b"get"):
            self.transport.write(sized(b"200 OK", MODELS))
        elif re.search(rb'"stream": ?true', body):
            pace = PACE_SECONDS if b'"paced"' in body else 0.0
            events = [STREAM_EVENT] * NUM_EVENTS
            if b'"return_token_ids"' in body:
                events = [FIRST_TOKENS_EVENT, *[TOKENS_EVENT] * (NUM_EVENTS - 2), LAST_TOKENS_EVENT]
            asyncio.get_running_loop().create_task(self.stream(events, pace))
        else:
            self.transport.write(sized(b"200 OK", WHOLE))

    async def stream(self, events: list[bytes], pace: float) -> None:
        self.transport.write(STREAM_HEAD)
        for event in events:
            self.transport.write(event)
            await asyncio.sleep(pace)
        self.transport.write(STREAM_END)


async def mock_engines(num_engines: int) -> None:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(MockEngine, "127.0.0.1", 0) for _ in range(num_engines)]
    print(json.dumps([server.sockets[0].getsockname()[1] for server in servers]), flush=True)
    await asyncio.Event().wait()


# --- our router -----------------------------------------------------------------------------------------------------


async def our_router(ports: list[int], journal_path: str | None, follow: bool) -> None:
    from rota.base.journal import Journal, header_for
    from rota.runtime.clocks import SystemClock
    from rota.runtime.live import LiveLoop
    from rota.serving.assemble import SystemConfig, build
    from rota.serving.engines.openai import OpenAIEngine
    from rota.serving.frontdoor.serve import ServeConfig, serve
    from rota.serving.model.instance import InstanceId

    config = SystemConfig()
    journal = Journal(header_for(config, 0), path=journal_path) if journal_path else None
    engines = [
        OpenAIEngine(InstanceId(f"mock-{index}"), f"http://127.0.0.1:{port}") for index, port in enumerate(ports)
    ]
    await serve(
        ServeConfig(port=0, resume=follow),
        loop=LiveLoop(SystemClock(), journal),
        machine=build(config).cluster,
        engines=engines,
        on_ready=lambda router: print(json.dumps([router.door.server.port]), flush=True),
    )


# --- the floor ------------------------------------------------------------------------------------------------------


class PipeEnd(asyncio.Protocol):
    """One of two connections that are one. The client's end dials the other; requests wait for it."""

    def __init__(self, dial: Callable[["PipeEnd"], Awaitable["PipeEnd"]] | None) -> None:
        self.dial = dial
        self.early = b""
        self.other: PipeEnd | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        if self.dial is not None:
            self.dialling = asyncio.get_running_loop().create_task(self.join(self.dial))

    async def join(self, dial: Callable[["PipeEnd"], Awaitable["PipeEnd"]]) -> None:
        self.other = await dial(self)
        self.other.transport.write(self.early)

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self.early += data
        else:
            self.other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None:
            self.other.transport.abort()


async def byte_pipe(ports: list[int]) -> None:
    loop = asyncio.get_running_loop()
    turns = itertools.cycle(ports)

    async def dial(near: PipeEnd) -> PipeEnd:
        _, far = await loop.create_connection(lambda: PipeEnd(None), "127.0.0.1", next(turns))
        far.other = near
        return far

    server = await loop.create_server(lambda: PipeEnd(dial), "127.0.0.1", 0)
    print(json.dumps([server.sockets[0].getsockname()[1]]), flush=True)
    await asyncio.Event().wait()


# --- the client -----------------------------------------------------------------------------------------------------


def request_bytes(num_prompt_bytes: int, stream: bool, paced: bool) -> bytes:
    words = "the quick brown fox jumps over the lazy dog and "
    prompt = (words * (num_prompt_bytes // len(words) + 1))[:num_prompt_bytes]
    body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": prompt}], "max_tokens": 64}
    if stream:
        body["stream"] = True
    if paced:
        body["user"] = "paced"
    raw = json.dumps(body).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nuser-agent: bench\r\naccept: */*\r\n"
        b"authorization: Bearer none\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
        % (len(raw), raw)
    )


async def one_connection(port: int, wire: bytes, num_requests: int, latencies: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(num_requests):
        started_at = time.perf_counter()
        writer.write(wire)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b" 200 " not in head:
            raise RuntimeError(f"unexpected answer: {head!r}")
        if b"content-length" in head:
            await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
        else:
            await reader.readuntil(b"\r\n0\r\n\r\n")
        latencies.append(time.perf_counter() - started_at)
    writer.close()


def cpu_seconds(pid: int) -> float:
    threads = Path(f"/proc/{pid}/task")
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads.iterdir()) / 1e9


async def measure(port: int, pid: int | None, wire: bytes, concurrency: int, num_requests: int) -> dict[str, float]:
    each = max(1, num_requests // concurrency)
    warm_up = max(1, min(each // 4, 100))
    await asyncio.gather(*(one_connection(port, wire, warm_up, []) for _ in range(concurrency)))
    latencies: list[float] = []
    cpu_before, started_at = (cpu_seconds(pid) if pid else 0.0), time.perf_counter()
    await asyncio.gather(*(one_connection(port, wire, each, latencies) for _ in range(concurrency)))
    took = time.perf_counter() - started_at
    cpu = (cpu_seconds(pid) if pid else 0.0) - cpu_before
    latencies.sort()
    return {
        "cpu_ms_per_request": cpu * 1000 / len(latencies),
        "latency_p50_ms": latencies[len(latencies) // 2] * 1000,
        "latency_p99_ms": latencies[int(len(latencies) * 0.99)] * 1000,
        "requests_per_second": len(latencies) / took,
    }


# --- the run --------------------------------------------------------------------------------------------------------


def spawn(core: int, command: list[str], log: Any) -> subprocess.Popen[bytes]:
    pinned = ["taskset", "-c", str(core), *command] if shutil.which("taskset") else command
    return subprocess.Popen(pinned, stdout=subprocess.PIPE, stderr=log)


def ports_from(process: subprocess.Popen[bytes], what: str) -> list[int]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        sys.exit(f"{what} did not start")
    ports: list[int] = json.loads(line)
    return ports


def wait_for(port: int, process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) == 0:
                time.sleep(2.0)  # listening is not yet ready
                return
        time.sleep(0.1)
    sys.exit("the peer did not start")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def start_subjects(
    subjects: dict[str, tuple[int, Any]], arguments: argparse.Namespace, ports: list[int], core: int, log: Any
) -> None:
    """Enters each into `subjects` as soon as it runs, so that it is stopped also if a later one does not start."""
    subjects["direct"] = (ports[0], None)
    me = [sys.executable, __file__, "--serve", json.dumps(ports)]
    journal = arguments.scratch + "/journal.jsonl"
    for name, extra in (
        ("byte_pipe", ["--pipe"]),
        ("rota", []),
        ("rota_following", ["--follow"]),
        ("rota_with_journal", ["--journal", journal]),
    ):
        process = spawn(core, me + extra, log)
        subjects[name] = (ports_from(process, name)[0], process)
    if arguments.peer:
        for policy in ("round_robin", "cache_aware"):
            port = free_port()
            urls = [f"http://127.0.0.1:{port}" for port in ports]
            command = [arguments.peer, "--host", "127.0.0.1", "--port", str(port), "--policy", policy]
            command += ["--prometheus-port", str(free_port()), "--log-level", "error", "--worker-urls", *urls]
            process = spawn(core, command, log)
            subjects[f"vllm_router_{policy}"] = (port, process)
            wait_for(port, process, 180)


async def run(arguments: argparse.Namespace, subjects: dict[str, tuple[int, Any]]) -> dict[str, Any]:
    rows: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    for round_number in range(arguments.rounds):
        for case, num_bytes, stream, paced, concurrency, share in CASES:
            wire = request_bytes(num_bytes, stream, paced)
            num_requests = max(concurrency * 4, int(arguments.num_requests * share))
            for name, (port, process) in subjects.items():
                row = await measure(port, process.pid if process else None, wire, concurrency, num_requests)
                rows.setdefault((name, case, concurrency), []).append(row)
        print(f"round {round_number + 1} of {arguments.rounds} done", file=sys.stderr)
    return {
        name: {
            f"{case}/c{concurrency}": {
                metric: {
                    "median": round(statistics.median(row[metric] for row in found), 4),
                    "min": round(min(row[metric] for row in found), 4),
                    "max": round(max(row[metric] for row in found), 4),
                }
                for metric in found[0]
                if subjects[name][1] is not None or metric != "cpu_ms_per_request"
            }
            for (subject, case, concurrency), found in rows.items()
            if subject == name
        }
        for name in subjects
    }


def versions(peer: str | None) -> dict[str, str]:
    from importlib.metadata import version

    found = {name: version(name) for name in ("rota", "httptools", "uvloop", "msgspec")}
    if peer:
        found["peer"] = peer_version(peer)
    return found


def peer_version(peer: str) -> str:
    python = Path(peer).parent / "python"
    asked = [str(python), "-c", "from importlib.metadata import version; print('vllm-router', version('vllm-router'))"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", metavar="PATH", help="the vllm-router executable of another environment")
    parser.add_argument("--num-requests", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mock", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--pipe", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--journal", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.mock:
        uvloop.run(mock_engines(arguments.mock))
        return
    if arguments.serve:
        ports = json.loads(arguments.serve)
        uvloop.run(byte_pipe(ports) if arguments.pipe else our_router(ports, arguments.journal, arguments.follow))
        return

    cores = sorted(os.sched_getaffinity(0))
    router_core, other_core = cores[0], cores[-1]
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch, (Path(scratch) / "log").open("wb") as log:
        arguments.scratch = scratch
        mocks = spawn(other_core, [sys.executable, __file__, "--mock", "2"], log)
        subjects: dict[str, tuple[int, Any]] = {}
        try:
            start_subjects(subjects, arguments, ports_from(mocks, "the mock engines"), router_core, log)
            os.sched_setaffinity(0, {other_core})
            results = uvloop.run(run(arguments, subjects))
        finally:
            for _, process in subjects.values():
                if process is not None:
                    stop(process)
            stop(mocks)
    ours, floor = (
        {case: row["cpu_ms_per_request"]["median"] for case, row in results[name].items()}
        for name in ("rota", "byte_pipe")
    )
    provenance = {
        "command": "python benchmarks/router_overhead.py "
        + " ".join(sys.argv[1:]).replace(arguments.peer or "\0", "PATH"),
        "versions": versions(arguments.peer),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "num_cores": len(cores),
        "load_average_before": round(load_before, 2),
        "num_requests": arguments.num_requests,
        "rounds": arguments.rounds,
    }
    summary = {
        "target_cpu_ms": TARGET_MS,
        "cpu_ms": ours,
        "cpu_ms_of_byte_pipe": floor,
        "meets": {case: ms <= TARGET_MS for case, ms in ours.items()},
    }
    print(json.dumps({"summary": summary, "results": results, "provenance": provenance}, indent=2))


if __name__ == "__main__":
    main()
