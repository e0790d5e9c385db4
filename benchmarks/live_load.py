"""A load of which the tokens of every answer are kept, for benchmarks that compare answers between arms."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from rota.base.instant import Instant
from rota.base.random_streams import RandomStreams
from rota.serving.bench.client import Sent, Target, first_model
from rota.serving.bench.load import send_load
from rota.serving.bench.plan import Planned
from rota.serving.bench.prompts import FileTokenizer, Prompts
from rota.serving.bench.report import LoadReport, report_of


def clock() -> Instant:
    """The clock that engines on this machine stamp their steps with."""
    return Instant(time.monotonic_ns())


@dataclass(frozen=True, slots=True)
class Heard:
    """What came of a plan: the report, each request, and the tokens of each answer by the request's index."""

    report: LoadReport
    sent: list[Sent]
    tokens: dict[int, list[int]]
    began_at: Instant


def send(url: str, plan: Sequence[Planned], *, seed: int, salt: str, model_folder: Path) -> Heard:
    """Send the requests of a plan at their moments and read every answer. Equal indices make equal prompts, whatever
    else the plan holds; requests of another salt find nothing of theirs in a prefix cache."""
    return asyncio.run(_send(url, plan, seed, salt, model_folder))


async def _send(url: str, plan: Sequence[Planned], seed: int, salt: str, model_folder: Path) -> Heard:
    tokenizer = FileTokenizer(model_folder)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        model = await first_model(session, url)
        target = _Hearing(
            session, url, clock, model=model, endpoint="completions", ignore_eos=True, timeout_seconds=1800.0
        )
        target.salt = salt

        def text_of(planned: Planned) -> str:
            # A stream for each request, so that a plan that leaves some out has the same texts.
            own = Prompts(RandomStreams(1_000_003 * seed + planned.index), tokenizer)
            return own.text(planned.index, planned.num_prompt_tokens)

        texts = {planned.index: text_of(planned) for planned in plan}
        began_at = clock()
        sent = await send_load(plan, target, lambda each: texts[each.index], clock, stop=asyncio.Event())
    report = report_of(sent, url=url, model=model, seed=seed, num_warmups=0, is_interrupted=False)
    return Heard(report, sent, target.tokens, began_at)


class _Hearing(Target):
    """Asks for the ids of the tokens, and keeps them."""

    salt = ""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.tokens: dict[int, list[int]] = {}

    def body(self, planned: Planned, text: str) -> bytes:
        fields = {"return_token_ids": True, "cache_salt": self.salt}
        return msgspec.json.encode(msgspec.json.decode(super().body(planned, text)) | fields)

    async def _read_events(self, sent: Sent, content: Any) -> bool:
        kept = _Kept(content)
        is_done = await super()._read_events(sent, kept)  # type: ignore[arg-type]
        self.tokens[sent.planned.index] = kept.token_ids()
        return is_done


class _Kept:
    """A stream that is read through, and kept."""

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content = content
        self._data: list[bytes] = []

    async def iter_any(self) -> AsyncIterator[bytes]:
        async for data in self._content.iter_any():
            self._data.append(data)
            yield data

    def token_ids(self) -> list[int]:
        ids: list[int] = []
        for line in b"".join(self._data).split(b"\n"):
            if line.startswith(b"data: {"):
                for choice in msgspec.json.decode(line[6:]).get("choices") or ():
                    ids += choice.get("token_ids") or ()
        return ids


def differing(one: dict[int, list[int]], other: dict[int, list[int]]) -> list[int]:
    """The indices of those that both have answers to, and other ones."""
    return sorted(index for index in one.keys() & other.keys() if one[index] != other[index])
