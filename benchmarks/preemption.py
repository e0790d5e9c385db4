"""What it is worth to choose the victim by what computing it again costs, where memory is short.

    python benchmarks/preemption.py            # writes benchmarks/results/preemption.json
    python benchmarks/preemption.py --quick    # a quarter of the requests; writes nothing

**Load.** Two mixes on one Llama-3.1-8B on an A100 whose KV cache is cut to 2,000 blocks (32,000 tokens), so that memory
is what runs out: `azure`, the chat trace of Azure 2023, as fast as it takes to keep a queue; and `mixed`, prompts of 16
to 6,000 tokens with bursts (`examples/mixed.toml`). `fcfs`, chunks of 512, prefix cache on and off.

**Arms.** `recompute_last`, which is vLLM's own victim; `recompute_cheapest` with its bound of 8, and with none; and a
victim drawn by lot, which is the control: what choosing freely is worth by itself.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from provenance import of_simulated

from rota.base.config import load_toml
from rota.base.instant import Duration, to_seconds
from rota.serving.api import Capability, EngineCapabilities, MemoryView, SequenceView, VictimOrder
from rota.serving.metrics.definitions import RequestRecord
from rota.serving.predictors.step_time.profiles import load_profile
from rota.serving.sim.run import SimulationConfig, simulate
from rota.serving.stack import Parameters, StackConfig
from rota.serving.workload.generator import SyntheticWorkload

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "preemption.json"
DATA = Path(os.environ.get("ROTA_DATA") or ROOT.parent / "shared") / "traces"
AZURE = DATA / "azure2023" / "AzureLLMInferenceTrace_conv.csv"
MIXED = ROOT / "examples" / "mixed.toml"
PROFILE = "llama-3.1-8b-a100"
SEED = 1
RATES = {"azure": 4.5, "mixed": 5.0}
"""Requests a second."""
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "recompute_last": ("recompute_last", {}),
    "recompute_cheapest": ("recompute_cheapest", {}),
    "recompute_cheapest, no bound": ("recompute_cheapest", {"preempted_at_most": 10**9}),
    "random": (f"{Path(__file__).stem}:RandomVictim", {}),
}


class RandomVictim:
    """The control: any of the candidates, by lot, and the same lots in each run."""

    requires: EngineCapabilities = frozenset({Capability.PREEMPT_RECOMPUTE, Capability.CHOOSE_VICTIM})
    victim_order: VictimOrder = "chosen"

    def __init__(self) -> None:
        self._lots = random.Random(SEED)

    def victim(self, view: MemoryView, candidates: Sequence[SequenceView], needy: SequenceView) -> SequenceView | None:
        return self._lots.choice(candidates) if candidates else None


def play(load: str, arm: str, num_requests: int, caching: bool, seed: int) -> list[RequestRecord]:
    memory, parameters = ARMS[arm]
    parts = Parameters(batch={"chunk_size": 512}, memory=parameters, admission={"max_unfinished": 10**9})
    stack = StackConfig(batch="stall_free_chunks", memory=memory, parameters=parts)
    return simulated(stack, load, num_requests, caching, seed)


def simulated(stack: StackConfig, load: str, num_requests: int, caching: bool, seed: int) -> list[RequestRecord]:
    """One of the loads through a stack, on the engine whose memory is short."""
    limits = msgspec.structs.replace(
        load_profile(PROFILE).instance_limits(), num_blocks=2000, enable_prefix_caching=caching
    )
    workload = load_toml(MIXED, SyntheticWorkload) if load == "mixed" else None
    config = SimulationConfig(
        trace=AZURE if workload is None else MIXED,
        workload=workload,
        stack=stack,
        profile=PROFILE,
        num_requests=num_requests,
        rate=RATES[load],
        seed=seed,
        limits=limits,
    )
    return simulate(config, with_digest=False).records


def judge(records: Sequence[RequestRecord]) -> dict[str, float]:
    finished = [each for each in records if each.status == "finished"]
    found: dict[str, float] = {
        "num_finished": len(finished),
        "num_preemptions": sum(each.num_preemptions for each in records),
        "num_preemptions_of_one_max": max(each.num_preemptions for each in records),
        "makespan_seconds": round(to_seconds(Duration(max(each.finished_at for each in records))), 1),
    }
    for name in ("ttft", "tpot", "e2e"):
        values = sorted(to_seconds(Duration(value)) for each in finished if (value := getattr(each, name)) is not None)
        found[f"mean_{name}_seconds"] = round(sum(values) / len(values), 4)
        found[f"p99_{name}_seconds"] = round(values[int(0.99 * (len(values) - 1))], 4)
    return found


def mean_of(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: round(sum(one[key] for one in found) / len(found), 4) for key in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    is_quick = parser.parse_args().quick
    began = time.process_time()
    seeds = range(1, 2 if is_quick else 4)
    results: dict[str, Any] = {}
    for load in RATES:
        for caching in (True, False):
            name = f"{load}, {'with' if caching else 'without'} prefix cache"
            results[name] = {}
            for arm in ARMS:
                rows = [judge(play(load, arm, 300 if is_quick else 1200, caching, seed)) for seed in seeds]
                results[name][arm] = mean_of(rows)
                print(f"{name}: {arm}: {results[name][arm]}", flush=True)
    if not is_quick:
        note = "simulated, so the same on any machine; the mean over the seeds"
        provenance = of_simulated("python benchmarks/preemption.py", began, seeds, note)
        RESULTS.write_text(json.dumps({"provenance": provenance, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
