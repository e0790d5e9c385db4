"""Everything in `examples/`, and every command line of the README that needs no engine, runs and says what it is to
say."""

import json
import re
import shlex
from pathlib import Path

import pytest
from tools.expected import EXAMPLES, REPOSITORY, expected, played, run, stacks

ROTA = ("-m", "rota.cli.main")
HINT = "if this is meant, run python tools/expected.py and read the difference"


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_a_script_prints_what_stands_beside_it(script: Path) -> None:
    assert run(str(script)) == expected(script).read_text(), HINT


@pytest.mark.parametrize("stack", stacks(), ids=lambda path: path.name)
def test_a_stack_plays_the_same_every_time(stack: Path) -> None:
    """The digest covers every decision: it changes with the policies, and with nothing else."""
    assert played(stack) == expected(stack).read_text(), HINT


def test_the_stacks_decide_differently() -> None:
    digests = [json.loads(expected(stack).read_text())["journal_digest"] for stack in stacks()]
    assert len(set(digests)) == len(digests)


def test_the_readme_shows_the_example_as_it_is() -> None:
    shown = re.search(r"```python\n# examples/shortest_prompt_first.py\n(.*?)```", readme(), re.DOTALL)
    assert shown is not None
    code = (EXAMPLES / "shortest_prompt_first.py").read_text()
    compact = re.sub(r'""".*?"""|#.*', "", code.replace("sequence", "s"), flags=re.DOTALL)
    for line in shown.group(1).splitlines():
        assert _said(line.partition("  #")[0].strip(), compact), line


def _said(line: str, code: str) -> bool:
    if line.startswith("running_order, displacing"):
        return 'running_order = "admission"' in code and "displacing = False" in code
    return line in code


def test_the_readme_simulates_with_a_policy_of_ones_own(tmp_path: Path) -> None:
    lines = [line.partition("#")[0].strip() for line in readme().splitlines()]
    wanted = [line for line in lines if line.startswith("rota simulate --trace examples/mixed.toml --stack mine.toml")]
    assert len(wanted) == 2, "the README shows our simulator and vLLM's scheduler"
    (tmp_path / "mine.toml").write_text('order = "shortest_prompt_first:ShortestPromptFirst"\n')
    words = shlex.split(wanted[0].replace("mine.toml", str(tmp_path / "mine.toml")))
    assert "requests" in run(*ROTA, *words[1:])


@pytest.mark.slow
def test_a_policy_of_ones_own_decides_alike_on_our_model_and_in_vllm() -> None:
    words = [
        "--trace",
        "examples/mixed.toml",
        "--stack",
        "examples/shortest_prompt_first.toml",
        "--num-requests",
        "200",
    ]
    ours = json.loads(run(*ROTA, "simulate", *words, "--json"))
    theirs = json.loads(run(*ROTA, "simulate", *words, "--json", "--engine", "vllm"))
    assert ours["ttft_ms"] == theirs["ttft_ms"]
    assert ours["e2e_ms"] == theirs["e2e_ms"]
    assert ours["num_steps"] == theirs["num_steps"]
    assert ours["prefix_hit_rate"] == theirs["prefix_hit_rate"]
    assert ours["ttft_ms"]["p99"] > 1_000, "nobody queued: the order did not matter"


def readme() -> str:
    return (REPOSITORY / "README.md").read_text()
