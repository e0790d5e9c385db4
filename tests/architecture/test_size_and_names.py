"""Files stay readable in one sitting, functions on one screen, and names say what a thing is."""

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = REPOSITORY / "src" / "rota"
FOLDERS = [REPOSITORY / name for name in ("src", "tests", "examples", "benchmarks", "docs", "scripts")]

MAX_LINES_IN_A_FILE = 500
MAX_LINES_IN_A_FUNCTION = 70
VAGUE = re.compile(r"manager|helper|util", re.IGNORECASE)


def python_files(*folders):
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def too_long(text, limit=MAX_LINES_IN_A_FUNCTION):
    return [
        f"{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= limit
    ]


def vague_names(text):
    names = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)}
    return sorted(name for name in names if VAGUE.search(name))


def test_files_are_short():
    long = {
        str(path.relative_to(REPOSITORY)): num_lines
        for path in python_files(*FOLDERS)
        if (num_lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES_IN_A_FILE
    }
    assert not long, f"more than {MAX_LINES_IN_A_FILE} lines, find the seam: {long}"


def test_functions_are_short():
    assert too_long("def f():\n" + "    x = 1\n" * 70) == ["1: f has 71 lines"]
    assert too_long("async def f():\n" + "    x = 1\n" * 69) == []
    long = [
        f"{path.relative_to(REPOSITORY)}:{line}"
        for path in python_files(*FOLDERS)
        for line in too_long(path.read_text(encoding="utf-8"))
    ]
    assert not long, long


def test_no_name_is_vague():
    assert vague_names("class PoolManager: pass\nclass Pool: pass") == ["PoolManager"]
    vague = [str(path.relative_to(REPOSITORY)) for path in python_files(*FOLDERS) if VAGUE.search(path.stem)]
    vague += [
        f"{path.relative_to(REPOSITORY)}: {name}"
        for path in python_files(SOURCE)
        for name in vague_names(path.read_text(encoding="utf-8"))
    ]
    assert not vague, vague
