"""What one hostile tenant or stranger costs the others: their latency before, during and after each attack.

    python benchmarks/under_attack.py > result.json

`rota serve` over two mock engines that answer at once, with keys of two tenants and `tenant_limits`. The good tenant
asks 80 times a second on eight connections; its latency counts from when a request was due. The attacker is a process
of its own: it holds connections, sends slowly, sends much, or floods, with its own key or none. Every attack stands
between two quiet stretches of the same run, since the machine is not always the same; the control is an attacker that
behaves. The attacker yields its core to the good tenant, which would otherwise wait for it there. Router CPU is of all
its threads, kernel included; answers are those of the good tenant and of the attacker, by status."""

import argparse
import asyncio
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from router_overhead import cpu_seconds
from soak import provenance, resident_mib, router_over_mocks

STACK = """
admission = "tenant_limits"

[parameters.admission]
max_unfinished_per_tenant = 32
"""
NUM_CONNECTIONS, PERIOD_SECONDS = 8, 0.1
HOST = "127.0.0.1"
SMALL = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}).encode()
STREAM = json.dumps({**json.loads(SMALL), "stream": True}).encode()


def wire(key: str, body: bytes = SMALL, *headers: str) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "host: t", f"authorization: Bearer {key}", *headers]
    return (
        "\r\n".join([*lines, "content-type: application/json", f"content-length: {len(body)}\r\n\r\n"]).encode() + body
    )


# --- attacks ----------------------------------------------------------------------------------------------------------

Attack = Callable[[int, str], Awaitable[None]]


async def many_connections(port: int, key: str) -> None:
    """8,000 connections that say nothing: the router takes 8,192 in all."""
    await holding(port, 8000, b"")


async def slow_bodies(port: int, key: str) -> None:
    """2,000 requests of which a byte comes each second."""
    writers = await opened(port, 2000, wire(key)[:-40])
    while True:
        for writer in writers:
            if not writer.is_closing():
                writer.write(b" ")
        await asyncio.sleep(1.0)


async def slow_readers(port: int, key: str) -> None:
    """32 streams at a time, all that a tenant may have, of which nothing is read."""
    await holding(port, 32, wire(key, STREAM))


async def wrong_keys(port: int, key: str) -> None:
    """400 requests a second with invented keys, of 20 kB."""
    await at_rate(port, 400, lambda number: wire(f"rota-{number:043d}", b" " * 20_000))


async def huge_bodies(port: int, key: str) -> None:
    """Two prompts of 7 MB a second, from a tenant that has a key."""
    body = SMALL.replace(b'"hi"', b'"' + b"lorem ipsum " * 600_000 + b'"')
    await at_rate(port, 2, lambda number: wire(key, body))


async def new_names(port: int, key: str) -> None:
    """400 requests a second that each claim a tenant, a session and a model of their own."""
    name = "x-gateway-inference-fairness-id"
    await at_rate(port, 400, lambda number: wire(key, SMALL, f"{name}: n{number}", f"x-session-id: s{number}"))


async def flood(port: int, key: str) -> None:
    """As many requests as 64 connections get answered."""
    await closed_loop(port, 64, wire(key), 0.0)


async def large_flood(port: int, key: str) -> None:
    """As many requests as 1,000 connections get answered."""
    await closed_loop(port, 1000, wire(key), 0.0)


async def new_connections(port: int, key: str) -> None:
    """64 clients that open a connection for each request, and ask again as soon as it is answered."""
    await closed_loop(port, 64, wire(key), 0.0, anew=True)


async def pipelined(port: int, key: str) -> None:
    """Eight connections on which requests follow each other as fast as they are read, answers unawaited."""
    await asyncio.gather(*(pouring(port, wire(key) * 200) for _ in range(8)))


async def wrong_keys_at_once(port: int, key: str) -> None:
    """64 clients with invented keys that ask again, on a new connection, as soon as they are refused."""
    await closed_loop(port, 64, wire("rota-" + "0" * 43), 0.0, anew=True)


async def without_a_key(port: int, key: str) -> None:
    """As many `GET /health` as 64 connections get answered, which needs no key."""
    await closed_loop(port, 64, b"GET /health HTTP/1.1\r\nhost: t\r\n\r\n", 0.0)


async def behaves(port: int, key: str) -> None:
    """The control: 400 requests a second, each of them served."""
    await at_rate(port, 400, lambda number: wire(key))


ATTACKS: tuple[Attack, ...] = (
    behaves, many_connections, slow_bodies, slow_readers, wrong_keys, huge_bodies, new_names, flood,
    large_flood, new_connections, pipelined, wrong_keys_at_once, without_a_key,
)  # fmt: skip


async def opened(port: int, num: int, sent: bytes) -> list[asyncio.StreamWriter]:
    writers = []
    for _ in range(num):
        _, writer = await asyncio.open_connection(HOST, port, limit=1024)
        writer.write(sent)
        writers.append(writer)
    return writers


async def holding(port: int, num: int, sent: bytes) -> None:
    writers = await opened(port, num, sent)
    await asyncio.Event().wait()
    del writers


async def closed_loop(port: int, num: int, sent: bytes, pause: float, anew: bool = False) -> None:
    """`num` clients that await each answer; with `anew` on a connection for each request."""

    async def one() -> None:
        reader, writer = await asyncio.open_connection(HOST, port)
        while True:
            writer.write(sent)
            if await answer(reader) or anew:
                # Reset, so that no port stays taken for a minute.
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.close()
                reader, writer = await asyncio.open_connection(HOST, port)
            await asyncio.sleep(pause)

    await asyncio.gather(*(one() for _ in range(num)))


async def pouring(port: int, sent: bytes) -> None:
    reader, writer = await asyncio.open_connection(HOST, port)

    async def swallow() -> None:
        while await reader.read(65536):
            pass

    swallowing = asyncio.create_task(swallow())
    while not swallowing.done():
        writer.write(sent)
        await writer.drain()


async def num_answers(port: int) -> Counter[str]:
    """What the router counts on `/metrics`: answers by status."""
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(b"GET /metrics HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n")
    page = (await reader.read(-1)).decode()
    writer.close()
    counts: Counter[str] = Counter()
    for status, count in re.findall(r'rota:requests_total\{.*status="(\d+)"\} ([0-9.e+]+)', page):
        counts[status] += int(float(count))
    return counts


async def at_rate(port: int, rate: float, sent: Callable[[int], bytes]) -> None:
    """Open loop, a connection each, so that what is refused halfway costs no more than it does."""

    async def one(number: int) -> None:
        try:
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(sent(number))
            await answer(reader)
            writer.close()
        except OSError:
            pass  # Cut while it was sending: that is the defence.

    tasks: set[asyncio.Task[None]] = set()
    began_at = time.monotonic()
    for number in range(1_000_000):
        await asyncio.sleep(max(0.0, began_at + number / rate - time.monotonic()))
        task = asyncio.create_task(one(number))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def answer(reader: asyncio.StreamReader) -> bool:
    """Read one whole answer; whether the connection ends with it."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
    except (asyncio.IncompleteReadError, ConnectionError):
        return True
    return b"connection: close" in head


# --- the good tenant --------------------------------------------------------------------------------------------------


async def good(port: int, key: str, seconds: float) -> list[float]:
    """Latencies in ms, counted from when each request was due."""
    latencies: list[float] = []
    sent = wire(key)

    async def one(number: int) -> None:
        reader, writer = await asyncio.open_connection(HOST, port)
        due = time.perf_counter() + number * PERIOD_SECONDS / NUM_CONNECTIONS
        end = due + seconds
        while due < end:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            writer.write(sent)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if b" 200 " not in head:
                raise RuntimeError(f"the good tenant was answered {head!r}")
            await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
            latencies.append((time.perf_counter() - due) * 1000)
            due += PERIOD_SECONDS
        writer.close()

    await asyncio.gather(*(one(number) for number in range(NUM_CONNECTIONS)))
    return latencies


def shown(latencies: list[float]) -> dict[str, float]:
    mean, median, p99 = np.mean(latencies), *np.percentile(latencies, (50, 99))
    return {"mean_ms": round(float(mean), 3), "p50_ms": round(float(median), 3), "p99_ms": round(float(p99), 3)}


async def run(
    port: int, pid: int, keys: dict[str, str], seconds: float, rounds: int, attacks: Sequence[Attack]
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for attack in attacks:
        quiet: list[float] = []
        attacked: list[float] = []
        busy = resident = took = 0.0
        answers: Counter[str] = Counter()
        for _ in range(rounds):
            quiet += await good(port, keys["good"], seconds)
            words = [sys.executable, __file__, "--attack", attack.__name__, "--port", str(port), "--key", keys["evil"]]
            attacker = subprocess.Popen(words)
            try:
                await asyncio.sleep(3.0)  # it opens its connections
                before = await num_answers(port)
                cpu, began_at = cpu_seconds(pid), time.monotonic()
                attacked += await good(port, keys["good"], seconds)
                took += time.monotonic() - began_at
                busy += cpu_seconds(pid) - cpu
                answers += await num_answers(port) - before
                resident = max(resident, resident_mib(pid))
                if attacker.poll() is not None:
                    raise RuntimeError(f"{attack.__name__} ended by itself")
            finally:
                attacker.kill()
                attacker.wait()
            await asyncio.sleep(1.0)
        results[attack.__name__] = {
            "what": attack.__doc__, "quiet": shown(quiet), "attacked": shown(attacked),
            "router_cpu_cores": round(busy / took, 3), "resident_mib": round(resident, 1),
            "answers_per_second": {status: round(num / took) for status, num in sorted(answers.items())},
        }  # fmt: skip
        print(f"{attack.__name__}: {json.dumps(results[attack.__name__])}", file=sys.stderr, flush=True)
    return results


def main() -> None:
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each stretch")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--evil-per-minute", type=int, help="requests that the attacker's terms let it send")
    parser.add_argument("--only", nargs="+", metavar="ATTACK", help="these attacks alone, by their names")
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--key", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.attack:
        os.nice(
            19
        )  # It shares a core with the good tenant and the engines, whose wait for it would not be the router's.
        uvloop.run({each.__name__: each for each in ATTACKS}[arguments.attack](arguments.port, arguments.key))
        return
    attacks = [each for each in ATTACKS if arguments.only is None or each.__name__ in arguments.only]
    load_before, began_at = os.getloadavg()[0], time.monotonic()
    terms = f"[tenants.evil]\nrequests_per_minute = {arguments.evil_per_minute}" if arguments.evil_per_minute else ""
    with router_over_mocks(STACK, ("good", "evil"), terms) as served:
        results = uvloop.run(run(served.port, served.pid, served.keys, arguments.seconds, arguments.rounds, attacks))
    print(json.dumps({"results": results, "provenance": provenance(load_before, began_at)}, indent=2))


if __name__ == "__main__":
    main()
