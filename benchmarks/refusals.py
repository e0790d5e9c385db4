"""How long whoever is refused waits to be told, under overload, beside a request that decides nothing.

    python benchmarks/refusals.py > result.json

`rota serve` over two simulated engines in its own process, with `deadline_admission`. Requests with targets that the
engines could keep for a few of them come open loop, each on a connection that is there; those whose status is 429 or
503 were refused. Times count from when a request was written to the last byte of its answer. The floor is `GET /health`
on the same connections, in turns with them: what a round trip through this router costs at that moment.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from router_overhead import cpu_seconds, free_port, spawn, stop, wait_for
from soak import provenance

HOST = "127.0.0.1"
NUM_CONNECTIONS = 2000


def wire(target_ms: float) -> bytes:
    messages = [{"role": "user", "content": "the quick brown fox " * 200}]
    body = json.dumps({"model": "m", "messages": messages, "max_tokens": 512}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\nx-slo-ttft-ms: {target_ms}\r\nx-slo-tpot-ms: 250\r\n"
    return f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


async def run(port: int, pid: int, arguments: argparse.Namespace) -> dict[str, Any]:
    asking, health = wire(arguments.target_ms), b"GET /health HTTP/1.1\r\nhost: t\r\n\r\n"
    free = [await asyncio.open_connection(HOST, port) for _ in range(NUM_CONNECTIONS)]
    refused: list[float] = []
    floor: list[float] = []
    statuses: Counter[int] = Counter()

    async def one(sent: bytes) -> None:
        if not free:
            statuses[0] += 1  # All connections wait for answers: what is sent later would not be open loop.
            return
        reader, writer = free.pop()
        began_at = time.perf_counter()
        writer.write(sent)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
        took = (time.perf_counter() - began_at) * 1000
        status = int(head.split(b" ", 2)[1])
        if sent is health:
            floor.append(took)
        else:
            statuses[status] += 1
            if status in (429, 503):
                refused.append(took)
        free.append((reader, writer))

    tasks: set[asyncio.Task[None]] = set()
    began_at, cpu = time.monotonic(), cpu_seconds(pid)
    for number in range(int(arguments.rate * arguments.seconds)):
        await asyncio.sleep(max(0.0, began_at + number / arguments.rate - time.monotonic()))
        task = asyncio.create_task(one(health if number % 4 == 0 else asking))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    busy = (cpu_seconds(pid) - cpu) / (time.monotonic() - began_at)
    await asyncio.gather(*tasks)
    return {
        "statuses": {"no connection" if status == 0 else str(status): count for status, count in statuses.items()},
        "refused": shown(refused), "floor": shown(floor), "router_and_engines_cpu_cores": round(busy, 3),
    }  # fmt: skip


def shown(times: list[float]) -> dict[str, float]:
    if not times:
        return {"count": 0}
    median, p99 = np.percentile(times, (50, 99))
    return {
        "count": len(times), "mean_ms": round(float(np.mean(times)), 3), "p50_ms": round(float(median), 3),
        "p99_ms": round(float(p99), 3), "max_ms": round(max(times), 3),
    }  # fmt: skip


def main() -> None:
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second, a quarter of them the floor's")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--target-ms", type=float, default=1000.0)
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    load_before, started_at = os.getloadavg()[0], time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, (Path(scratch) / "log").open("wb") as log:
        stack = Path(scratch) / "stack.toml"
        stack.write_text('admission = "deadline_admission"\n')
        port = free_port()
        command = [str(Path(sys.executable).with_name("rota")), "serve", "--engine", "simulated", "--instances", "2"]
        command += ["--stack", str(stack), "--port", str(port), "--run-dir", scratch]
        router = spawn(cores[0], command, log)
        try:
            wait_for(port, router, 60)
            os.sched_setaffinity(0, {cores[-1]})
            result = uvloop.run(run(port, router.pid, arguments))
        finally:
            stop(router)
    print(json.dumps({**result, "provenance": provenance(load_before, started_at)}, indent=2))


if __name__ == "__main__":
    main()
