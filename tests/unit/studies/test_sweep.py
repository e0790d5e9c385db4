"""`rota sweep`: every combination once, whatever stops it in between, into one table."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.command_line import rota

from rota.base.errors import ConfigError
from rota.cli.targets import slo_of
from rota.serving.studies.spec import Range, Runs, Sample, SweepSpec, points
from rota.serving.studies.sweep import run_point

WORKLOAD = """
num_requests = 60
[arrivals]
rate = 12.0
[prompt]
quantiles = {"0" = 16, "0.5" = 400, "1" = 2048}
[output]
quantiles = {"0" = 1, "0.5" = 60, "1" = 200}
"""
SPEC = """
[base]
trace = "workload.toml"
slo = "ttft=500ms,tpot=50ms"

[vary]
instances = [1, 2]
"workload.arrivals.rate" = {from = 6.0, to = 24.0, steps = 3, scale = "log"}
"stack.batch" = ["vllm_default", "stall_free_chunks"]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "workload.toml").write_text(WORKLOAD)
    (tmp_path / "sweep.toml").write_text(SPEC)
    return tmp_path


def swept(folder: Path, *words: object, code: int = 0) -> dict:
    ran = rota("sweep", folder / "sweep.toml", "--out", folder / "out.parquet", "--jobs", 1, "--json", *words)
    assert ran.code == code, ran.stderr
    return json.loads(ran.stdout)


def test_all_combinations_are_run_once_and_the_table_says_what_simulate_says(folder: Path) -> None:
    answer = swept(folder, "--report", folder / "report.html")
    table = pq.read_table(folder / "out.parquet")
    rows = table.to_pylist()
    assert answer["num_runs"] == len(rows) == 12
    combinations = {(row["instances"], row["workload.arrivals.rate"], row["stack.batch"]) for row in rows}
    assert len(combinations) == 12
    assert {row["workload.arrivals.rate"] for row in rows} == {6.0, 12.0, 24.0}
    assert not (folder / "out.parquet.part").exists()
    one = next(
        r for r in rows if (r["instances"], r["workload.arrivals.rate"], r["stack.batch"]) == (2, 12, "vllm_default")
    )
    words = ("--trace", folder / "workload.toml", "--instances", 2, "--slo", "ttft=500,tpot=50", "--json")
    told = json.loads(rota("simulate", *words).stdout)
    assert one["ttft_p99_ms"] == told["ttft_ms"]["p99"]
    assert one["goodput_rps"] == told["goodput_rps"]
    assert one["num_steps"] == told["num_steps"]
    best = [row["goodput_rps"] for row in answer["best"]]
    assert best == sorted((row["goodput_rps"] for row in rows), reverse=True)[:10]
    page = (folder / "report.html").read_text()
    assert "goodput_rps by instances and workload.arrivals.rate" in page


def test_what_is_there_is_not_run_again(folder: Path) -> None:
    swept(folder)
    before = (folder / "out.parquet").read_bytes()
    assert swept(folder)["num_reused"] == 12
    assert (folder / "out.parquet").read_bytes() == before


@pytest.mark.parametrize("cut", [0, 1, 20, 100])
def test_a_sweep_that_was_cut_off_anywhere_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    """`cut` bytes of the last line were not written when it was killed."""
    num_run = 0

    def counted(config: object) -> dict:
        nonlocal num_run
        num_run += 1
        if num_run == 6:
            raise KeyboardInterrupt
        return run_point(config)

    part = folder / "out.parquet.part"
    for _ in range(2):
        num_run = 0
        monkeypatch.setattr("rota.serving.studies.sweep.run_point", counted)
        ran = rota("sweep", folder / "sweep.toml", "--out", folder / "out.parquet", "--jobs", 1)
        assert ran.code == 130 and "interrupted" in ran.stderr
        part.write_bytes(part.read_bytes()[: -cut or None])
        monkeypatch.undo()
    answer = swept(folder)
    assert answer["num_reused"] == 2 * (5 if cut == 0 else 4)
    rows = pq.read_table(folder / "out.parquet").to_pylist()
    assert [row["run"] for row in rows] == list(range(12))
    assert not part.exists()
    (folder / "out.parquet").unlink()
    swept(folder)
    whole = pq.read_table(folder / "out.parquet").to_pylist()
    for row in (*rows, *whole):
        row.pop("cpu_seconds")
    assert rows == whole, "a sweep that was cut off has the same results"


def test_another_sweep_is_refused_and_told_what_differs(folder: Path) -> None:
    swept(folder)
    (folder / "sweep.toml").write_text(SPEC.replace("[1, 2]", "[1, 3]"))
    ran = rota("sweep", folder / "sweep.toml", "--out", folder / "out.parquet")
    assert ran.code == 2
    assert "holds results of another sweep; what differs: vary.instances" in ran.stderr
    assert "give another --out" in ran.stderr
    (folder / "sweep.toml").write_text(SPEC)
    (folder / "workload.toml").write_text(WORKLOAD.replace("60", "61"))
    ran = rota("sweep", folder / "sweep.toml", "--out", folder / "out.parquet")
    assert ran.code == 2 and "a file that it names" in ran.stderr


def test_a_run_that_fails_is_a_row_that_says_why(folder: Path) -> None:
    words = ("--set", f"trace={folder / 'workload.toml'}", "--vary", "num_requests=5,6", "--out", folder / "o.parquet")
    (folder / "workload.toml").write_text(WORKLOAD)
    assert rota("sweep", *words, "--jobs", 1).code == 0
    bad = folder / "bad.csv"
    bad.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\nyesterday,1,2\n")
    ran = rota(
        "sweep", "--set", f"trace={bad}", "--vary", "num_requests=1,2", "--out", folder / "b.parquet", "--jobs", 1
    )
    assert ran.code == 1 and "1 runs failed" in ran.stderr
    rows = pq.read_table(folder / "b.parquet").to_pylist()
    assert rows[0]["error"] is None and "bad.csv:3:1" in rows[1]["error"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vary", "instanses=1,2"], "vary.instanses: unknown parameter"),
        (["--vary", "instances=0,1"], "instances: expected a whole number of at least 1, got 0"),
        (["--vary", "stack.order=fcfs,fcsf"], "unknown order 'fcsf'"),
        (["--vary", "stack.parameters.batch.chunk=1,2"], "unknown parameter 'chunk'"),
        (["--vary", "limits.max_seqs=1,2"], "limits.max_seqs: unknown limit"),
        (["--vary", "rate=1:2"], "rate: expected a number above 0, got '1:2'"),
        (["--vary", "rate=1:2:1"], "steps must be at least 2"),
        (["--vary", "rate"], "--vary: 'rate' is not of the form NAME=VALUE"),
        (["--vary", "seed=0,1", "--best", "speed"], "--best: no metric 'speed'"),
        (["--vary", "seed=0,1", "--on", "ray", "--jobs", "2"], "--jobs: is of this machine"),
        (["--vary", "seed=0,1", "--out", "/nowhere/x.parquet"], "--out: /nowhere/x.parquet.part cannot be written"),
        ([], "--vary: nothing is varied"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str) -> None:
    monkeypatch.chdir(folder)
    ran = rota("sweep", "--set", "trace=workload.toml", *words)
    assert ran.code == 2, ran
    assert said in ran.stderr and "Traceback" not in ran.stderr


def test_the_results_of_something_else_are_not_overwritten(folder: Path) -> None:
    (folder / "out.parquet").write_text("mine")
    ran = rota("sweep", folder / "sweep.toml", "--out", folder / "out.parquet")
    assert ran.code == 2 and "is not what a sweep writes" in ran.stderr
    assert (folder / "out.parquet").read_text() == "mine"


def runs_of(folder: Path, vary: dict) -> Runs:
    return Runs(SweepSpec({"trace": "workload.toml"}, vary), folder, slo_of)


def test_parameters_reach_stack_fleet_and_workload(folder: Path) -> None:
    (folder / "mine.toml").write_text('order = "strict_priority"\n')
    vary = {
        "stack": ["mine.toml"],
        "stack.parameters.order.ageing_seconds": [7.0],
        "limits.max_num_seqs": [8],
        "workload.arrivals.cv": [2.5],
        "workload.prompt.quantiles.1": [4000],
        "speedup": [2.0],
        "seed": [9],
    }
    (config,) = runs_of(folder, vary).configs
    assert config.stack.order == "strict_priority"
    assert config.stack.parameters.order == {"ageing_seconds": 7.0}
    assert config.limits is not None and config.limits.max_num_seqs == 8
    assert config.workload is not None and config.workload.arrivals.cv == 2.5
    assert config.workload.prompt.quantiles["1"] == 4000
    assert (config.speedup, config.seed) == (2.0, 9)


def test_files_that_are_named_are_part_of_what_a_sweep_is(folder: Path) -> None:
    before = runs_of(folder, {"seed": [1]}).fingerprint()
    assert runs_of(folder, {"seed": [1]}).fingerprint() == before
    assert runs_of(folder, {"seed": [2]}).fingerprint() != before
    (folder / "workload.toml").write_text(WORKLOAD + "\n")
    assert runs_of(folder, {"seed": [1]}).fingerprint() != before


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.integers(2, 9), st.sampled_from(["linear", "log"]))
def test_ranges_hold_both_ends_and_samples_stay_inside(low: float, high: float, steps: int, scale: str) -> None:
    one = Range(low, high, steps, scale)
    values = one.values()
    assert len(values) == steps
    assert (values[0], values[-1]) == pytest.approx((low, high))
    drawn = points(SweepSpec({}, {"rate": one, "instances": [1, 2]}, Sample(20, 3)))
    assert drawn == points(SweepSpec({}, {"rate": one, "instances": [1, 2]}, Sample(20, 3)))
    assert all(min(low, high) * 0.999 <= point["rate"] <= max(low, high) * 1.001 for point in drawn)


def test_too_many_combinations_are_refused() -> None:
    with pytest.raises(ConfigError, match="1,000,000 combinations"):
        points(SweepSpec({}, {"seed": list(range(1000)), "instances": list(range(1, 1001))}))


# --- processes --------------------------------------------------------------------------------------------------------


def started(folder: Path) -> subprocess.Popen:
    """A sweep of many longer runs, of which a few have ended."""
    (folder / "workload.toml").write_text(WORKLOAD.replace("60", "4000", 1))
    (folder / "sweep.toml").write_text('[base]\ntrace = "workload.toml"\n[vary]\nseed = ' + str(list(range(40))))
    command = [sys.executable, "-m", "rota.cli.main", "sweep", "sweep.toml", "--jobs", "2", "--out", "out.parquet"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    part = folder / "out.parquet.part"
    while not (part.exists() and len(part.read_text().splitlines()) > 3):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found


def all_gone(pids: list[int]) -> bool:
    for _ in range(600):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_sweep_that_is_stopped_leaves_no_process_and_goes_on(folder: Path, how: signal.Signals) -> None:
    process = started(folder)
    workers = children(process.pid)
    assert len(workers) >= 2
    os.kill(process.pid, how)
    _, said = process.communicate(timeout=60)
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert said.splitlines()[-1] == "interrupted" and "Traceback" not in said
    assert all_gone(workers)
    num_done = sum(line.endswith("\n") for line in (folder / "out.parquet.part").open()) - 1
    assert 3 <= num_done < 40
    command = [sys.executable, "-m", "rota.cli.main", "sweep", "sweep.toml", "--out", "out.parquet", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["num_reused"] == num_done
    assert pq.read_table(folder / "out.parquet").num_rows == 40
