"""What fairness is worth, live: two vLLM instances on CPU, three small tenants, and a fourth that sends ten times as
much as the three together, with long prompts.

    python benchmarks/abusive_tenant.py --peer VLLM_ROUTER > result.json

Arms, each with two fresh engines of equal settings, and the same requests at the same moments: `fair_tokens` at the
router and inside the engines; at the router only, over stock engines; inside the engines only; ours in `fcfs` (the
control: everything but the policy); and, where the executable of vllm-router is given, stock engines under vLLM's
`fcfs` and `priority` behind it, cache-aware. Everybody has the same class, as vLLM's `priority` knows no tenants. Times
count from the moment a request was due. Answers have the lengths that were asked for (`ignore_eos`), so the work is
equal in all arms. About three minutes an arm on two cores."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from priority_live import provenance as two_vllms
from priority_live import read_object
from router_overhead import peer_version

from rota.serving.engines.managed import free_port
from rota.serving.engines.model_package import prepare_model
from rota.serving.engines.vllm.server import VllmServer

ROTA = str(Path(sys.executable).with_name("rota"))
MODEL = "smollm2-135m"
SMALL, GREEDY = ("ada", "ben", "eve"), "max"
FCFS, INSIDE = 'order = "fcfs"\n', 'order = "fair_tokens"\n'
QUEUE = "[queue]\nmax_outstanding_per_instance = {max_num_seqs}\nmax_held = 10000\ntimeout_seconds = 3600\n"
OURS: dict[str, tuple[str, str | None]] = {
    "fair_at_both_levels": (INSIDE + QUEUE, None),
    "fair_at_the_router": (INSIDE + QUEUE, "fcfs"),
    "fair_in_the_engines": (INSIDE, None),
    "rota_fcfs": (FCFS, None),
}
"""Stack, and vLLM's own policy where the engines are stock."""
PEERS = {"vllm_fcfs_behind_vllm_router": "fcfs", "vllm_priority_behind_vllm_router": "priority"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", metavar="PATH", help="the vllm-router executable of another environment")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long everybody sends")
    parser.add_argument("--rate", type=float, default=0.1, help="requests a second of each small tenant")
    parser.add_argument(
        "--times", type=float, default=10.0, help="the greedy one sends so many times as many as all small"
    )
    parser.add_argument("--max-num-seqs", type=int, default=8, help="sequences an engine runs at once")
    parser.add_argument("--small-prompt", default="0=20,0.5=60,1=120")
    parser.add_argument("--greedy-prompt", default="0=200,0.5=400,1=600")
    parser.add_argument("--max-tokens", default="0=16,0.5=48,1=96")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="*", choices=[*OURS, *PEERS])
    options = parser.parse_args()
    arms = options.arms or [*OURS, *(PEERS if options.peer else ())]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for arm in arms:
            print(f"{arm}: starting", file=sys.stderr, flush=True)
            results[arm] = run_arm(arm, Path(folder) / arm, options)
            print(f"{arm}: {json.dumps(results[arm])}", file=sys.stderr, flush=True)
    print(json.dumps({"results": results, "ratios": ratios(results), "provenance": provenance(options)}, indent=2))


def run_arm(arm: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    folder.mkdir()
    keys = {
        tenant: subprocess.run(
            [ROTA, "keys", "new", "--tenant", tenant, "--keys", str(folder / "keys.toml")],
            check=True, capture_output=True, text=True,
        ).stdout.strip()
        for tenant in (*SMALL, GREEDY)
    }  # fmt: skip
    with ours(arm, folder, options) if arm in OURS else peer(arm, folder, options) as url:
        # First requests pay for what the engine builds lazily.
        bench(url, keys[GREEDY], options, rate=2.0, seconds=4.0, prompt=options.small_prompt, seed=99).communicate()
        began = time.monotonic()
        running = {
            tenant: bench(
                url, keys[tenant], options,
                rate=options.rate if tenant != GREEDY else options.times * len(SMALL) * options.rate,
                seconds=options.seconds,
                prompt=options.small_prompt if tenant != GREEDY else options.greedy_prompt,
                seed=options.seed + number,
            )
            for number, tenant in enumerate((*SMALL, GREEDY))
        }  # fmt: skip
        reports = {tenant: json.loads(process.communicate()[0]) for tenant, process in running.items()}
        return digest(reports, time.monotonic() - began)


def bench(
    url: str, key: str, options: argparse.Namespace, *, rate: float, seconds: float, prompt: str, seed: int
) -> "subprocess.Popen[str]":
    words = [ROTA, "bench", url, "--json", "--ignore-eos", "--timeout", "1800", "--prompt-tokens", prompt]
    words += ["--max-tokens", options.max_tokens, "--rate", str(rate), "--seed", str(seed)]
    words += ["--num-requests", str(max(1, round(rate * seconds)))]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "OPENAI_API_KEY": key})


@contextlib.contextmanager
def ours(arm: str, folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Two engines behind our router."""
    stack, stock = OURS[arm]
    (folder / "stack.toml").write_text(stack.format(max_num_seqs=options.max_num_seqs))
    words = [ROTA, "serve", "--engine", "vllm", "--instances", "2", "--port", "0", "--json", "--wait-for-all", "--keys",
             str(folder / "keys.toml"), "--run-dir", str(folder), "--stack", str(folder / "stack.toml"),
             "--no-hand-off", "--engine-option", f"max_num_seqs={options.max_num_seqs}"]  # fmt: skip
    words += ["--stock", stock] if stock is not None else []
    with running(words) as process:
        yield json.loads(read_object(process))["url"].removesuffix("/v1")


@contextlib.contextmanager
def peer(arm: str, folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Two stock engines behind vllm-router."""
    with contextlib.ExitStack() as stack:
        urls = []
        for index in range(2):
            server = VllmServer(
                model=prepare_model(), port=free_port(), served_model_name=MODEL, plugin=False,
                scheduling_policy="priority" if PEERS[arm] == "priority" else "fcfs",
                max_num_seqs=options.max_num_seqs, cores=str(index % (os.cpu_count() or 1)),
            )  # fmt: skip
            stack.enter_context(running(list(server.command()), server.environment(), folder / f"vllm-{index}.log"))
            urls.append(server.url)
        for url in urls:
            wait_for(f"{url}/health")
        port = free_port()
        words = [
            options.peer,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--policy",
            "cache_aware",
            "--worker-urls",
            *urls,
        ]
        stack.enter_context(running(words, log=folder / "router.log"))
        wait_for(f"http://127.0.0.1:{port}/v1/models")
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def running(words: list[str], environment: Any = None, log: Path | None = None) -> "Iterator[subprocess.Popen[str]]":
    with contextlib.ExitStack() as stack:
        out = subprocess.PIPE if log is None else stack.enter_context(log.open("w"))
        errors = None if log is None else subprocess.STDOUT
        env = {**os.environ, **(environment or {})}
        process = subprocess.Popen(words, stdout=out, stderr=errors, text=True, start_new_session=True, env=env)
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(url: str, seconds: float = 300.0) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            if time.monotonic() > until:
                raise SystemExit(f"{url} does not answer") from None
            time.sleep(0.5)


def digest(reports: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The figures that the question is about. Of the small tenants the worst p99 and the mean of their means."""
    small = [reports[tenant] for tenant in SMALL]
    num_output_tokens = sum(each["output_tokens_per_second"] * each["span_seconds"] for each in reports.values())
    return {
        "num_small": sum(each["num_requests"] for each in small),
        "num_greedy": reports[GREEDY]["num_requests"],
        "num_not_finished": sum(each["num_requests"] - each["num_finished"] for each in reports.values()),
        "output_tokens_per_second": num_output_tokens / max(each["span_seconds"] for each in reports.values()),
        "seconds": seconds,
        **{
            f"small_{what}": {
                "mean": sum(each[what]["mean"] * each["num_finished"] for each in small)
                / sum(each["num_finished"] for each in small),
                "p99": max(each[what]["p99"] for each in small),
            }
            for what in ("ttft_ms", "e2e_ms")
        },
        "greedy_ttft_ms": reports[GREEDY]["ttft_ms"],
        "greedy_e2e_ms": reports[GREEDY]["e2e_ms"],
    }


def ratios(results: dict[str, Any]) -> dict[str, Any]:
    """Each arm of ours against the best of the rest, and against each: how many times lower, and what share of the
    throughput is left."""
    rest = [arm for arm in results if arm.endswith("behind_vllm_router") or arm == "rota_fcfs"]
    return {
        arm: {
            other: {
                **{
                    f"{what}_{which}_times_lower": results[other][what][which] / results[arm][what][which]
                    for what in ("small_ttft_ms", "small_e2e_ms")
                    for which in ("mean", "p99")
                },
                "throughput_share": results[arm]["output_tokens_per_second"]
                / results[other]["output_tokens_per_second"],
            }
            for other in rest
        }
        for arm in results
        if arm.startswith("fair")
    }


def provenance(options: argparse.Namespace) -> dict[str, Any]:
    known = two_vllms(argparse.Namespace(**{name: value for name, value in vars(options).items() if name != "peer"}))
    if options.peer:
        known["peer"] = peer_version(options.peer)
    return known


if __name__ == "__main__":
    main()
