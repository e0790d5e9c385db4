"""docs/cli.md is true: every command in it runs, and prints what the page says, but for the numbers."""

import re
import shlex
from pathlib import Path

import pytest
from tests.command_line import rota
from tests.unit.bench.stub import StubServer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
FILE = re.compile(r"^```toml (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SERVER = "http://127.0.0.1:8000"
LEFT_OUT = "…"


def commands() -> list[tuple[str, list[str]]]:
    """Every command of the page, in order, and the lines that it says the command prints."""
    found: list[tuple[str, list[str]]] = []
    for block in CONSOLE.findall(PAGE.read_text(encoding="utf-8")):
        for line in block.splitlines():
            if line.startswith("$ rota "):
                found.append((line.removeprefix("$ rota "), []))
            else:
                found[-1][1].append(line)
    return found


def masked(line: str) -> str:
    """A line without what may change from run to run: numbers, and the spaces that align them."""
    # A hyphen inside a word is no sign: a key may well begin `rota-0`.
    return " ".join(re.sub(r"(?:(?<!\w)[+-])?\d[\d,.]*", "#", line).split())


def is_as_shown(shown: list[str], printed: list[str]) -> bool:
    """Whether the lines agree; `…` alone stands for any lines, and at the end of a line for the rest of it."""
    if not shown:
        return not printed
    head, *rest = shown
    if head.strip() == LEFT_OUT:
        return any(is_as_shown(rest, printed[skipped:]) for skipped in range(len(printed) + 1))
    if not printed:
        return False
    wanted, got = masked(head), masked(printed[0])
    agrees = got.startswith(wanted.removesuffix(LEFT_OUT).rstrip()) if wanted.endswith(LEFT_OUT) else got == wanted
    return agrees and is_as_shown(rest, printed[1:])


def test_every_verb_is_on_the_page_and_in_an_example() -> None:
    from rota.cli.verbs import VERBS

    page = PAGE.read_text(encoding="utf-8")
    assert [verb for verb in VERBS if f"## rota {verb}\n" not in page] == []
    shown = {command.split()[0] for command, _ in commands()}
    # One runs until Ctrl-C and the other needs a live engine; both have tests of their own.
    assert shown == VERBS.keys() - {"serve", "calibrate"}


def test_the_page_does_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in FILE.findall(PAGE.read_text(encoding="utf-8")):
        (tmp_path / name).write_text(content)
    with StubServer() as server:
        for command, shown in commands():
            ran = rota(*shlex.split(command.replace(SERVER, server.url)))
            assert ran.code == 0, f"rota {command}\n{ran.stderr}"
            printed = ran.stdout.splitlines()
            assert is_as_shown(shown, printed), f"rota {command}\n{ran.stdout}"


def test_the_comparison_sees_differences() -> None:
    assert is_as_shown(["a 1", "…", "c"], ["a 22", "b", "b", "c"])
    assert is_as_shown(["a …"], ["a b c"])
    assert is_as_shown(["rota-…", "+1 -2.5"], ["rota-0cZ", "-3 +4"])
    assert not is_as_shown(["a 1"], ["b 1"])
    assert not is_as_shown(["a"], ["a", "b"])
    assert not is_as_shown(["a", "…", "c"], ["a", "b"])
