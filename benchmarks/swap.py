"""What swapping to host memory would be worth beside computing again, before an engine has it.

    python benchmarks/swap.py            # writes benchmarks/results/swap.json
    python benchmarks/swap.py --quick    # a quarter of the requests; writes nothing

**Load.** 400 requests of each of the two mixes of `benchmarks/preemption.py`, on one Llama-3.1-8B on an A100 with 2,000
KV blocks. Orders: `fcfs`, in which only shortage preempts, and `least_attained_service`, which changes who runs all the
time, as FastSwitch's traces of priorities do.

**Arms**, each the one before and something more: computing again; swap block by block, each step waiting for all copies
(vLLM 0.3, FastSwitch's baseline); the same in groups of up to 60 blocks; steps running meanwhile; valid copies reused.
Host memory of 30,000 blocks (60 GB, as FastSwitch). A link of 24 GB/s and 320 us a copy call over all layers: assumed.
"""

import argparse
import json
import time
from typing import Any

import msgspec
from preemption import RATES, ROOT, judge, mean_of, simulated
from provenance import of_simulated

from rota.serving.metrics.definitions import RequestRecord
from rota.serving.model.swapping import SwapRules
from rota.serving.stack import Parameters, StackConfig

RESULTS = ROOT / "benchmarks" / "results" / "swap.json"
NAIVE = SwapRules(host_blocks=30_000, block_group=1, reuse=False, asynchronous=False)
ARMS: dict[str, SwapRules | None] = {
    "computed again": None,
    "block by block": NAIVE,
    "in groups": msgspec.structs.replace(NAIVE, block_group=60),
    "in groups, asynchronous": msgspec.structs.replace(NAIVE, block_group=60, asynchronous=True),
    "in groups, asynchronous, reused": msgspec.structs.replace(NAIVE, block_group=60, asynchronous=True, reuse=True),
}
ORDERS = ("fcfs", "least_attained_service")


def play(load: str, order: str, arm: str, num_requests: int, caching: bool, seed: int) -> list[RequestRecord]:
    stack = StackConfig(
        order=order,
        batch="stall_free_chunks",
        parameters=Parameters(batch={"chunk_size": 512}, admission={"max_unfinished": 10**9}),
        swap=ARMS[arm] or msgspec.UNSET,
    )
    return simulated(stack, load, num_requests, caching, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    is_quick = parser.parse_args().quick
    began = time.process_time()
    seeds = range(1, 2 if is_quick else 3)
    results: dict[str, Any] = {}
    for load in RATES:
        for order in ORDERS:
            for caching in (True, False):
                name = f"{load}, {order}, {'with' if caching else 'without'} prefix cache"
                results[name] = {}
                for arm in ARMS:
                    rows = [judge(play(load, order, arm, 100 if is_quick else 400, caching, seed)) for seed in seeds]
                    results[name][arm] = mean_of(rows)
                    print(f"{name}: {arm}: {results[name][arm]}", flush=True)
    if not is_quick:
        note = "simulated, so the same on any machine; the mean over the seeds; the link is assumed, not measured"
        provenance = of_simulated("python benchmarks/swap.py", began, seeds, note)
        RESULTS.write_text(json.dumps({"provenance": provenance, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
