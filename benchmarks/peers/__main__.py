"""CPU seconds and memory of Rota's simulator and of others, on the same workloads, in one run.

    python -m venv peers && peers/bin/pip install ai-dynamo-runtime==1.6.1 sched-sim==0.2.1 \\
        typing_extensions pydantic uvloop && peers/bin/pip install --no-deps ai-dynamo==1.6.1
    python -m benchmarks.peers --peer-python peers/bin/python
    python -m benchmarks.peers --cases W1 --where        # Rota alone, and where its time goes
    python -m benchmarks.peers --million                 # a million requests in one go, Rota alone

Each run is a process of its own. The simulators take turns, and each round begins with the next of them, so that what
else the machine does meets all alike. Policies and KV blocks are in the loop, the journal is off. The figures are the
median of the rounds. Determinism is looked at as well: whether all rounds gave the same outcome, and whether Rota's
journals agree to the byte under different hash seeds."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.peers.inputs import Case, cases, endless_azure
from rich.console import Console
from rich.table import Table

from rota import __version__

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "simulator_peers.json"
NUM_JOURNALLED = 2_000
SCRIPTS = {"dynosim": HERE / "run_dynosim.py", "sched-sim": HERE / "run_sched_sim.py"}


def main() -> None:
    options = _parse()
    result: dict[str, Any] = {"provenance": _provenance(options), "cases": {}}
    if RESULTS.exists() and not options.million:
        # That takes long, and is measured on its own.
        result["million"] = json.loads(RESULTS.read_text(encoding="utf-8")).get("million")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in cases(folder):
            if not options.cases or case.name in options.cases:
                result["cases"][case.name] = _compare(case, options)
                _write(result, options)
        if options.million:
            result["million"] = _million(folder)
            _write(result, options)
    _print(result)


def _write(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Keep what is measured so far, unless only some cases were asked for."""
    if not options.cases:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", help="a Python that has ai-dynamo 1.6.1 and sched-sim 0.2.1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", help="only these, and nothing is written")
    parser.add_argument("--where", action="store_true", help="profile Rota's runs, too")
    parser.add_argument("--million", action="store_true", help="a million requests, after the cases")
    return parser.parse_args()


def _compare(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    names = [name for name in case.options if name == "rota" or options.peer_python]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            print(f"{case.name}: round {number + 1}, {name}", file=sys.stderr)
            runs[name].append(_run(name, case.options[name], options.peer_python))
    compared: dict[str, Any] = {"what": case.what, **{name: _summary(runs[name]) for name in names}}
    # Rows of long prompts are long; the gates hold whole runs to this.
    journalled = {**case.options["rota"], "with_digest": True, "num_requests": NUM_JOURNALLED}
    digests = {str(seed): _run("rota", journalled, hash_seed=seed)["digest"] for seed in (1, 2)}
    compared["rota"]["journal_digest_by_hash_seed"] = digests
    if options.where:
        compared["rota"]["where_the_time_goes"] = _run("rota", {**case.options["rota"], "where": True})
    return compared


def _run(name: str, options: dict[str, Any], peer_python: str | None = None, *, hash_seed: int | None = None) -> Any:
    command = [sys.executable, "-m", "benchmarks.peers.run_rota"]
    if name != "rota":
        command = [str(peer_python), str(SCRIPTS[name])]
    # DynoSim writes a line for every choice of its router unless told not to.
    environment = {**os.environ, "DYN_LOG": "error"}
    if hash_seed is not None:
        environment["PYTHONHASHSEED"] = str(hash_seed)
    done = subprocess.run([*command, json.dumps(options)], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [run["cpu_seconds"] for run in runs]
    median = statistics.median(seconds)
    outcomes = [run["outcome"] for run in runs]
    num_steps = runs[0]["num_steps"]
    return {
        "cpu_seconds": {"median": median, "all": seconds},
        "peak_rss_mb": max(run["peak_rss_mb"] for run in runs),
        "num_steps": num_steps,
        "steps_per_cpu_second": None if num_steps is None else num_steps / median,
        "outcome": outcomes[0],
        "num_different_outcomes": len({json.dumps(one, sort_keys=True) for one in outcomes}),
        "differing": {key: values for key in outcomes[0] if len(set(values := [one[key] for one in outcomes])) > 1},
        "version": runs[0].get("version", __version__),
    }


def _million(folder: Path) -> dict[str, Any]:
    """Ten times as many requests, and what that does to the memory."""
    runs = {}
    for num_requests in (10_000, 100_000, 1_000_000):
        print(f"{num_requests:,} requests", file=sys.stderr)
        run = _run("rota", endless_azure(num_requests, folder / f"{num_requests}.csv"))
        runs[str(num_requests)] = {key: run[key] for key in ("cpu_seconds", "peak_rss_mb", "num_steps", "outcome")}
    return runs


def _provenance(options: argparse.Namespace) -> dict[str, Any]:
    models = {
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    }
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "rota": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": ", ".join(sorted(models)),
        "num_cpus": os.cpu_count(),
        "load_average_at_start": os.getloadavg()[0],
        "cpu_seconds_of_a_fixed_loop": _fixed_loop(),
        "rounds": options.rounds,
    }


def _commit() -> str:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _fixed_loop() -> float:
    """How fast this machine is now: ten million additions of plain Python."""
    began = time.process_time()
    total = 0
    for number in range(10_000_000):
        total += number
    return time.process_time() - began


def _print(result: dict[str, Any]) -> None:
    table = Table(title="CPU seconds, median of the rounds", title_justify="left")
    columns = ("case", "simulator", "CPU s", "range", "peak MB", "steps", "TTFT ms", "TPOT ms", "E2E ms", "outcomes")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < 2 else "right")
    for case, compared in result["cases"].items():
        for name, run in compared.items():
            if name == "what":
                continue
            seconds, outcome = run["cpu_seconds"], run["outcome"]
            means = [outcome.get(key) for key in ("mean_ttft_ms", "mean_tpot_ms", "mean_e2e_ms")]
            table.add_row(
                case, name, f"{seconds['median']:.2f}", f"{min(seconds['all']):.2f}–{max(seconds['all']):.2f}",
                f"{run['peak_rss_mb']:.0f}", "" if run["num_steps"] is None else f"{run['num_steps']:,}",
                *("" if mean is None else f"{mean:,.1f}" for mean in means), str(run["num_different_outcomes"]),
            )  # fmt: skip
    Console(width=130).print(table)
    for case, compared in result["cases"].items():
        digests = set(compared["rota"]["journal_digest_by_hash_seed"].values())
        same = "equal" if len(digests) == 1 else "DIFFERENT"
        print(f"{case}: Rota's journals under two hash seeds are {same}")
        for name, run in compared.items():
            if name != "what" and run["differing"]:
                print(f"{case}: {name} differs from run to run: {json.dumps(run['differing'])}")
        for line in compared["rota"].get("where_the_time_goes", ()):
            print(f"  {line['share']:6.1%}  {line['num_calls']:>12,}  {line['function']}")
    for num_requests, run in (result.get("million") or {}).items():
        print(f"{int(num_requests):,} requests: {run['cpu_seconds']:.1f} CPU s, {run['peak_rss_mb']:.0f} MB")


if __name__ == "__main__":
    main()
