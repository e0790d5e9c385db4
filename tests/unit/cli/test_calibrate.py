"""`rota calibrate` from recorded steps, and what `rota simulate` says of the profile that it wrote."""

import json
from pathlib import Path

import pytest
from tests.command_line import rota
from tests.unit.calibration.fabricated import ENGINE, facts, straight

from rota.serving.engines.vllm.facts import EngineFacts, FactsFile
from rota.serving.predictors.step_time.profiles import load_profile

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00,50,3\n2023-11-16 18:00:01,60,9\n"


def write_facts(path: Path, *, num_stretches: int = 20, engine: EngineFacts | None = ENGINE) -> Path:
    file = FactsFile(path, engine=engine)
    for record in facts(straight, num_stretches=num_stretches, noise=0.04):
        file.append(record)
    file.close()
    return path


def test_steps_become_a_profile_that_simulates(tmp_path: Path) -> None:
    recorded = write_facts(tmp_path / "engine.jsonl")
    ran = rota("calibrate", "--facts", recorded, "-o", tmp_path / "p.toml")
    assert ran.code == 0, ran.stderr
    assert ran.stdout.startswith("held out  steps  MAPE %")
    assert "decode" in ran.stdout
    assert ran.stderr == f"profile: {tmp_path / 'p.toml'}\n"
    profile = load_profile(str(tmp_path / "p.toml"))
    assert profile.limits.num_blocks == ENGINE.limits.num_blocks
    assert profile.front_end_ms == 0.0

    (tmp_path / "t.csv").write_text(TRACE)
    played = rota("simulate", "--trace", tmp_path / "t.csv", "--profile", tmp_path / "p.toml", "--json")
    assert played.code == 0, played.stderr
    assert played.stderr == ""
    ttft = json.loads(played.stdout)["ttft_ms"]["p50"]

    # A front end is part of what every client sees.
    text = (tmp_path / "p.toml").read_text().replace("front_end_ms = 0.0", "front_end_ms = 12.5")
    (tmp_path / "slow.toml").write_text(text)
    played = rota("simulate", "--trace", tmp_path / "t.csv", "--profile", tmp_path / "slow.toml", "--json")
    assert json.loads(played.stdout)["ttft_ms"]["p50"] == pytest.approx(ttft + 12.5, abs=1e-6)


def test_the_same_steps_give_the_same_file(tmp_path: Path) -> None:
    recorded = write_facts(tmp_path / "engine.jsonl")
    texts = []
    for name in ("a.toml", "b.toml"):
        assert rota("calibrate", "--facts", recorded, "-o", tmp_path / name).code == 0
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]


def test_json_is_the_error_table(tmp_path: Path) -> None:
    recorded = write_facts(tmp_path / "engine.jsonl")
    ran = rota("calibrate", "--facts", recorded, "-o", tmp_path / "p.toml", "--json")
    said = json.loads(ran.stdout)
    assert [each["phase"] for each in said["calibration"]["errors"]] == ["all", "decode", "prefill", "mixed"]
    assert 0 < said["calibration"]["errors"][0]["mape"] < 0.08


def test_a_capacity_other_than_the_engines_is_reported(tmp_path: Path) -> None:
    recorded = write_facts(tmp_path / "engine.jsonl")
    assert rota("calibrate", "--facts", recorded, "-o", tmp_path / "p.toml").code == 0
    text = (tmp_path / "p.toml").read_text()
    # The first is what instances get; the second is what the engine had.
    (tmp_path / "p.toml").write_text(text.replace("num_blocks = 900", "num_blocks = 1800", 1))
    (tmp_path / "t.csv").write_text(TRACE)
    ran = rota("simulate", "--trace", tmp_path / "t.csv", "--profile", tmp_path / "p.toml", "--instances", 2)
    assert ran.code == 0
    (line,) = ran.stderr.splitlines()
    assert line.startswith("warning: num_blocks is 1800 here, and the engine that was calibrated (vLLM 0.32.0) has 900")


def test_facts_that_do_not_name_their_engine_are_fitted_with_a_warning(tmp_path: Path) -> None:
    recorded = write_facts(tmp_path / "engine.jsonl", engine=None)
    ran = rota("calibrate", "--facts", recorded, "-o", tmp_path / "p.toml")
    assert ran.code == 0
    assert "warning: " in ran.stderr
    assert "limits are those that its steps reached" in ran.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "URL, --engine or --facts: one of them is needed"),
        (("--engine", "vlm"), "--engine: unknown engine 'vlm'"),
        (("http://127.0.0.1:9", "--engine", "vllm"), "--engine: give it or a URL, not both"),
        (("http://127.0.0.1:9",), "--facts: needed with a URL"),
        (("http://127.0.0.1:9", "--facts", "no.jsonl"), "no.jsonl: cannot be read"),
        (("--facts", "no.jsonl"), "no.jsonl: cannot be read"),
        (("--facts", "few.jsonl"), "few.jsonl: 3 steps"),
        (("--facts", "bad.jsonl"), "bad.jsonl: line 2: not a step record"),
        (("--facts", "empty.jsonl"), "empty.jsonl: 0 steps"),
        (("--facts", "few.jsonl", "--model", "m"), "--model: needs --engine vllm"),
        (("--facts", "few.jsonl", "--cores", "0"), "--cores: needs --engine vllm"),
        (("--engine", "vllm", "--facts", "few.jsonl"), "--facts: the engine that --engine starts writes its own"),
        (("--engine", "vllm", "--duration", "5"), "--duration: must be at least 30"),
        (("--engine", "vllm", "--engine-option", "x=1"), "--engine-option: unknown setting 'x'"),
        (("--facts", "few.jsonl", "-o", "bad.jsonl/p.toml"), "--output: bad.jsonl/p.toml cannot be written"),
    ],
)
def test_bad_input_is_answered_with_its_spot(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = write_facts(tmp_path / "all.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_bytes(b"".join(lines[:4]))
    (tmp_path / "bad.jsonl").write_bytes(lines[0] + b'{"step": "one"}\n' + b"".join(lines[1:]))
    (tmp_path / "empty.jsonl").write_bytes(b"")
    ran = rota("calibrate", *words)
    assert ran.code == 2, ran.stderr
    assert f"error: {message}" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "profile.toml").exists()
