"""The router's queue in whole simulations."""

import json
from pathlib import Path

import pytest
from tests.command_line import rota

from rota.serving.stack import REGISTRIES

MIXED = Path(__file__).resolve().parents[3] / "examples" / "mixed.toml"


def outcome(folder: Path, stack: str, num_requests: int = 150) -> dict[str, object]:
    (folder / "stack.toml").write_text(stack)
    ran = rota("simulate", "--trace", MIXED, "--num-requests", num_requests, "--instances", 2, "--stack",
               folder / "stack.toml", "--journal", folder / "journal.jsonl", "--json")  # fmt: skip
    assert ran.code == 0, ran.stderr
    assert rota("replay", folder / "journal.jsonl").code == 0
    return json.loads(ran.stdout)


def test_a_queue_that_holds_nobody_changes_nothing(tmp_path: Path) -> None:
    without = outcome(tmp_path, 'order = "fcfs"\n')
    with_queue = outcome(tmp_path, 'order = "fcfs"\n[queue]\nmax_outstanding_per_instance = 100000\n')
    for what in ("num_finished", "ttft_ms", "tpot_ms", "e2e_ms", "num_steps", "num_preemptions", "prefix_hit_rate"):
        assert without[what] == with_queue[what], what


@pytest.mark.parametrize("order", REGISTRIES["order"].names())
def test_whoever_is_held_back_is_served_in_the_end(tmp_path: Path, order: str) -> None:
    rules = "max_outstanding_per_instance = 4\ntimeout_seconds = 100000\n"
    whole = outcome(tmp_path, f'order = "{order}"\n[queue]\n{rules}')
    assert whole["num_finished"] == 150


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("max_outstanding_per_instance = -1", "max_outstanding_per_instance must be at least 0"),
        ("timeout_seconds = 0", "timeout_seconds must be above 0"),
        ("max_hold = 3", "max_hold"),
    ],
)
def test_bad_rules_are_named(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "stack.toml").write_text(f"[queue]\n{line}\n")
    ran = rota("simulate", "--trace", MIXED, "--stack", tmp_path / "stack.toml")
    assert (ran.code, ran.stdout) == (2, "")
    assert says in ran.stderr
    assert "stack.toml" in ran.stderr
