"""Loads a live engine and collects what its steps were made of."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import msgspec

from rota.base.errors import ConfigError, DataError, EngineError
from rota.base.instant import Instant
from rota.base.random_streams import RandomStreams
from rota.serving.bench.client import Sent, Target, first_model
from rota.serving.bench.prompts import FileTokenizer, Prompts
from rota.serving.calibration.load import Load, stretches
from rota.serving.engines.vllm.facts import EngineFacts, StepRecord, read_engine, read_facts

_FLUSH_SECONDS = 5.0
"""An idle engine's last steps are in its facts well before."""


class Collected(msgspec.Struct, frozen=True):
    """What came of a load."""

    engine: EngineFacts
    records: list[StepRecord]
    sent: list[Sent]
    is_interrupted: bool


def clock() -> Instant:
    """The clock that engines on this machine stamp their steps with."""
    return Instant(time.monotonic_ns())


def session() -> aiohttp.ClientSession:
    """For loads. Every request opens a connection of its own: one that was kept may be closed by the server at the
    moment at which it is used."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))


def engine_of(facts: Path) -> EngineFacts:
    """What the engine of a facts file says of itself. Raises `ConfigError` if it cannot be read or does not say."""
    try:
        engine = read_engine(facts)
    except OSError as error:
        raise ConfigError(f"{facts}: cannot be read: {error.strerror or error}") from None
    except msgspec.MsgspecError as error:
        raise DataError(f"{facts}: the line of its engine: {error}") from None
    if engine is None:
        raise ConfigError(
            f"{facts}: does not say which engine it is of",
            hint="let the engine write it anew: rota.serving.engines.vllm.plugin with `facts` set",
        )
    return engine


def records_of(facts: Path) -> list[StepRecord]:
    """All step records of a facts file and of the part that was rolled over, oldest first. Raises `DataError` naming
    the file if it cannot be read."""
    rolled = facts.with_name(facts.name + ".1")
    records: list[StepRecord] = []
    for path in (rolled, facts) if rolled.exists() else (facts,):
        try:
            records += read_facts(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        except msgspec.MsgspecError as error:
            raise DataError(f"{path}: {_bad_line(path)}: not a step record: {error}") from None
    return records


async def collect(
    url: str,
    facts: Path,
    *,
    seconds: float,
    seed: int,
    stop: asyncio.Event,
    tokenizer: Path | None = None,
    on_progress: Callable[[int], None] = lambda seconds: None,
) -> Collected:
    """Load the engine at `url` for so long, and return the steps that it wrote into `facts` meanwhile.

    `stop` ends it early with what there is. Raises `EngineError` if the engine cannot be reached, or wrote nothing,
    `ConfigError` if its facts do not say what it is.
    """
    engine = engine_of(facts)
    streams = RandomStreams(seed)
    prompts = Prompts(streams, None if tokenizer is None else FileTokenizer(tokenizer))
    began_at, sent = clock(), []
    async with session() as client:
        model = await first_model(client, url)
        target = Target(client, url, clock, model=model, endpoint="completions", ignore_eos=True, timeout_seconds=600.0)
        load = Load(target, prompts, engine.limits, clock, streams, stop)
        ticker = asyncio.create_task(_tick(on_progress))
        try:
            for stretch in stretches(seconds):
                sent += await load.run(stretch)
                if stop.is_set():
                    break
                _judge(sent, url)
        finally:
            ticker.cancel()
    records = await _written(facts, began_at)
    if not records:
        raise EngineError(f"{url}: no step of it is in {facts}", hint="is this the facts file of that engine?")
    return Collected(engine, records, sent, stop.is_set())


async def _tick(on_progress: Callable[[int], None]) -> None:
    began = time.monotonic()
    while True:
        await asyncio.sleep(0.5)
        on_progress(round(time.monotonic() - began))


def _judge(sent: list[Sent], url: str) -> None:
    """An engine that answers nothing is not worth minutes of load."""
    if sent and all(each.outcome != "finished" for each in sent):
        first = sent[0]
        raise EngineError(f"{url}: none of {len(sent)} requests was answered; {first.error_kind}: {first.detail}")


async def _written(facts: Path, began_at: Instant) -> list[StepRecord]:
    """The steps since `began_at`, once their number stays the same."""
    deadline = time.monotonic() + _FLUSH_SECONDS
    records: list[StepRecord] = []
    while time.monotonic() < deadline:
        before = len(records)
        records = [record for record in records_of(facts) if record.at >= began_at]
        if records and len(records) == before:
            break
        await asyncio.sleep(0.7)
    return records


def _bad_line(path: Path) -> str:
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        if not line.startswith(b'{"engine":'):
            try:
                msgspec.json.decode(line, type=StepRecord)
            except msgspec.MsgspecError:
                return f"line {number}"
    return "a line"
