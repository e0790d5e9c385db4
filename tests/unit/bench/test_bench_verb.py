"""`rota bench` from its flags to its tables."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from tests.command_line import rota
from tests.unit.bench.stub import StubServer


@pytest.fixture
def server():  # type: ignore[no-untyped-def]
    with StubServer() as stub:
        yield stub


def test_a_run_at_a_rate(server: StubServer) -> None:
    flags = ("--rate", 200, "--num-requests", 30, "--num-warmups", 5, "--slo", "ttft=10000", "--tenant", "a", "--json")
    ran = rota("bench", server.url, *flags, "--class", "name=high,share=1,priority=-1", "--class", "name=low,share=2")
    assert ran.code == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert (told["num_requests"], told["num_finished"], told["model"]) == (25, 25, "ok")
    assert told["slo_attainment"] == 1.0
    assert set(told["by_class"]) == {"high", "low"}
    assert list(told["by_tenant"]) == ["a"]
    assert "without --tokenizer a word counts as a token" in ran.stderr
    assert len(server.heard) == 30


def test_the_same_seed_sends_the_same(server: StubServer) -> None:
    bodies = []
    for seed in (1, 1, 2):
        server.heard.clear()
        rota("bench", server.url, "--rate", 100, "--num-requests", 8, "--seed", seed, "--prompt-tokens", "0=4,1=40")
        bodies.append(sorted(body["messages"][0]["content"] for _, body in server.heard))
    assert bodies[0] == bodies[1] != bodies[2]


def test_a_trace_with_caps(server: StubServer, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:00:00.0000000,500,7\n2023-11-16 18:00:01.0000000,3,900\n"
    )
    flags = ("--trace", trace, "--speedup", 50, "--prompt-tokens", 20, "--max-tokens", 100, "--api", "completions")
    ran = rota("bench", server.url, *flags, "--model", "ok", "--json")
    assert ran.code == 0, ran.stderr
    bodies = sorted((len(body["prompt"].split(" ")), body["max_tokens"]) for _, body in server.heard)
    assert bodies == [(3, 100), (20, 7)]
    assert json.loads(ran.stdout)["offered_rps"] == pytest.approx(50)


def test_tables_show_errors(server: StubServer) -> None:
    ran = rota("bench", server.url, "--rate", 100, "--num-requests", 4, "--model", "status_503")
    assert ran.code == 1
    assert "status 503" in ran.stdout
    assert "error: none of 4 requests was answered; the first: status 503" in ran.stderr


def test_a_server_that_does_not_count_is_told(server: StubServer) -> None:
    ran = rota("bench", server.url, "--rate", 100, "--num-requests", 4, "--model", "no_usage")
    assert ran.code == 0
    assert "a chunk counts as one" in ran.stderr
    for name in ("ttft, from its moment", "ttft, from sending", "tpot", "itl", "offered /s", "schedule lag ms"):
        assert name in ran.stdout


def test_an_interrupt_prints_what_was_measured() -> None:
    with StubServer(delay_seconds=0.05) as server:

        def interrupt() -> None:
            # By the clock it would come before the first answer on a busy machine.
            give_up_at = time.monotonic() + 60
            while len(server.heard) < 40 and time.monotonic() < give_up_at:
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        ran = rota("bench", server.url, "--rate", 20, "--num-requests", 100_000, "--json")
        thread.join()
    told = json.loads(ran.stdout)
    assert ran.code == 130
    assert told["is_interrupted"] is True
    assert told["num_finished"] >= 1
    assert "Traceback" not in ran.stderr
