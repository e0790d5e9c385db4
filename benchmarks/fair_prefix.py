"""What `fair_prefix` buys and costs: hit rate, throughput and everybody's latency, beside `fair_tokens`, `fcfs` and
plain longest prefix first.

    python benchmarks/fair_prefix.py            # writes benchmarks/results/fair_prefix.json
    python benchmarks/fair_prefix.py --quick    # one seed; writes nothing

**Load.** One instance with the step times of Llama-3.1-8B on an A100 and 96,000 tokens of KV cache. Six tenants ask
about documents of 2,048 to 10,240 tokens, six each, which together are twice what the cache holds; questions have 20 to
200 tokens of their own, answers 100 on average. Tenant `greedy` sends as much as four others do, `stranger` sends
prompts of 1,000 to 4,000 tokens that nobody has in common. 600 requests come within 60 s, and take longer than that to
serve, so that queues are long. Means over the seeds, with the lowest and highest.

**Arms**: the order policy alone differs. The one with an endless quantum is plain longest prefix first.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from rota import __version__
from rota.base.instant import Duration, Instant, to_seconds
from rota.base.random_streams import RandomStreams
from rota.serving.assemble import SystemConfig
from rota.serving.metrics.definitions import RequestRecord
from rota.serving.model.instance import InstanceId, InstanceSpec
from rota.serving.model.request import Request, RequestId, TenantId
from rota.serving.predictors.step_time.profiles import load_profile
from rota.serving.sim.cluster import SimulatedCluster, WorldOptions
from rota.serving.stack import Parameters, StackConfig

RESULTS = Path(__file__).parent / "results" / "fair_prefix.json"
PROFILE = "llama-3.1-8b-a100"
NUM_BLOCKS = 6000
NUM_REQUESTS = 600
SPAN_NS = 60 * 10**9
HASHED_TOKENS = 512
SEEDS = (0, 1, 2, 3, 4)
TENANTS = ("greedy", *(f"tenant-{number}" for number in range(1, 6)), "stranger")
SHARES = (4, 1, 1, 1, 1, 1, 1)
NUM_DOCUMENTS = 6
ARMS: dict[str, tuple[str, dict[str, float]]] = {
    "fcfs": ("fcfs", {}),
    "fair_tokens": ("fair_tokens", {}),
    "fair_prefix, quantum 500": ("fair_prefix", {"quantum_tokens": 500.0}),
    "fair_prefix, quantum 4096": ("fair_prefix", {}),
    "fair_prefix, quantum 32768": ("fair_prefix", {"quantum_tokens": 32768.0}),
    "longest prefix (endless quantum)": ("fair_prefix", {"quantum_tokens": 1e15}),
}


def arrivals(seed: int) -> Iterator[tuple[Request, int]]:
    stream = RandomStreams(seed).stream("benchmarks.fair_prefix")
    lengths = {
        (tenant, number): HASHED_TOKENS * stream.integers(4, 21)
        for tenant in TENANTS
        for number in range(NUM_DOCUMENTS)
    }
    senders = [tenant for tenant, share in zip(TENANTS, SHARES, strict=True) for _ in range(share)]
    instants = sorted(stream.integers(0, SPAN_NS) for _ in range(NUM_REQUESTS))
    for number, at in enumerate(instants):
        tenant = stream.choice(senders)
        document = (tenant, min(stream.integers(0, NUM_DOCUMENTS), stream.integers(0, NUM_DOCUMENTS)))
        num_shared = 0 if tenant == "stranger" else lengths[document]
        num_own = stream.integers(1000, 4001) if tenant == "stranger" else stream.integers(20, 201)
        num_output = 1 + min(round(stream.exponential(100)), 800)
        yield (
            Request(
                RequestId(f"r{number:04}"),
                Instant(at),
                num_shared + num_own,
                max_tokens=1024,
                tenant=TenantId(tenant),
                block_hashes=tuple((document, part) for part in range(num_shared // HASHED_TOKENS)),
                hash_block_tokens=HASHED_TOKENS,
            ),
            num_output,
        )


def play(order: str, parameters: dict[str, float], seed: int) -> Sequence[RequestRecord]:
    profile = load_profile(PROFILE)
    limits = msgspec.structs.replace(profile.instance_limits(), num_blocks=NUM_BLOCKS)
    stack = StackConfig(order=order, parameters=Parameters(order=dict(parameters), profile=PROFILE))
    options = WorldOptions(step_overhead=Duration(profile.step_overhead()))
    config = SystemConfig(stack, (InstanceSpec(InstanceId("i0"), limits),), seed)
    cluster = SimulatedCluster(config, arrivals(seed), profile.predictor(), options)
    cluster.run()
    assert all(each.status == "finished" for each in cluster.records)
    return cluster.records


def judge(records: Sequence[RequestRecord]) -> dict[str, float]:
    """What came of one run."""
    span = to_seconds(Duration(max(each.finished_at for each in records)))
    found = {
        "hit_rate": sum(each.num_cached_tokens for each in records) / sum(each.num_prompt_tokens for each in records),
        "requests_per_second": len(records) / span,
        "output_tokens_per_second": sum(each.num_output_tokens for each in records) / span,
        "num_preemptions": float(sum(each.num_preemptions for each in records)),
    }
    for name, of_these in (
        ("all", records),
        ("greedy", [each for each in records if each.tenant == "greedy"]),
        ("others", [each for each in records if each.tenant not in ("greedy", "stranger")]),
        ("stranger", [each for each in records if each.tenant == "stranger"]),
    ):
        for measure in ("ttft", "e2e"):
            values = sorted(to_seconds(getattr(each, measure)) for each in of_these)
            found[f"{measure}_mean_seconds_{name}"] = sum(values) / len(values)
            found[f"{measure}_p99_seconds_{name}"] = values[int(0.99 * (len(values) - 1))]
    return found


def over_seeds(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "mean": round(sum(run[name] for run in runs) / len(runs), 4),
            "lowest": round(min(run[name] for run in runs), 4),
            "highest": round(max(run[name] for run in runs), 4),
        }
        for name in runs[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    is_quick = parser.parse_args().quick
    began = time.process_time()
    results: dict[str, Any] = {}
    for name, (order, parameters) in ARMS.items():
        results[name] = found = over_seeds(
            [judge(play(order, parameters, seed)) for seed in SEEDS[: 1 if is_quick else 5]]
        )
        mean = {measure: each["mean"] for measure, each in found.items()}
        waits = "  ".join(
            f"{who} ttft {mean[f'ttft_mean_seconds_{who}']:.1f}/{mean[f'ttft_p99_seconds_{who}']:.1f}"
            for who in ("all", "greedy", "others", "stranger")
        )
        print(f"{name:33} hit {mean['hit_rate']:.3f}  {mean['requests_per_second']:.2f} req/s  {waits}", flush=True)
    if not is_quick:
        provenance = {
            "command": "python benchmarks/fair_prefix.py",
            "rota": __version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "cpu_seconds": round(time.process_time() - began, 1),
            "seeds": list(SEEDS),
            "note": f"simulated; {PROFILE}, {NUM_BLOCKS} blocks of 16 tokens; mean, lowest and highest over the seeds",
        }
        RESULTS.write_text(json.dumps({"provenance": provenance, "arms": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
