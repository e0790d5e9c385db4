"""Bugs that were there once, or nearly, put back one at a time: for each the tests that own it must go red.

A bug is a change of the source text, made in a copy. If the text is no longer there the case fails: then the code has
moved on, and the bug must be written anew or struck off.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
CASES = "tests/machines/test_instance_cases.py"
LAWS = "tests/unit/policies/test_laws.py"
BY_HAND = "tests/theory/test_by_hand.py"
WORLD = "tests/worlds/test_simulated_cluster.py"
LEAPS = "tests/gates/test_leaps.py"

BUGS = {
    "a capped prefill is thought to take the whole budget": (
        "instance/displacement.py",
        "limits.long_prefill_token_threshold or token_budget",
        "token_budget",
        CASES,
    ),
    "victims are taken from the end of admission, not of the line": (
        "instance/displacement.py",
        "    line = _line(view, order, running)\n    # Whoever",
        "    line = running\n    # Whoever",
        CASES,
    ),
    "blocks that a starter shares with the leaving are counted free": (
        "instance/ledger.py",
        "hit.num_evictable + num_shared",
        "hit.num_evictable",
        CASES,
    ),
    "equals displace each other": (
        "policies/order/strict_priority.py",
        "return self._class(view, waiting) < self._class(view, running)",
        "return self._class(view, waiting) <= self._class(view, running)",
        LAWS,
    ),
    "who preempts itself holds up those behind": (
        "instance/draft.py",
        "return Refusal.NOT_PENDING\n            ledger.extend",
        "return Refusal.NO_MEMORY\n            ledger.extend",
        CASES,
    ),
    "a block just shared loses its filler": (
        "instance/draft.py",
        " and not (self.admitted and own(sequence).granted)",
        "",
        CASES,
    ),
    "a step that preempted for memory admits all the same": (
        "api/admitting.py",
        "if draft.num_preempted or not draft.token_budget",
        "if not draft.token_budget",
        LAWS,
    ),
    "prefills stand ahead of decodes in the line": (
        "policies/batch/passes.py",
        "        draft.line_up(line)\n        granted",
        "        draft.line_up(prefills + decodes)\n        granted",
        CASES,
    ),
    "chunks ahead of decodes": (
        "policies/batch/passes.py",
        "        line = decodes + prefills",
        "        line = prefills + decodes",
        LAWS,
    ),
    "ageing is leapt over": (
        "instance/steady.py",
        'getattr(order, "repeatable", False)',
        "True",
        CASES,
    ),
    "a run that is cut short ends a step early": (
        "sim/instance.py",
        "flight.ends = flight.ends[: num_ended + 1]",
        "flight.ends = flight.ends[: max(num_ended, 1)]",
        LEAPS,
    ),
    "the steady pass cuts a prefill that stands before decodes": (
        "instance/steady.py",
        "comes_last = line[num_decodes:] == apart",
        "comes_last = True",
        "tests/unit/policies/test_conformance.py",
    ),
    "arrivals come before the step that ends at their instant": (
        "sim/instance.py",
        "RANK_STEP = 0",
        "RANK_STEP = 2",
        BY_HAND,
    ),
    "the last token needs a cache that was never computed": (
        "instance/ledger.py",
        "limit = (num_tokens - 1) // self.block_size\n        last",
        "limit = num_tokens // self.block_size\n        last",
        BY_HAND,
    ),
    "a dead engine keeps its blocks": (
        "sim/instance.py",
        "            self._loop.deliver(self.name, SequenceAborted(one.request_id))\n        return lost",
        "            pass\n        return lost",
        WORLD,
    ),
    "requests that die with their engine are forgotten": (
        "sim/cluster.py",
        '        self._fail_attempt(lost.request_id, instance_id, f"instance {instance_id} crashed"',
        '        print(lost.request_id, instance_id, f"instance {instance_id} crashed"',
        WORLD,
    ),
    "the truth of ended requests is kept": (
        "sim/cluster.py",
        "        self._truth.forget(request_id)\n",
        "",
        WORLD,
    ),
}


def run(source, tests):
    words = [str(REPOSITORY / word) if word.startswith("tests/") else word for word in tests.split()]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        *words,
    ]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def copied(tmp_path):
    source = tmp_path / "src"
    shutil.copytree(REPOSITORY / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
    return source


@pytest.mark.parametrize("bug", BUGS)
def test_the_suite_goes_red(copied, bug):
    file, text, planted, tests = BUGS[bug]
    path = copied / "rota" / "serving" / file
    source = path.read_text(encoding="utf-8")
    assert source.count(text) == 1, f"{file}: the text to spoil is there {source.count(text)} times"
    path.write_text(source.replace(text, planted), encoding="utf-8")
    done = run(copied, tests)
    assert done.returncode == 1, f"no test noticed: {bug}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def test_an_unspoilt_copy_is_green(copied):
    assert run(copied, f"{CASES} {BY_HAND}").returncode == 0
