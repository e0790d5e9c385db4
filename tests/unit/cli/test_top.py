"""`rota top` on journals, whole and growing, in a terminal, and on a router."""

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from tests.command_line import rota, write_journal

from rota.base.errors import DataError
from rota.cli.journals import open_journal
from rota.serving.model.events import ClientLeft, RequestArrived, RequestFinished
from rota.testing.router import running_router

ROTA = (sys.executable, "-m", "rota.cli.main")


def test_a_journal_shows_the_picture_after_its_last_row(tmp_path: Path) -> None:
    write_journal(tmp_path / "journal.jsonl")
    shown = json.loads(rota("top", tmp_path / "journal.jsonl", "--json").stdout)
    events = [type(row.event) for row in open_journal(tmp_path / "journal.jsonl") if row.machine == "cluster"]
    assert shown["num_unfinished"] == 0
    assert shown["num_finished"] == events.count(RequestFinished) > 40
    assert shown["num_finished"] + events.count(ClientLeft) + shown["num_failed"] == events.count(RequestArrived) == 60
    assert [each["id"] for each in shown["instances"]] == ["i0", "i1"]
    assert all(each["step_ms"] > 0 for each in shown["instances"])
    table = rota("top", tmp_path / "journal.jsonl")
    assert (table.code, table.stderr) == (0, "")
    for word in ("instances", "tenants", "classes", "i0", f"{shown['num_finished']:,}"):
        assert word in table.stdout


def test_a_journal_is_followed_as_it_grows_and_read_to_the_byte(tmp_path: Path) -> None:
    write_journal(tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    growing = tmp_path / "growing.jsonl"
    growing.write_bytes(lines[0])
    rows = open_journal(growing).follow()
    assert next(rows) is None
    heard = []
    for line in lines[1:-1]:
        with growing.open("ab") as file:
            file.write(line[:10])
            file.flush()
            assert next(rows) is None, "half a line is not told"
            file.write(line[10:])
        heard.append(next(rows))
        assert next(rows) is None
    assert heard == list(open_journal(tmp_path / "whole.jsonl"))
    with growing.open("ab") as file:
        file.write(lines[-1])
    with pytest.raises(StopIteration):
        next(rows)
    with growing.open("ab") as file:
        file.write(lines[1])
    with pytest.raises(DataError, match="a line after the end mark"):
        list(open_journal(growing).follow())


def test_a_terminal_is_drawn_anew_until_ctrl_c(tmp_path: Path) -> None:
    write_journal(tmp_path / "journal.jsonl")
    ours, theirs = pty.openpty()
    words = [*ROTA, "top", str(tmp_path / "journal.jsonl"), "--every", "0.1"]
    process = subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "140"}
    )
    os.close(theirs)
    drawn = b""
    deadline = time.monotonic() + 60
    while drawn.count(b"over; Ctrl-C leaves") < 3 and time.monotonic() < deadline:
        drawn += os.read(ours, 65536)
    process.send_signal(signal.SIGINT)
    reading = threading.Thread(target=lambda: _rest(ours), daemon=True)
    reading.start()
    assert process.wait(30) == 130
    assert drawn.count(b"instances") >= 3
    assert b"i1" in drawn
    assert b"Traceback" not in drawn


def _rest(terminal: int) -> None:
    try:
        while os.read(terminal, 65536):
            pass
    except OSError:
        pass


def test_a_journal_can_be_seen_as_the_page_of_a_router(tmp_path: Path) -> None:
    write_journal(tmp_path / "journal.jsonl")
    words = [*ROTA, "top", str(tmp_path / "journal.jsonl"), "--ui", "0"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    url = process.stderr.readline().split()[0]
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert b"<title>Rota</title>" in answer.read()
    with urllib.request.urlopen(url + "/state", timeout=10) as answer:
        assert json.load(answer)["num_finished"] > 0
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(url + "/other", timeout=10)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


@pytest.mark.asyncio
async def test_a_router_shows_what_its_page_shows() -> None:
    async with running_router() as running:
        ran = await asyncio.to_thread(rota, "top", running.url + "/v1", "--json")
    assert [each["id"] for each in json.loads(ran.stdout)["instances"]] == ["sim-0", "sim-1"]


@pytest.mark.parametrize(
    ("words", "says", "hint"),
    [
        (["http://127.0.0.1:9"], "error: http://127.0.0.1:9/ui/state is not reached", "rota serve"),
        (["/nowhere.jsonl"], "error: /nowhere.jsonl: the journal cannot be read", ""),
        (["http://127.0.0.1:9", "--ui", "0"], "error: --ui: this is for journals", "/ui"),
        (["/nowhere.jsonl", "--ui", "70000"], "error: --ui: must be from 0 to 65535", ""),
        (["/nowhere.jsonl", "--every", "0"], "error: --every", ""),
    ],
)
def test_what_cannot_be_looked_at_is_named(words: list[str], says: str, hint: str) -> None:
    ran = rota("top", *words)
    assert ran.code in (1, 2)
    assert ran.stdout == ""
    assert says in ran.stderr
    assert hint in ran.stderr
