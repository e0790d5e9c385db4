"""A million requests through one router with everything on: is its memory flat, and what CPU does a request take?

    python benchmarks/soak.py [--num-requests N] [--concurrency C] > result.json

`rota serve` over two mock vLLMs that answer at once, with keys of 100 tenants, `tenant_limits`, a queue of its own in
the order of `fair_tokens`, `prefix_then_load`, per-tenant metrics and the board. No two requests are alike: prompts,
ids and sessions are new each time, prompts of a tenant share a beginning. One in a hundred is wrong (a bad key, another
tenant's name, a body that is no JSON), and one in a hundred leaves before its answer. One in ten is a stream of 64
events, whose token ids are kept.

Resident memory and the CPU of the router's threads (schedstat, kernel included) are noted twenty times. Memory that
grows with the requests would show in the second half as it does in the first."""

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from router_overhead import cpu_seconds, free_port, ports_from, spawn, stop, versions, wait_for

NUM_TENANTS = 100
NUM_NOTES = 20
STACK = """
order = "fair_tokens"
dispatch = "prefix_then_load"
admission = "tenant_limits"

[queue]
max_outstanding_per_instance = 64

[parameters.admission]
max_unfinished = 512
"""
EXPECTED = {"good": 200, "stream": 200, "bad key": 401, "other tenant": 403, "no JSON": 400}
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "islet", "jetty")


class Served(NamedTuple):
    """`rota serve` over two mock engines."""

    port: int
    pid: int
    keys: dict[str, str]
    """By tenant."""


@contextmanager
def router_over_mocks(stack: str, tenants: Iterable[str], terms: str = "") -> Iterator[Served]:
    """The router with one core to itself, mocks and this process on another; all stopped at the end. `terms` are
    those lines of the key file that are no keys."""
    cores = sorted(os.sched_getaffinity(0))
    rota, mock = str(Path(sys.executable).with_name("rota")), str(Path(__file__).with_name("router_overhead.py"))
    with tempfile.TemporaryDirectory() as scratch, (Path(scratch) / "log").open("wb") as log:
        stack_file, key_file = Path(scratch) / "stack.toml", Path(scratch) / "keys.toml"
        stack_file.write_text(stack)
        keys = {}
        for tenant in tenants:
            command = [rota, "keys", "new", "--tenant", tenant, "--keys", str(key_file), "--json"]
            keys[tenant] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["key"]
        key_file.write_text(f"{terms}\n{key_file.read_text()}")
        mocks, router = spawn(cores[-1], [sys.executable, mock, "--mock", "2"], log), None
        try:
            port = free_port()
            command = [rota, "serve", "--port", str(port), "--run-dir", str(Path(scratch) / "runs")]
            for each in ports_from(mocks, "the mock engines"):
                command += ["--engine", f"http://127.0.0.1:{each}"]
            router = spawn(cores[0], [*command, "--keys", str(key_file), "--stack", str(stack_file)], log)
            wait_for(port, router, 60)
            os.sched_setaffinity(0, {cores[-1]})
            yield Served(port, router.pid, keys)
        finally:
            for process in (router, mocks):
                if process is not None:
                    stop(process)


def provenance(load_before: float, began_at: float) -> dict[str, Any]:
    return {
        "command": f"python benchmarks/{Path(sys.argv[0]).name} " + " ".join(sys.argv[1:]),
        "versions": versions(None),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "num_cores": os.cpu_count(),
        "load_average_before": round(load_before, 2),
        "took_seconds": round(time.monotonic() - began_at),
    }


def request(draw: random.Random, keys: list[str], number: int) -> tuple[str, bytes]:
    """What kind of request it is, and its bytes."""
    tenant, roll = draw.randrange(NUM_TENANTS), draw.random()
    kind = "good"
    if roll < 0.01:
        kind = draw.choice(("bad key", "other tenant", "no JSON"))
    elif roll < 0.02:
        kind = "leaves"
    elif roll < 0.12:
        kind = "stream"
    shared = f"You work for tenant {tenant}. " * 20
    question = " ".join(draw.choice(WORDS) for _ in range(40))
    body: dict[str, Any] = {
        "model": "m",
        "messages": [{"role": "system", "content": shared}, {"role": "user", "content": f"{number}: {question}"}],
        "max_tokens": 64,
    }
    if kind == "stream":
        body["stream"] = True
    raw = json.dumps(body).encode()
    raw = raw[:-9] if kind == "no JSON" else raw
    key = "rota-" + "0" * 40 if kind == "bad key" else keys[tenant]
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: soak\r\nauthorization: Bearer {key}\r\n"
    head += f"content-type: application/json\r\nx-request-id: {number}\r\nx-session-id: session-{number}\r\n"
    if kind == "other tenant":
        head += f"x-gateway-inference-fairness-id: stranger-{number}\r\n"
    return kind, f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw


async def one_connection(port: int, keys: list[str], numbers: Iterator[int], counts: "Counter[str]") -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for number in numbers:
        kind, wire = request(random.Random(number), keys, number)
        writer.write(wire)
        if kind == "leaves":
            writer.close()
            counts[kind] += 1
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            continue
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head.split(b" ", 2)[1])
        if status != EXPECTED[kind]:
            raise RuntimeError(f"request {number}, {kind}: answered {status}")
        if b"content-length" in head:
            await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
        else:
            await reader.readuntil(b"\r\n0\r\n\r\n")
        counts[kind] += 1
        if b"connection: close" in head:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()


def resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


async def soak(port: int, pid: int, keys: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    numbers = iter(range(arguments.num_requests))
    counts: Counter[str] = Counter()
    working = asyncio.gather(*(one_connection(port, keys, numbers, counts) for _ in range(arguments.concurrency)))
    notes = [note(pid, counts)]
    while not working.done():
        await asyncio.sleep(0.2)
        if counts.total() - notes[-1]["num_requests"] >= arguments.num_requests // NUM_NOTES:
            notes.append(note(pid, counts))
            print(json.dumps(notes[-1]), file=sys.stderr, flush=True)
    await working
    notes.append(note(pid, counts))
    return {"kinds": dict(counts), "notes": notes}


def note(pid: int, counts: "Counter[str]") -> dict[str, float]:
    return {
        "num_requests": counts.total(),
        "resident_mib": round(resident_mib(pid), 1),
        "cpu_seconds": round(cpu_seconds(pid), 2),
    }


def summary(result: dict[str, Any]) -> dict[str, Any]:
    notes = result["notes"]
    second_half = [note for note in notes if note["num_requests"] >= notes[-1]["num_requests"] / 2]
    slope, _ = np.polyfit(
        [each["num_requests"] for each in second_half], [each["resident_mib"] for each in second_half], 1
    )
    cpu_ms = [
        (after["cpu_seconds"] - before["cpu_seconds"]) / (after["num_requests"] - before["num_requests"]) * 1000
        for before, after in itertools.pairwise(notes[1:])
        if after["num_requests"] - before["num_requests"] > 100
    ]
    return {
        "resident_mib": {
            "at_a_twentieth": notes[1]["resident_mib"],
            "half_way": second_half[0]["resident_mib"],
            "at_the_end": notes[-1]["resident_mib"],
        },
        "second_half_bytes_per_request": round(float(slope) * 2**20, 2),
        "cpu_ms_per_request": {
            "median": round(statistics.median(cpu_ms), 4), "min": round(min(cpu_ms), 4), "max": round(max(cpu_ms), 4)
        },
    }  # fmt: skip


def main() -> None:
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-requests", type=int, default=1_000_000)
    parser.add_argument("--concurrency", type=int, default=32)
    arguments = parser.parse_args()
    load_before, began_at = os.getloadavg()[0], time.monotonic()
    with router_over_mocks(STACK, [f"tenant-{number}" for number in range(NUM_TENANTS)]) as served:
        result = uvloop.run(soak(served.port, served.pid, list(served.keys.values()), arguments))
    print(json.dumps({"summary": summary(result), **result, "provenance": provenance(load_before, began_at)}, indent=2))


if __name__ == "__main__":
    main()
