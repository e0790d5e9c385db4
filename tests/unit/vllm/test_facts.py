"""The facts file: whole lines, bounded, and readable while it is written."""

import time
from pathlib import Path

import pytest

from rota.base.errors import ConfigError
from rota.serving.engines.vllm.cpu_clock import WorkerCpuClock
from rota.serving.engines.vllm.facts import EngineFacts, FactsFile, StepRecord, read_engine, read_facts
from rota.serving.model.instance import InstanceLimits


def record(step: int) -> StepRecord:
    return StepRecord(
        step=step,
        at=step,
        unix_at=step,
        step_ns=1,
        decision_ns=1,
        num_running=1,
        num_waiting=0,
        num_free_blocks=1,
        num_blocks=2,
        prefills=((3, 4),),
        num_prefill_tokens=3,
        num_decodes=0,
        decode_kv_tokens=0,
        num_cached_tokens=0,
        num_admitted=1,
        num_displaced=0,
        num_preempted=0,
        num_finished=0,
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    facts = FactsFile(tmp_path / "facts")
    for step in range(5):
        facts.append(record(step))
    facts.flush()
    assert read_facts(tmp_path / "facts") == [record(step) for step in range(5)]
    facts.close()


def test_it_never_grows_past_twice_its_bound(tmp_path: Path) -> None:
    facts = FactsFile(tmp_path / "facts", max_bytes=2000)
    for step in range(200):
        facts.append(record(step))
        facts.flush()
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4000
    facts.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["facts", "facts.1"]
    assert read_facts(tmp_path / "facts")[-1] == record(199)
    assert read_facts(tmp_path / "facts.1")[-1].step + 1 == read_facts(tmp_path / "facts")[0].step


def test_a_line_under_way_is_left_out(tmp_path: Path) -> None:
    facts = FactsFile(tmp_path / "facts")
    facts.append(record(0))
    facts.close()
    with (tmp_path / "facts").open("ab") as file:
        file.write(b'{"step": 1')
    assert read_facts(tmp_path / "facts") == [record(0)]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        FactsFile(tmp_path / "nowhere" / "facts")


def test_what_the_engine_says_of_itself_heads_every_file(tmp_path: Path) -> None:
    engine = EngineFacts("vLLM 0.32.0", "m", "cpu", "bfloat16", InstanceLimits(num_blocks=7))
    facts = FactsFile(tmp_path / "facts", max_bytes=1000, engine=engine)
    for step in range(9):
        facts.append(record(step))
        facts.flush()
    facts.close()
    for name in ("facts", "facts.1"):
        assert read_engine(tmp_path / name) == engine
        assert len(read_facts(tmp_path / name)) > 0
    (tmp_path / "old").write_bytes(b"")
    assert read_engine(tmp_path / "old") is None


def test_the_cpu_clock_counts_work_and_not_waiting() -> None:
    clock = WorkerCpuClock()
    before = clock.now()
    time.sleep(0.05)
    waited = clock.now()
    while (worked := clock.now()) is not None and waited is not None and worked - waited < 20_000_000:
        pass
    assert before is not None
    assert waited is not None
    assert worked is not None
    assert waited - before < worked - waited
