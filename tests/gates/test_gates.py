"""Equal worlds: what the machines decide depends on what they were told, and on nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.gates.world import STACKS, play, system

from rota.base.instant import Duration, Instant, seconds
from rota.base.journal import Row
from rota.base.machine import Machine
from rota.base.replay import first_difference, replay
from rota.serving.assemble import CLUSTER, build, build_instance
from rota.serving.stack import StackConfig

REPOSITORY = Path(__file__).parents[2]
SHIFT = Duration(seconds(987.654321) * 1_000)

LEAKS = {
    name: StackConfig(order=f"tests.gates.leaks:{name}")
    for name in ("ReadsTheClock", "ComparesWithAConstant", "DrawsUnseeded", "WalksASet")
}


def replayed(stack: StackConfig, rows: list[Row]) -> object:
    """The first difference between a journal and what fresh machines say to its events."""
    config = system(stack)
    machines: dict[str, Machine] = dict(build(config).by_name())
    specs = {spec.id: spec for spec in config.instances}
    for name in {row.machine for row in rows} - machines.keys():
        instance_id = name.removeprefix("instance/").partition("#")[0]
        machines[name] = build_instance(stack, specs[instance_id])  # type: ignore[index]
    return replay(rows, machines)


def shifted(stack: StackConfig) -> object:
    """The first difference between a run and the same run at another time."""
    _, journal = play(system(stack))
    _, later = play(system(stack), Instant(SHIFT))
    return first_difference(journal.rows, later.rows, shift=SHIFT)


def digest_in_another_process(stack_name: str, hash_seed: int) -> str:
    program = (
        "import sys; from tests.gates.test_gates import LEAKS; from tests.gates.world import STACKS, play, system; "
        "print(play(system({**STACKS, **LEAKS}[sys.argv[1]]))[1].digest)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, stack_name],
        env={
            **os.environ,
            "PYTHONHASHSEED": str(hash_seed),
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'src'}",
        },
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("stack", STACKS)
def test_a_journal_replayed_into_fresh_machines_gives_the_same_commands(stack: str) -> None:
    _, journal = play(system(STACKS[stack]))
    rows = journal.rows
    assert {CLUSTER, "instance/a", "instance/a#1", "instance/b"} == {row.machine for row in rows}
    assert replayed(STACKS[stack], rows) is None


@pytest.mark.parametrize("stack", STACKS)
def test_a_run_at_another_time_gives_the_same_commands(stack: str) -> None:
    assert shifted(STACKS[stack]) is None


@pytest.mark.parametrize("stack", ["strict_priority", "prefill_first, power_of_two"])
def test_two_processes_with_different_hash_seeds_agree(stack: str) -> None:
    assert digest_in_another_process(stack, 1) == digest_in_another_process(stack, 2)


@pytest.mark.parametrize("stack", STACKS)
def test_leaping_over_steps_equals_taking_them_one_by_one(stack: str) -> None:
    leaping, journal = play(system(STACKS[stack]))
    stepping, other = play(system(STACKS[stack]), leap=False)
    assert leaping.records == stepping.records
    assert [machine.statistics() for machine in leaping.machines()] == [
        machine.statistics() for machine in stepping.machines()
    ]
    assert journal.digest == other.digest


@pytest.mark.parametrize("leak", ["ReadsTheClock", "DrawsUnseeded"])
def test_replay_catches(leak: str) -> None:
    _, journal = play(system(LEAKS[leak]))
    assert replayed(LEAKS[leak], journal.rows) is not None


@pytest.mark.parametrize("leak", ["ComparesWithAConstant", "ReadsTheClock", "DrawsUnseeded"])
def test_the_shift_in_time_catches(leak: str) -> None:
    assert shifted(LEAKS[leak]) is not None


@pytest.mark.parametrize("leak", ["WalksASet", "DrawsUnseeded"])
def test_two_processes_catch(leak: str) -> None:
    assert digest_in_another_process(leak, 1) != digest_in_another_process(leak, 2)
