"""Running requests move between two real vLLMs through `rota serve`, by hand-off and by replay, at random tokens and
under load: each stream is what it would have been.

pytest -m live -s tests/live/test_moves.py                       # 20 moves, half of them each way
ROTA_NUM_MOVES=200 pytest -m live -s tests/live/test_moves.py

float32 and greedy, since in bfloat16 the make-up of a batch alone changes tokens. Nothing here depends on how fast the
machine is: a request that ended before it was moved does not count, and another takes its place.
"""

import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.live.served import ROTA, two_vllms_served

pytestmark = pytest.mark.live

NUM_MOVES = int(os.environ.get("ROTA_NUM_MOVES", "20"))
WAYS = ("hand_off", "replay")
MAX_TOKENS = 64
AT_ONCE = 3
REQUESTS_MAX = 4 * NUM_MOVES
PROMPTS = (
    "Tell me about the sea.",
    "Write a line of emojis \N{PARTY POPPER}\N{ROCKET} and Chinese characters \u6f22\u5b57.",
    "Count from one to forty in words, and say after each of them what it may be good for, with one example at least.",
    "Why do leaves fall in autumn?",
)


@dataclass
class Served:
    """A router that runs over two engines."""

    process: "subprocess.Popen[str]"
    url: str
    folder: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("moves")
    options = ("dtype=float32", "max_num_seqs=8", "max_model_len=512")
    with two_vllms_served(folder, "--hand-off", engine_options=options) as (process, url):
        yield Served(process, url.removesuffix("/v1"), folder)


def body_of(index: int, *, chat: bool) -> dict[str, Any]:
    prompt = PROMPTS[index % len(PROMPTS)]
    given = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    terms = {"temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True, "stream_options": {"include_usage": True}}
    return {"model": "smollm2-135m", "stream": True, "return_token_ids": True, **given, **terms}


@dataclass
class Heard:
    """One stream, as its client had it."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    usage: dict[str, int] | None = None
    reasons: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    is_done: bool = False

    def said(self) -> tuple[object, ...]:
        return self.ids, self.text, self.usage, self.reasons, self.errors, len(self.names), self.is_done


Told = dict[str, Any]


async def ask(
    session: aiohttp.ClientSession, served: Served, body: dict[str, Any], move: tuple[int, str] | None = None
) -> tuple[Heard, Told | None]:
    """A stream, and what came of moving it once so many tokens had come."""
    heard, ordering = Heard(), None
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    async with session.post(served.url + path, json=body) as answer:
        request_id = answer.headers["x-request-id"]
        async for line in answer.content:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                heard.is_done = True
                continue
            event = json.loads(line[6:])
            if "error" in event:
                heard.errors.append(event["error"]["message"])
                continue
            heard.names.add(event["id"])
            heard.usage = event.get("usage") or heard.usage
            for choice in event["choices"]:
                heard.text += (choice.get("delta") or {}).get("content") or choice.get("text") or ""
                heard.ids += choice.get("token_ids") or []
                heard.reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
            if move is not None and ordering is None and len(heard.ids) >= move[0]:
                ordering = asyncio.create_task(order(session, served, request_id, move[1]))
    return heard, None if ordering is None else await ordering


async def order(session: aiohttp.ClientSession, served: Served, request_id: str, way: str) -> Told | None:
    """Have a request moved to wherever it is not; None if it ended before."""
    url = f"{served.url}/admin/requests/{request_id}/migrate"
    while True:
        for destination in ("vllm-0", "vllm-1"):
            async with session.post(url, json={"destination": destination, "way": way}) as answer:
                told: Told = await answer.json()
                if answer.status == 200:
                    return told
                assert answer.status in (404, 409), told
                if answer.status == 404 or "does not run" in told["error"]["message"]:
                    return None
        await asyncio.sleep(0.05)  # another is on its way between the two


async def moved_at_random(served: Served) -> tuple[list[Told], list[tuple[Heard, Heard]]]:
    """Requests, a few at a time, until enough were moved each way: what came of each move, and the streams that are
    wrong, with what they should be."""
    chance = random.Random(5)
    bodies = [body_of(index, chat=chat) for index in range(len(PROMPTS)) for chat in (False, True)]
    outcomes: list[Told] = []
    wrong: list[tuple[Heard, Heard]] = []
    numbers = iter(range(REQUESTS_MAX))
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1200)) as session:
        expected = [await ask(session, served, body) for body in bodies]
        assert all(len(heard.ids) == MAX_TOKENS and heard.is_done for heard, _ in expected), expected

        async def client() -> None:
            for number in numbers:
                num_moved = Counter(each["way"] for each in outcomes if each["outcome"] == "committed")
                way = min(WAYS, key=lambda each: num_moved[each])
                if num_moved[way] >= NUM_MOVES // 2:
                    return
                which = number % len(bodies)
                move = (chance.randrange(1, MAX_TOKENS - 8), way)
                heard, told = await ask(session, served, bodies[which], move)
                if told is not None:
                    outcomes.append(told)
                if heard.said() != expected[which][0].said():
                    wrong.append((heard, expected[which][0]))
                if number % 20 == 19:
                    print(f"{number + 1} requests, {dict(num_moved)}, {len(wrong)} wrong", flush=True)

        await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    return outcomes, wrong


def test_requests_moved_at_random_tokens_say_what_they_would_have_said(served: Served) -> None:
    outcomes, wrong = asyncio.run(moved_at_random(served))
    committed = {
        way: [each for each in outcomes if each["way"] == way and each["outcome"] == "committed"] for way in WAYS
    }
    for way, moves in committed.items():
        down = sorted(each["downtime_seconds"] for each in moves)
        print(
            f"{way}: {len(moves)} moves, {statistics.median(down):.2f} s down in the median, {down[-1]:.2f} s at most"
        )
    reasons = Counter(each["reason"] for each in outcomes if each["outcome"] == "aborted")
    print(f"{len(outcomes)} moves begun, {len(wrong)} streams wrong; given up: {dict(reasons)}")
    assert not wrong, wrong[0]
    assert all(len(moves) >= NUM_MOVES // 2 for moves in committed.values()), reasons
    assert all(each["num_bytes"] > 0 for each in committed["hand_off"])
    assert not any(each["num_bytes"] for each in committed["replay"])

    explained = rota("explain", str(served.folder / "journal.jsonl"), committed["hand_off"][0]["request_id"])
    assert "asked for by hand" in explained, explained
    os.kill(served.process.pid, signal.SIGINT)
    assert served.process.wait(60) == 0
    assert "identical" in rota("replay", str(served.folder / "journal.jsonl"))


def rota(*words: str) -> str:
    done = subprocess.run([*ROTA, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
