"""Imports point downward, pure rooms do not reach out, and importing rota costs nothing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = REPOSITORY / "src" / "rota"
PURE = ("base", "serving/model", "serving/api", "serving/instance", "serving/cluster", "serving/policies")
BANNED = ("time", "random", "datetime", "logging", "os", "asyncio", "threading", "socket", "subprocess", "secrets")
SOURCES_OF_CHANCE = re.compile(r"(random|secrets|uuid|numpy\.random)(\..*)?")
MAY_DRAW = {
    "base/random_streams.py": "the one place",
    "runtime/clocks.py": "a live clock starts at a random origin, which no result may depend on",
}
HEAVY = ("numpy", "aiohttp", "plotly", "vllm", "torch", "rich", "typer", "prometheus_client", "uvloop", "asyncio")


def run(*command, **options):
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, **options)


def test_import_contracts_hold():
    lint_imports = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    result = run(sys.executable, "-c", lint_imports, "--no-cache")
    assert result.returncode == 0, result.stdout[-4_000:] + result.stderr[-2_000:]


def ruff(text, name):
    """What ruff says about a file of this text and name."""
    command = (sys.executable, "-m", "ruff", "check", "--select", "TID251", "--output-format", "concise", "--no-cache")
    return run(*command, "--stdin-filename", f"src/rota/{name}", "-", input=text).stdout


def test_pure_rooms_call_nothing_that_is_banned():
    result = run(sys.executable, "-m", "ruff", "check", "--select", "TID251", "--no-cache", "src")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("room", PURE)
def test_the_ban_covers_every_pure_room(room):
    found = ruff("".join(f"import {name}\n" for name in BANNED), f"{room}/planted.py")
    missed = [name for name in BANNED if f"`{name}` is banned" not in found]
    assert not missed, missed


def imported_names(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def draws_chance(text):
    tree = ast.parse(text)
    if any(SOURCES_OF_CHANCE.fullmatch(name) for name in imported_names(tree)):
        return True
    attributes = (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return any(attribute in ("np.random", "numpy.random") for attribute in attributes)


def test_chance_comes_from_one_place():
    for planted in (
        "import random",
        "from random import choice",
        "import numpy as np\nnp.random.rand()",
        "import uuid",
    ):
        assert draws_chance(planted)
    drawing = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if draws_chance(path.read_text(encoding="utf-8"))
    }
    assert drawing == set(MAY_DRAW)


def test_pure_rooms_are_never_suspended():
    suspended = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno}"
        for room in PURE
        for path in sorted((SOURCE / room).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith))
    ]
    assert not suspended, suspended


def loaded_by(*modules):
    script = f"import sys, {', '.join(modules)}; print(' '.join(sorted(sys.modules)))"
    result = run(sys.executable, "-c", script)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_importing_rota_is_light():
    base = [f"rota.base.{path.stem}" for path in (SOURCE / "base").glob("*.py") if path.stem != "__init__"]
    assert not loaded_by("rota", *base).intersection(HEAVY)


def test_listing_policies_loads_none_of_them():
    loaded = loaded_by("rota.serving.policies.order", "rota.serving.policies.dispatch")
    assert not {name for name in loaded if name.startswith("rota.serving.policies.order.")}
    assert not loaded.intersection({"numpy", "vllm", "torch", "plotly"})
