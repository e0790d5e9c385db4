"""Write what the examples are expected to print, after a change that is meant to change it. Read the difference.

python tools/expected.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "examples"
KEPT = ("num_requests", "num_finished", "num_preemptions", "num_steps", "journal_digest")
"""What of a summary stays the same on every machine."""


def stacks() -> list[Path]:
    """The stack files among the examples."""
    return sorted(path for path in EXAMPLES.glob("*.toml") if path.stem != "mixed")


def expected(example: Path) -> Path:
    """Where the expected output of an example stands."""
    return EXAMPLES / "expected" / f"{example.name}.out"


def run(*words: str) -> str:
    """Run Python with these arguments as the README says to, and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    done = subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def played(stack: Path) -> str:
    """What playing the example workload through a stack comes to."""
    trace = str(EXAMPLES / "mixed.toml")
    summary = json.loads(run("-m", "rota.cli.main", "simulate", "--trace", trace, "--stack", str(stack), "--json"))
    return json.dumps({key: summary[key] for key in KEPT}, indent=2) + "\n"


if __name__ == "__main__":
    for script in sorted(EXAMPLES.glob("*.py")):
        expected(script).write_text(run(str(script)))
    for stack in stacks():
        expected(stack).write_text(played(stack))
