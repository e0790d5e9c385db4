"""What the command line prints, letter for letter: exit code, stdout and stderr.

To accept what it prints now: `ROTA_UPDATE_GOLDEN=1 python -m pytest tests/golden`, then read the diff.
"""

import os
from pathlib import Path

import pytest
from tests.command_line import rota, write_journal

FOLDER = Path(__file__).parent / "cli"
COMMANDS = {
    "help": "--help",
    "version": "--version",
    "policies-round-robin": "policies round_robin",
    "replay": "replay run.jsonl",
    "explain-a-displaced-request": "explain run.jsonl r-8",
    "explain-a-retried-request": "explain run.jsonl r-21",
    "unknown-verb": "explian run.jsonl r-8",
    "unknown-flag": "policies --jsn",
    "unknown-request": "explain run.jsonl r-800",
    "unknown-policy": "policies roundrobin",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden")
    write_journal(path / "run.jsonl")
    return path


@pytest.mark.parametrize("name", COMMANDS)
def test_output_is_as_it_was(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    command = COMMANDS[name]
    ran = rota(*command.split())
    got = f"$ rota {command}\n--- exit code {ran.code}\n--- stdout\n{ran.stdout}--- stderr\n{ran.stderr}"
    path = FOLDER / f"{name}.txt"
    if os.environ.get("ROTA_UPDATE_GOLDEN"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(got, encoding="utf-8")
    assert path.exists(), f"{path} is absent; see the top of this file"
    assert got == path.read_text(encoding="utf-8")


def test_every_snapshot_has_its_command() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(COMMANDS)
