"""The facts file is followed as it grows: nothing lost or doubled, whatever happens to the file."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.vllm.test_facts import record

from rota.base.instant import Duration
from rota.serving.engines.engine import StepTotals
from rota.serving.engines.vllm import facts as facts_module
from rota.serving.engines.vllm.engine import plus, report_of
from rota.serving.engines.vllm.facts import EngineFacts, FactsFile, StepRecord
from rota.serving.engines.vllm.follower import FactsFollower
from rota.serving.model.instance import InstanceId, InstanceLimits

ENGINE = EngineFacts("vLLM", "m", "cpu", "bfloat16", InstanceLimits(num_blocks=7))


def steps_of(found: list[StepRecord | EngineFacts]) -> list[int]:
    return [line.step for line in found if isinstance(line, StepRecord)]


@given(st.lists(st.sampled_from(["append", "flush", "look"]), max_size=60), st.integers(300, 3000))
def test_every_step_is_seen_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, moves: list[str], max_bytes: int
) -> None:
    """Also when the file moves away, as long as it does not move twice between two looks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts_module, "FLUSH_EVERY_NS", 10**18)
        follow(tmp_path_factory.mktemp("facts") / "facts", moves, max_bytes)


def follow(path: Path, moves: list[str], max_bytes: int) -> None:
    follower, facts = FactsFollower(path), FactsFile(path, max_bytes=max_bytes, engine=ENGINE)
    seen: list[int] = []
    step = 0
    for move in [*moves, "flush", "look", "look", "look"]:
        if move == "append":
            facts.append(record(step))
            step += 1
        else:
            if move == "flush":
                facts.flush()
            seen += steps_of(follower.read_new())
    assert seen == list(range(step))
    facts.close()
    follower.close()


def test_an_earlier_run_is_passed_over_and_a_restart_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "facts"
    earlier = FactsFile(path, engine=ENGINE)
    earlier.append(record(1))
    earlier.close()
    follower = FactsFollower(path)
    assert follower.read_new() == []
    again = FactsFile(path, engine=ENGINE)
    again.append(record(0))
    again.flush()
    assert follower.read_new() == [ENGINE, record(0)]
    again.close()
    follower.close()


def test_a_line_is_taken_when_it_is_whole_and_one_that_never_gets_so_is_not(tmp_path: Path) -> None:
    path = tmp_path / "facts"
    follower = FactsFollower(path)
    assert follower.read_new() == []
    line = msgspec.json.encode(record(3))
    with path.open("ab", buffering=0) as file:
        file.write(line[:20])
        assert follower.read_new() == []
        file.write(line[20:] + b"\n")
        assert follower.read_new() == [record(3)]
        file.write(line[:20])  # and here the engine dies
        file.write(msgspec.json.encode(ENGINE) + b"\n" + line + b"\n")
        assert follower.read_new() == [record(3)]
    follower.close()


def test_a_report_is_the_instance_at_the_end_of_the_step() -> None:
    step = msgspec.structs.replace(
        record(1), num_running=3, num_waiting=2, num_finished=1, num_free_blocks=4, num_blocks=9, num_displaced=2
    )
    totals = plus(plus(StepTotals(), step), step)
    report = report_of(InstanceId("a"), step, totals)
    assert (report.num_running, report.num_waiting, report.num_free_blocks, report.num_blocks) == (2, 2, 4, 9)
    assert report.num_preemptions == 4
    assert (totals.num_steps, totals.num_prefill_tokens, totals.step_time) == (2, 6, Duration(2))
    idle = msgspec.structs.replace(step, num_running=1, num_waiting=0)
    assert report_of(InstanceId("a"), idle, totals).num_free_blocks == 9, "nobody is left who could hold blocks"
