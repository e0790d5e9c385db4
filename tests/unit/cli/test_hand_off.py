"""When served vLLMs are given what it takes to hand requests over."""

from pathlib import Path

import pytest

from rota.base.errors import ConfigError
from rota.cli.serve import _hands_off

SOCKETS = [Path("/tmp/a.sock")]


@pytest.fixture(autouse=True)
def nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("os.cpu_count", lambda: 2)


def stack_of(folder: Path, order: str) -> Path:
    path = folder / "stack.toml"
    path.write_text(f'order = "{order}"\n')
    return path


def test_it_is_on_where_it_can_be_unless_told_otherwise(tmp_path: Path) -> None:
    stack = stack_of(tmp_path, "fcfs")
    assert _hands_off(None, True, stack, SOCKETS, 2)
    assert _hands_off(None, True, None, SOCKETS, 2)
    assert not _hands_off(False, True, stack, SOCKETS, 2)


def test_it_is_off_where_it_cannot_be_and_refused_where_it_was_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    displacing = stack_of(tmp_path, "strict_priority")
    cases = [(True, displacing, SOCKETS, 2), (False, None, SOCKETS, 2), (True, None, SOCKETS, 3)]
    cases.append((True, None, [Path("/tmp") / ("x" * 120)], 2))
    for case in cases:
        assert not _hands_off(None, *case)
        with pytest.raises(ConfigError, match="--hand-off"):
            _hands_off(True, *case)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not _hands_off(None, True, None, SOCKETS, 2)
