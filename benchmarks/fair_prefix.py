"""What `fair_prefix` buys and costs: hit rate, throughput and everybody's latency, beside `fair_tokens`, `fcfs` and
plain longest prefix first.

    python benchmarks/fair_prefix.py            # writes benchmarks/results/fair_prefix.json
    python benchmarks/fair_prefix.py --quick    # one seed; writes nothing

**Load.** One instance with the step times of Llama-3.1-8B on an A100 and 96,000 tokens of KV cache. Six tenants ask
about documents of 2,048 to 10,240 tokens, six each, which together are twice what the cache holds; questions have 20 to
200 tokens of their own, answers 100 on average. Tenant `greedy` sends as much as four others do, `stranger` sends
prompts of 1,000 to 4,000 tokens that nobody has in common. 600 requests come within 60 s, and take longer than that to
serve, so that queues are long. Means over the seeds, with the lowest and highest.

**Arms**: the order policy alone differs. The one with an endless quantum is plain longest prefix first. Then three such
instances behind a router, with three times the requests: what dispatches differs, too. Last, the same with all of
`greedy` about one document, and answers of 600 tokens.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from provenance import of_simulated

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
NUM_INSTANCES = 3
SPAN_NS = 60 * 10**9
HASHED_TOKENS = 512
SEEDS = (0, 1, 2, 3, 4)
TENANTS = ("greedy", *(f"tenant-{number}" for number in range(1, 6)), "stranger")
SHARES = (4, 1, 1, 1, 1, 1, 1)
NUM_DOCUMENTS = 6
ENDLESS = 1e15


@dataclass(frozen=True)
class Arm:
    """What decides: inside the engines, and between them."""

    order: str
    parameters: Mapping[str, float] = field(default_factory=dict)
    dispatch: str = "least_outstanding_tokens"
    credits: Mapping[str, float] = field(default_factory=dict)


ARMS = {
    "fcfs": Arm("fcfs"),
    "fair_tokens": Arm("fair_tokens"),
    "fair_prefix, quantum 500": Arm("fair_prefix", {"quantum_tokens": 500.0}),
    "fair_prefix, quantum 4096": Arm("fair_prefix"),
    "fair_prefix, quantum 32768": Arm("fair_prefix", {"quantum_tokens": 32768.0}),
    "longest prefix (endless quantum)": Arm("fair_prefix", {"quantum_tokens": ENDLESS}),
}
FLEET = {
    "fair_prefix, prefix_by_credit 4096": Arm("fair_prefix", {}, "prefix_by_credit", {"quantum_tokens": 4096.0}),
    "fair_prefix, prefix_by_credit 32768": Arm("fair_prefix", {}, "prefix_by_credit"),
    "fair_prefix, longest prefix only": Arm("fair_prefix", {}, "prefix_by_credit", {"quantum_tokens": ENDLESS}),
    "fair_prefix, prefix_then_load": Arm("fair_prefix", {}, "prefix_then_load"),
    "fair_prefix, least tokens": Arm("fair_prefix"),
    "fair_prefix, round_robin": Arm("fair_prefix", {}, "round_robin"),
    "fair_tokens, prefix_then_load": Arm("fair_tokens", {}, "prefix_then_load"),
    "longest prefix, round_robin": Arm("fair_prefix", {"quantum_tokens": ENDLESS}, "round_robin"),
}


def arrivals(seed: int, num_requests: int, is_hot: bool) -> Iterator[tuple[Request, int]]:
    stream = RandomStreams(seed).stream("benchmarks.fair_prefix")
    lengths = {
        (tenant, number): HASHED_TOKENS * stream.integers(4, 21)
        for tenant in TENANTS
        for number in range(NUM_DOCUMENTS)
    }
    senders = [tenant for tenant, share in zip(TENANTS, SHARES, strict=True) for _ in range(share)]
    instants = sorted(stream.integers(0, SPAN_NS) for _ in range(num_requests))
    for number, at in enumerate(instants):
        tenant = stream.choice(senders)
        document = (tenant, min(stream.integers(0, NUM_DOCUMENTS), stream.integers(0, NUM_DOCUMENTS)))
        is_of_one = is_hot and tenant == "greedy"
        if is_of_one:
            document = (tenant, 0)
        num_shared = 0 if tenant == "stranger" else lengths[document]
        num_own = stream.integers(1000, 4001) if tenant == "stranger" else stream.integers(20, 201)
        num_output = 1 + min(round(stream.exponential(600 if is_of_one else 100)), 1000)
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


def play(arm: Arm, seed: int, num_instances: int, is_hot: bool) -> Sequence[RequestRecord]:
    profile = load_profile(PROFILE)
    limits = msgspec.structs.replace(profile.instance_limits(), num_blocks=NUM_BLOCKS)
    parameters = Parameters(order=dict(arm.parameters), dispatch=dict(arm.credits), profile=PROFILE)
    stack = StackConfig(order=arm.order, dispatch=arm.dispatch, parameters=parameters)
    options = WorldOptions(step_overhead=Duration(profile.step_overhead()))
    instances = tuple(InstanceSpec(InstanceId(f"i{number}"), limits) for number in range(num_instances))
    come = arrivals(seed, NUM_REQUESTS * num_instances, is_hot)
    cluster = SimulatedCluster(SystemConfig(stack, instances, seed), come, profile.predictor(), options)
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


def measure(
    arms: Mapping[str, Arm], seeds: Sequence[int], num_instances: int, *, is_hot: bool = False
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, arm in arms.items():
        results[name] = found = over_seeds([judge(play(arm, seed, num_instances, is_hot)) for seed in seeds])
        mean = {measure: each["mean"] for measure, each in found.items()}
        waits = "  ".join(
            f"{who} ttft {mean[f'ttft_mean_seconds_{who}']:.1f}/{mean[f'ttft_p99_seconds_{who}']:.1f}"
            for who in ("all", "greedy", "others", "stranger")
        )
        print(f"{name:36} hit {mean['hit_rate']:.3f}  {mean['requests_per_second']:.2f} req/s  {waits}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    is_quick = parser.parse_args().quick
    began = time.process_time()
    seeds = SEEDS[:1] if is_quick else SEEDS
    one = measure(ARMS, seeds, 1)
    fleet = measure(FLEET, seeds, NUM_INSTANCES)
    hot = measure(FLEET, seeds, NUM_INSTANCES, is_hot=True)
    if not is_quick:
        note = f"simulated; {PROFILE}, {NUM_BLOCKS} blocks of 16 tokens; mean, lowest and highest over the seeds"
        provenance = of_simulated("python benchmarks/fair_prefix.py", began, seeds, note)
        RESULTS.write_text(
            json.dumps({"provenance": provenance, "one": one, "fleet": fleet, "hot_document": hot}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
