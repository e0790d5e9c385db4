"""Real tokens: stock vLLM, vLLM with our plug-in, and the same under preemption and displacement.

Each run is a process of its own over the same script of arrivals (`vllm_tokens.py`), greedily, on too few
blocks."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import pytest
from tests.live.vllm_tokens import AGEING_SECONDS, LOW

from rota.base.journal import read_journal
from rota.base.replay import replay
from rota.serving.engines.model_package import prepare_model
from rota.serving.engines.vllm.facts import read_facts
from rota.serving.engines.vllm.hosting import VLLM_CAPABILITIES
from rota.serving.engines.vllm.recorder import MACHINE
from rota.serving.engines.vllm.replay import ROW_TYPES, fresh_machine, stack_of
from rota.serving.stack import StackConfig, engine_policies
from rota.testing.fairness import live_gap

pytestmark = pytest.mark.live

SCRIPT = Path(__file__).with_name("vllm_tokens.py")
TIMEOUT_SECONDS = 900.0


def run(
    folder: Path,
    *,
    dtype: str,
    plugin: dict[str, str] | None,
    alone: bool = False,
    backlogs: Sequence[dict[str, str]] = (),
    crowded_out: Mapping[str, dict[str, str]] = MappingProxyType({}),
) -> dict[str, Any]:
    """The tokens of one engine: `together`, `late` (some arrive while others run, and outrank them), `alone`. With
    `backlogs`, no tokens: an engine for each of these plug-ins, one after the other, with a backlog of three
    tenants. With `crowded_out`, who was served when, by the plug-in's name, where one of a low class meets a crowd."""
    spec = {"model": str(prepare_model()), "dtype": dtype, "plugin": plugin, "late": True, "alone": alone}
    spec |= {"backlogs": backlogs, "crowded_out": dict(crowded_out)}
    out, log = folder / "tokens.json", folder / "log"
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), json.dumps(spec), str(out)],
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    assert done.returncode == 0, log.read_text()[-4000:]
    tokens: dict[str, Any] = json.loads(out.read_text())
    return tokens


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Stock vLLM by dtype, each run once."""
    return cache(lambda dtype: run(tmp_path_factory.mktemp("stock"), dtype=dtype, plugin=None, alone=True))


def writing_to(folder: Path, stack: str) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    (folder / "stack.toml").write_text(stack)
    return {"stack": str(folder / "stack.toml"), "facts": str(folder / "facts"), "journal": str(folder / "journal")}


def test_fcfs_gives_the_tokens_of_stock_vllm(stock: Any, tmp_path: Path) -> None:
    expected = stock("bfloat16")
    tokens = run(tmp_path, dtype="bfloat16", plugin={"facts": str(tmp_path / "facts")})
    assert tokens["together"] == expected["together"]
    assert tokens["late"] == expected["late"]
    assert sum(record.num_preempted for record in read_facts(tmp_path / "facts")) > 5


QUANTUM_TOKENS = 64.0
ORDERS = {
    "fcfs": 'order = "fcfs"\n',
    "fair_tokens": 'order = "fair_tokens"\n',
    "fair_prefix": f'order = "fair_prefix"\n[parameters.order]\nquantum_tokens = {QUANTUM_TOKENS}\n',
    # Plain longest prefix first: nobody's credit is ever spent.
    "longest_prefix": 'order = "fair_prefix"\n[parameters.order]\nquantum_tokens = 1e9\n',
}


def test_tenants_of_a_live_vllm_stay_within_the_published_bounds(tmp_path: Path) -> None:
    """Law 16, on the steps that vLLM ran: the same requests of three tenants, before the same steps, in each order."""
    plugins = {name: writing_to(tmp_path / name, stack) for name, stack in ORDERS.items()}
    run(tmp_path, dtype="bfloat16", plugin=None, backlogs=list(plugins.values()))
    served = {name: live_gap(tmp_path / name / "journal") for name in ("fair_tokens", "fcfs")}
    computed = {
        name: live_gap(tmp_path / name / "journal", quantum_tokens=QUANTUM_TOKENS)
        for name in ("fair_prefix", "fcfs", "longest_prefix")
    }
    for fair, gaps in (("fair_tokens", served), ("fair_prefix", computed)):
        for name, (gap, bound) in gaps.items():
            assert (gap.service <= bound) == (name == fair), (name, gap, bound)
        # Two who never waited at once would keep any bound.
        assert gaps[fair][0].num_steps > 20, gaps


def test_ageing_bounds_how_long_a_live_vllm_crowds_out_a_low_class(tmp_path: Path) -> None:
    """From `ageing_seconds` after its arrival on, nobody of a higher class who arrives later is served before it;
    without ageing all of them are."""
    ageing = f'order = "strict_priority"\n[parameters.order]\nageing_seconds = {AGEING_SECONDS}\n'
    stacks = {"ageing": ageing, "never": 'order = "strict_priority"\n'}
    plugins = {name: writing_to(tmp_path / name, stack) for name, stack in stacks.items()}
    found = run(tmp_path, dtype="bfloat16", plugin=None, crowded_out=plugins)
    overtaking = {}
    for name, each in found.items():
        step_of = {request: step for step, served in enumerate(each["served"]) for request in served}
        assert len(each["later"]) >= 10
        overtaking[name] = [request for request in each["later"] if step_of[request] < step_of[LOW]]
    assert overtaking["ageing"] == []
    assert overtaking["never"] == found["never"]["later"]


def test_the_make_up_of_a_batch_changes_the_tokens_of_stock_vllm_in_bfloat16_only(stock: Any) -> None:
    """Why the next test needs float32: who shares a batch with whom already changes what stock vLLM answers."""

    def differing(tokens: dict[str, Any]) -> list[str]:
        return [name for name in tokens["together"] if tokens["together"][name] != tokens["alone"][name]]

    assert differing(stock("float32")) == []
    assert differing(stock("bfloat16")) != []


def test_strict_priority_keeps_tokens_steps_and_blocks_in_order_under_preemption(stock: Any, tmp_path: Path) -> None:
    tokens = run(tmp_path, dtype="float32", plugin=writing_to(tmp_path, 'order = "strict_priority"\n'))

    # No token is lost, doubled or changed by being preempted or displaced.
    expected = stock("float32")
    assert tokens["together"] == expected["together"]
    assert tokens["late"] == expected["late"]

    facts = read_facts(tmp_path / "facts")
    assert sum(record.num_preempted for record in facts) > 5
    assert sum(record.num_displaced for record in facts) > 0
    assert sum(record.num_cached_tokens for record in facts) > 0
    assert all(record.num_free_blocks <= record.num_blocks and record.decision_ns < record.step_ns for record in facts)
    assert sum(record.num_finished for record in facts) == len(tokens["together"]) + len(tokens["late"])

    # The live journal, replayed into a fresh machine, yields the same commands.
    journal = read_journal(tmp_path / "journal", ROW_TYPES)
    config = msgspec.convert(tomllib.loads(stack_of(journal.header)), StackConfig)
    machine = fresh_machine(journal.header, engine_policies(config, VLLM_CAPABILITIES, "vLLM"))
    rows = list(journal)
    assert journal.end is not None
    assert sum(len(command.preempted) for row in rows for command in row.commands) > 5
    difference = replay(rows, {MACHINE: machine})
    assert difference is None, str(difference)
    machine.check()
    assert machine.unfinished() == []
