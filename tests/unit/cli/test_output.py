"""Tables that files and people can read, one JSON object, and progress that keeps out of the way."""

import json
import sys

import pytest

from rota.cli import output
from rota.cli.output import Progress, print_json, print_table, shown


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (True, "yes"), (1_234_567, "1,234,567"), (0.12345, "0.1235"), (12_345.6, "12,346"), ("[x]", "[x]")],
)
def test_values_as_people_read_them(value: object, text: str) -> None:
    assert shown(value) == text


def test_a_table_is_aligned_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name", "count"), [("a [bold]", 5), ("b" * 150, 12_000), ("c", None)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("     5") and "a [bold]" in lines[1]
    assert lines[2] == "b" * 150 + "  12,000"
    assert len({len(line) for line in lines}) == 1


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": 1, "b": float("nan")})
    assert json.loads(capsys.readouterr().out) == {"a": 1, "b": None}


def test_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    with Progress("playing", total=400, unit="requests") as progress:
        for second in range(21):
            now = float(second)
            progress.reached(second * 10)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "playing: 25 % (100 of 400 requests), 30 s left",
        "playing: 50 % (200 of 400 requests), 20 s left",
    ]


def test_short_work_shows_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("playing", total=2, unit="requests") as progress:
        progress.reached(1)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_after_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    now = 0.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    with Progress("playing", total=10, unit="requests") as progress:
        now = 1.9
        progress.reached(3)
        assert terminal.getvalue() == ""
        now = 2.1
        progress.reached(5)
    assert "playing" in terminal.getvalue()
