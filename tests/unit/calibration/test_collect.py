"""The load on an engine and what is collected of it: kinds, levels, ends, and errors that name the spot."""

import asyncio
from pathlib import Path

import msgspec
import pytest
from tests.unit.calibration.fabricated import ENGINE, LIMITS, facts, straight
from tests.unit.calibration.fake_engine import FakeEngine

from rota.base.errors import ConfigError, DataError, EngineError
from rota.base.random_streams import RandomStreams
from rota.serving.bench.client import Target
from rota.serving.bench.prompts import Prompts
from rota.serving.calibration.collect import Collected, clock, collect, engine_of, records_of, session
from rota.serving.calibration.load import PAUSE_SECONDS, Load, Stretch, stretches
from rota.serving.calibration.steps import HOLDOUT_EVERY, HOLDOUT_FIRST
from rota.serving.engines.vllm.facts import FactsFile


def test_stretches_fill_the_time_and_every_kind_is_held_out() -> None:
    for seconds in (40.0, 120.0, 240.0, 900.0):
        planned = stretches(seconds)
        assert sum(each.seconds + PAUSE_SECONDS for each in planned) == pytest.approx(seconds, rel=0.01)
        held = {each.kind for each in planned if each.index % HOLDOUT_EVERY == HOLDOUT_FIRST}
        fitted = {each.kind for each in planned if each.index % HOLDOUT_EVERY != HOLDOUT_FIRST}
        assert fitted == {"alone", "mixed", "steady", "ramp"}
        assert len(held) >= (4 if seconds >= 200 else 2)


def run_stretch(engine: FakeEngine, stretch: Stretch) -> int:
    """The number of requests that ended."""

    async def run() -> int:
        streams = RandomStreams(0)
        async with session() as client:
            target = Target(
                client, engine.url, clock, model="ok", endpoint="completions", ignore_eos=True, timeout_seconds=9.0
            )
            load = Load(target, Prompts(streams), LIMITS, clock, streams, asyncio.Event())
            return len(await load.run(stretch))

    return asyncio.run(run())


def test_levels_are_those_of_the_kind(tmp_path: Path) -> None:
    with FakeEngine(tmp_path / "facts", delay_seconds=0.05) as engine:
        assert run_stretch(engine, Stretch(0, "alone", 1.0)) > 0
        assert engine.num_at_once == 1
        assert run_stretch(engine, Stretch(1, "ramp", 1.0)) > LIMITS.max_num_seqs
        assert 1 < engine.num_at_once <= LIMITS.max_num_seqs
    for _, body in engine.heard:
        assert body["ignore_eos"] is True
        assert len(body["prompt"].split()) + body["max_tokens"] <= LIMITS.max_model_len


def test_mixed_load_has_prompts_that_begin_alike(tmp_path: Path) -> None:
    with FakeEngine(tmp_path / "facts", delay_seconds=0.02) as engine:
        run_stretch(engine, Stretch(5, "mixed", 2.0))
    heads = [" ".join(body["prompt"].split()[:60]) for _, body in engine.heard if len(body["prompt"].split()) > 200]
    assert 1 < len(set(heads)) < len(heads)


async def _collect(engine: FakeEngine, path: Path, stop_after: float) -> Collected:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(stop_after, stop.set)
    return await collect(engine.url, path, seconds=60.0, seed=0, stop=stop)


@pytest.mark.slow
def test_an_interrupt_keeps_what_was_collected_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "facts"
    old = FactsFile(path, engine=ENGINE)
    old.append(msgspec.structs.replace(facts(straight)[0], at=5))
    old.close()
    with FakeEngine(path) as engine:
        collected = asyncio.run(_collect(engine, path, 3.0))
    assert collected.is_interrupted
    assert collected.engine == ENGINE
    assert len(collected.sent) > 0
    # Steps from before are not of this load.
    assert len(collected.records) >= len(collected.sent)
    assert all(record.at > 5 for record in collected.records)


def test_an_engine_that_answers_nothing_is_given_up(tmp_path: Path) -> None:
    with (
        FakeEngine(tmp_path / "facts", model="status_500") as engine,
        pytest.raises(EngineError, match=r"none of .* requests was answered; status 500"),
    ):
        asyncio.run(_collect(engine, tmp_path / "facts", 30.0))


@pytest.mark.slow
def test_the_facts_of_another_engine_are_noticed(tmp_path: Path) -> None:
    FactsFile(tmp_path / "other", engine=ENGINE).close()
    with (
        FakeEngine(tmp_path / "facts") as engine,
        pytest.raises(EngineError, match=r"no step of it is in .*other"),
    ):
        asyncio.run(_collect(engine, tmp_path / "other", 1.0))


def test_facts_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: cannot be read"):
        engine_of(tmp_path / "nowhere")
    (tmp_path / "none").write_bytes(b"")
    with pytest.raises(ConfigError, match="none: does not say which engine"):
        engine_of(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b'{"engine":3}\n{"step":1}\n')
    with pytest.raises(DataError, match="bad: the line of its engine"):
        engine_of(tmp_path / "bad")
    with pytest.raises(DataError, match="bad: line 2: not a step record"):
        records_of(tmp_path / "bad")


def test_the_part_that_was_rolled_over_is_read_too(tmp_path: Path) -> None:
    file = FactsFile(tmp_path / "facts", engine=ENGINE, max_bytes=12_000)
    written = facts(straight, num_stretches=1, num_steps=50)
    for record in written:
        file.append(record)
        file.flush()
    file.close()
    assert (tmp_path / "facts.1").exists()
    assert records_of(tmp_path / "facts") == written
