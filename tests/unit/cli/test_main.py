"""Every way out of a command line: exit codes, one voice, and never a traceback."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.command_line import rota

from rota import __version__
from rota.base.errors import (
    CapabilityError,
    ConfigError,
    DataError,
    EngineError,
    LawBroken,
    PolicyError,
    RotaError,
    StarvationError,
)
from rota.cli import verbs
from rota.cli.verbs import VERBS, Verb

raised: BaseException | None = None
"""What the planted verb raises."""


def planted(number: int = 0) -> None:
    """A verb that fails as it is told to."""
    if raised is not None:
        raise raised


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def plant(error: BaseException) -> None:
        monkeypatch.setitem(verbs.VERBS, "planted", Verb(f"{__name__}:planted", "fail"))
        monkeypatch.setitem(sys.modules, __name__, sys.modules[planted.__module__])
        monkeypatch.setattr(sys.modules[planted.__module__], "raised", error)

    return plant


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("stack.toml:3: order: unknown key", hint="did you mean 'order'?"), 2),
        (DataError("trace.csv:7:1: TIMESTAMP: missing"), 2),
        (CapabilityError("it cannot"), 2),
        (EngineError("it died"), 1),
        (LawBroken("law 3 does not hold"), 1),
        (PolicyError("the policy raised"), 1),
        (StarvationError("r-1 starves"), 1),
        (RotaError("something"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_are_an_error_line_and_a_hint(failing, error: RotaError, code: int) -> None:
    failing(error)
    ran = rota("planted")
    hint = f"hint: {error.hint}\n" if error.hint else ""
    assert ran == (code, "", f"error: {error.message}\n{hint}")


def test_notes_of_an_error_are_told(failing) -> None:
    error = LawBroken("law 5: time went back")
    error.add_note("while replaying row 7")
    failing(error)
    assert rota("planted").stderr == "error: law 5: time went back\nwhile replaying row 7\n"


def test_an_interrupt_is_one_line(failing) -> None:
    failing(KeyboardInterrupt())
    assert rota("planted") == (130, "", "interrupted\n")


def test_a_bug_is_one_line_and_a_file(failing) -> None:
    failing(ZeroDivisionError("by\nnothing"))
    ran = rota("planted", "--number", "3")
    assert ran.code == 70
    first, second = ran.stderr.splitlines()
    assert first.startswith("error: internal error ZeroDivisionError (by nothing); its traceback is in ")
    assert second.startswith("hint: ")
    path = Path(first.rpartition(" ")[2])
    written = path.read_text()
    path.unlink()
    assert "Traceback (most recent call last)" in written
    assert "'--number', '3'" in written


def test_a_reader_that_leaves_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "rota.cli.main", "policies"]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


def test_version_and_help() -> None:
    assert rota("--version") == (0, f"rota {__version__}\n", "")
    ran = rota("--help")
    assert (ran.code, ran.stderr) == (0, "")
    assert [line.split()[0] for line in ran.stdout.splitlines() if re.match(r"  [a-z]", line)][: len(VERBS)] == [*VERBS]
    assert rota("-h") == ran
    assert rota() == (2, ran.stdout, "")


def test_help_loads_no_verb_and_nothing_heavy() -> None:
    script = "import sys; from rota.cli.main import main; main(['--help']); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.splitlines()[-1].split())
    assert not loaded & {"typer", "rich", "numpy", "aiohttp", "plotly", "asyncio", "vllm", "torch"}
    assert not {name for name in loaded if name.startswith("rota.serving")}


ALL_VERBS = {name: verb for name, verb in VERBS.items() if not verb.parts} | {
    f"{word} {name}": part for word, verb in VERBS.items() for name, part in verb.parts.items()
}


@pytest.mark.parametrize("verb", sorted(ALL_VERBS))
def test_every_verb_has_help_and_json(verb: str) -> None:
    ran = rota(*verb.split(), "--help")
    assert (ran.code, ran.stderr) == (0, "")
    assert "--json" in ran.stdout
    assert f"rota {verb}" in ran.stdout
    assert not ALL_VERBS[verb].summary.endswith(".")


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_of_a_verb_loads_nothing_heavy(verb: str) -> None:
    script = f"import sys; from rota.cli.main import main; main(['{verb}', '--help']); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.splitlines()[-1].split())
    assert not loaded & {"numpy", "plotly", "vllm", "torch", "aiohttp"}


def test_colour_is_for_terminals_and_not_under_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rota.cli import output

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for no_color, is_coloured in ((None, True), ("1", False)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        if no_color:
            monkeypatch.setenv("NO_COLOR", no_color)
        output.print_error("no", "yes")
        assert ("\x1b[" in terminal.getvalue()) == is_coloured
