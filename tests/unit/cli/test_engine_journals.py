"""The verbs on the journal that one vLLM instance writes about itself, with no router in it."""

from pathlib import Path

import pytest
from tests.command_line import rota

from rota.base.instant import Instant, milliseconds
from rota.serving.engines.vllm.recorder import StepJournal
from rota.serving.engines.vllm.replay import LoopMachine
from rota.serving.model.capabilities import EVERYTHING
from rota.serving.model.commands import RunStep
from rota.serving.model.events import SequenceAborted, SequenceArrived, StepFinished
from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import Request, RequestId
from rota.serving.stack import StackConfig, engine_policies

LIMITS = InstanceLimits(num_blocks=20, max_num_seqs=4, max_num_batched_tokens=64)
NUM_STEPS = 12


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """What an engine writes that is told of four requests and then steps; one leaves, one ends, memory is short."""
    policies = engine_policies(StackConfig(order="strict_priority"), EVERYTHING, "an engine")
    machine = LoopMachine(LIMITS, order=policies.order, batch=policies.batch, memory=policies.memory)
    stack = tmp_path / "stack.toml"
    stack.write_text('order = "strict_priority"\n')
    path = tmp_path / "engine.jsonl"
    written = StepJournal(path, LIMITS, str(stack))
    for number in range(4):
        fact = Request(RequestId(f"r-{number}"), Instant(0), 100, 50, priority=-number)
        machine.handle(SequenceArrived(fact), Instant(0))
        written.arrived(fact, 0)
    for step in range(NUM_STEPS):
        now = Instant(milliseconds(10 * step))
        (command,) = machine.expire(now)
        assert isinstance(command, RunStep)
        written.step(command.step_id, dict(command.grants), command.preempted, command.num_free_blocks, now)
        finished = (RequestId("r-3"),) if step == 8 else ()
        machine.handle(StepFinished(command.step_id, finished), Instant(now + 5))
        written.finished(command.step_id, finished, now + 5)
        if step == 10:
            machine.handle(SequenceAborted(RequestId("r-1")), Instant(now + 6))
            written.aborted("r-1", now + 6)
    written.close()
    return path


def test_it_replays(journal: Path) -> None:
    ran = rota("replay", journal)
    assert (ran.code, ran.stdout) == (0, f"{4 + 2 * NUM_STEPS + 1} rows, identical\n"), ran.stderr


def test_a_difference_in_it_is_found(journal: Path) -> None:
    changed = journal.read_text().replace('"step_id":2,"grants":[["r-3"', '"step_id":2,"grants":[["r-0"')
    journal.write_text(changed)
    assert rota("replay", journal).code == 1


def test_it_explains_without_a_router(journal: Path) -> None:
    ended = rota("explain", journal, "r-3").stdout
    assert ended.startswith("r-3: finished; class -3, ")
    assert "queued at instance: 3 waited and 0 ran there" in ended
    assert rota("explain", journal, "r-1").stdout.startswith("r-1: aborted; ")
    assert rota("explain", journal, "r-0").stdout.startswith("r-0: unfinished; ")


def test_it_exports(journal: Path, tmp_path: Path) -> None:
    assert rota("export", journal, "--csv", tmp_path / "t.csv").code == 0
    assert (tmp_path / "t.csv").read_text().count("\nspan,instance,steps,") == NUM_STEPS
