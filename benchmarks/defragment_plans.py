"""What the plans of `defragment_plan` are worth beside its greedy bound and beside the whole integer program.

    python benchmarks/defragment_plans.py [--num-clusters 60] > result.json

Clusters at random, of 16 and 64 instances of 3,000 blocks, in which a quarter have a head that lacks 20 to 400 blocks.
`roomy` ones have place for nearly all who would leave; in `tight` ones the others have a little, so that heads compete
for it, and in `broken` ones that little is in pieces smaller than most who would leave; in `scarce` ones only eight
instances have any. Asked are `defragment`, helping
as many heads as the planner; `defragment_plan` as it comes; and the same with a solver that may take a hundred times as
long as a round should, which mostly proves its plan the best there is. Heads helped count first, then tokens moved.
Milliseconds are CPU time of the whole round."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from provenance import of_simulated

from rota.base.instant import Instant
from rota.base.random_streams import Stream
from rota.serving.api import InstanceId, RequestId, SequenceReport
from rota.serving.policies.migration.defragment import Defragment
from rota.serving.policies.migration.defragment_plan import DefragmentPlan
from rota.testing.dispatch import ClusterSample, InstanceSample

NUM_BLOCKS = 3000
BLOCK_SIZE = 16
NOW = Instant(10**10)
SPARE = {"roomy": (600, 1500), "tight": (160, 330), "broken": (110, 190), "scarce": (110, 190)}
"""Blocks that are free where no head is blocked; in `scarce` clusters at eight instances alone."""
LACKING = {"scarce": (150, 400)}
POLICIES: dict[str, Callable[[], Any]] = {
    "defragment": lambda: Defragment(max_heads=8),
    "defragment_plan": DefragmentPlan,
    "the whole program": lambda: DefragmentPlan(max_looks=1, search_limit=0.5),
}


def cluster(stream: Stream, num_instances: int, kind: str) -> ClusterSample:
    """Instances with 4 to 24 requests each."""
    full = set(range(num_instances)) if kind == "scarce" else set(range(0, num_instances, 4))
    full -= {each * num_instances // 8 + 1 for each in range(8)}
    return ClusterSample(NOW, tuple(instance(stream, number, kind, number in full) for number in range(num_instances)))


def instance(stream: Stream, number: int, kind: str, is_full: bool) -> InstanceSample:
    has_head = number % 4 == 0 and is_full
    num_free = stream.integers(0, 40) if is_full else stream.integers(*SPARE[kind])
    shares = [stream.uniform(0.2, 2.0) for _ in range(stream.integers(4, 25))]
    blocks = [max(1, int((NUM_BLOCKS - num_free) * share / sum(shares))) for share in shares]
    running = tuple(
        SequenceReport(RequestId(f"r{number:03}-{position:02}"), held * BLOCK_SIZE, held)
        for position, held in enumerate(blocks)
    )
    num_left = NUM_BLOCKS - sum(blocks)
    num_head = (num_left + stream.integers(*LACKING.get(kind, (20, 400)))) * BLOCK_SIZE
    waiting = (SequenceReport(RequestId(f"head-{number:03}"), num_head, 0),) if has_head else ()
    return InstanceSample(
        InstanceId(f"i{number:03}"),
        num_outstanding_requests=len(running) + len(waiting),
        num_outstanding_tokens=len(running) + (num_head if has_head else 0),
        num_running=len(running),
        num_waiting=len(waiting),
        num_free_blocks=num_left,
        num_blocks=NUM_BLOCKS,
        observed_at=NOW,
        running=running,
        waiting=waiting,
    )


def asked(shown: ClusterSample, make: Callable[[], Any]) -> dict[str, float]:
    """What one round comes to, of a policy that has read the reports."""
    policy = make()
    for view in shown.instances:
        policy.instance_reported(view)
    before = time.process_time_ns()
    moves = policy.plan(shown, frozenset())
    took_ms = (time.process_time_ns() - before) / 1e6
    lengths = {each.request_id: each.num_tokens for view in shown.instances for each in view.running}
    return {
        "num_helped": len({move.source for move in moves}),
        "num_moves": len(moves),
        "num_tokens": sum(lengths[move.request_id] for move in moves),
        "cpu_ms": took_ms,
    }


def compared(num_instances: int, kind: str, num_clusters: int) -> dict[str, Any]:
    stream = Stream(7, f"{kind} {num_instances}")
    shown = [cluster(stream, num_instances, kind) for _ in range(num_clusters)]
    found = {name: [asked(each, make) for each in shown] for name, make in POLICIES.items()}
    num_heads = min(8, num_instances // 4)
    rows: dict[str, Any] = {}
    for name, answers in found.items():
        took = sorted(each["cpu_ms"] for each in answers)
        rows[name] = {
            "share_of_heads_helped": round(statistics.mean(each["num_helped"] for each in answers) / num_heads, 4),
            "moves_a_round": round(statistics.mean(each["num_moves"] for each in answers), 2),
            "tokens_a_round": round(statistics.mean(each["num_tokens"] for each in answers)),
            "cpu_ms": {
                "median": round(statistics.median(took), 3),
                "p99": round(took[int(len(took) * 0.99)], 3),
                "slowest": round(took[-1], 3),
            },
        }
    best = [min(map(worse_first, answers)) for answers in zip(*found.values(), strict=True)]
    for name, answers in found.items():
        rows[name]["rounds_with_the_best_plan_of_the_three"] = sum(
            worse_first(each) == top for each, top in zip(answers, best, strict=True)
        )
        rows[name]["rounds_with_as_many_heads"] = sum(
            -each["num_helped"] == top[0] for each, top in zip(answers, best, strict=True)
        )
    return {"num_clusters": num_clusters, "num_heads": num_heads, "policies": rows}


def worse_first(answer: dict[str, float]) -> tuple[float, float]:
    return -answer["num_helped"], answer["num_tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-clusters", type=int, default=60)
    arguments = parser.parse_args()
    began = time.process_time()
    results: dict[str, Any] = {}
    for num_instances in (16, 64, 1000):
        for kind in SPARE if num_instances < 1000 else ("broken", "scarce"):
            num_clusters = arguments.num_clusters if num_instances < 1000 else arguments.num_clusters // 5
            results[f"{kind} {num_instances}"] = compared(num_instances, kind, num_clusters)
            print(f"{kind}, {num_instances} instances: compared", file=sys.stderr, flush=True)
    command = " ".join(["python benchmarks/defragment_plans.py", *sys.argv[1:]])
    provenance = of_simulated(command, began, [7], "CPU time of the process; the machine did other work meanwhile")
    print(json.dumps({"results": results, "provenance": provenance}, indent=2))


if __name__ == "__main__":
    main()
