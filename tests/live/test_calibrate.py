"""`rota calibrate` on a real vLLM: a profile that simulates, and an interrupt that leaves nothing behind."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rota.serving.calibration.collect import records_of
from rota.serving.engines.model_package import prepare_model
from rota.serving.predictors.step_time.profiles import load_profile
from rota.testing.step_time import check_step_time

pytestmark = pytest.mark.live

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00,50,3\n2023-11-16 18:00:01,60,9\n"


def calibrate(folder: Path, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "rota.cli.main", "calibrate", "-o", str(folder / "p.toml"), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def started(folder: Path, seconds: str) -> "subprocess.Popen[str]":
    options = ("--engine-option", "max_num_seqs=8", "--engine-option", "max_model_len=1024")
    model = ("--model", str(prepare_model()), "--cores", "0")
    return calibrate(folder, "--engine", "vllm", *model, *options, "--duration", seconds, "--json")


def test_a_live_engine_becomes_a_profile_that_simulates(tmp_path: Path) -> None:
    process = started(tmp_path, "60")
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    said = json.loads(out)["calibration"]
    assert said["engine"] == "vLLM 0.32.0"
    assert said["device"] == "cpu"
    assert said["limits"]["max_num_seqs"] == 8
    assert said["limits"]["max_model_len"] == 1024
    assert said["front_end"]["request_ms"] > 0
    assert said["cpu_mape"] is not None
    assert {"decode", "all"} <= {each["phase"] for each in said["errors"]}
    assert said["num_held_out"] > 0

    profile = load_profile(str(tmp_path / "p.toml"))
    assert profile.capacity_differences() == []
    check_step_time(profile.predictor())
    records = records_of(tmp_path / "p.facts.jsonl")
    assert len(records) == said["num_steps"] + said["num_held_out"]
    assert max(record.num_decodes for record in records) > 4
    assert any(context for record in records for _, context in record.prefills), "no prefill with context"
    assert all((record.cpu_ns or 0) > 0 for record in records)
    assert not (tmp_path / "p.engine.jsonl").exists()

    # The same steps once more, without an engine: the same model of them.
    (tmp_path / "again").mkdir()
    again = calibrate(tmp_path / "again", "--facts", str(tmp_path / "p.facts.jsonl"))
    assert again.wait(100) == 0
    assert load_profile(str(tmp_path / "again" / "p.toml")).step_time == profile.step_time

    (tmp_path / "t.csv").write_text(TRACE)
    command = [sys.executable, "-m", "rota.cli.main", "simulate", "--trace", str(tmp_path / "t.csv")]
    played = subprocess.run(
        [*command, "--profile", str(tmp_path / "p.toml"), "--json"], capture_output=True, text=True, check=False
    )
    assert played.returncode == 0, played.stderr
    assert json.loads(played.stdout)["ttft_ms"]["p50"] > profile.front_end_ms


def test_an_interrupt_stops_the_engine_and_keeps_the_steps(tmp_path: Path) -> None:
    process = started(tmp_path, "600")
    facts = tmp_path / "p.engine.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (facts.exists() and facts.read_bytes().count(b"\n") > 300):
        assert process.poll() is None, process.communicate()
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert json.loads(out)["calibration"]["num_held_out"] > 0
    assert len(records_of(tmp_path / "p.facts.jsonl")) > 200
    left = subprocess.run(["pgrep", "-f", str(facts)], capture_output=True, text=True, check=False)
    assert left.stdout == "", "the engine still runs"
