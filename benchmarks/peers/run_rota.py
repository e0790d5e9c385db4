"""One run of Rota's simulator in a process of its own: `python -m benchmarks.peers.run_rota '{"trace": …}'`.

Prints JSON. What is timed is the run with the reading of its trace and its summary, not the start of Python. With
`"hash_seed"` the journal is on, and its digest printed."""

import cProfile
import json
import pstats
import resource
import sys
import time
from pathlib import Path
from typing import Any

from rota.serving.sim.run import SimulationConfig, SimulationResult, simulate
from rota.serving.stack import StackConfig

NUM_FUNCTIONS = 15


def main() -> None:
    options: dict[str, Any] = json.loads(sys.argv[1])
    config = SimulationConfig(
        trace=Path(options["trace"]),
        num_instances=options.get("num_instances", 1),
        profile=options.get("profile", "llama-3.1-8b-a100"),
        stack=StackConfig(dispatch=options.get("dispatch", "round_robin")),
        num_requests=options.get("num_requests"),
        rate=options.get("rate"),
    )
    with_digest = options.get("with_digest", False)
    if options.get("where"):
        profiler = cProfile.Profile()
        profiler.runcall(simulate, config, with_digest=False)
        print(json.dumps(where_the_time_goes(profiler)))
        return
    began = time.process_time()
    result = simulate(config, with_digest=with_digest, keep_records=False)
    cpu_seconds = time.process_time() - began
    print(
        json.dumps(
            {
                "cpu_seconds": cpu_seconds,
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "num_steps": result.summary.num_steps,
                "outcome": outcome(result),
                "digest": result.summary.journal_digest,
            }
        )
    )


def outcome(result: SimulationResult) -> dict[str, float]:
    """What a user reads: enough to tell two runs apart, and to see that peers simulate alike loads."""
    summary = result.summary
    return {
        "num_finished": summary.num_finished,
        "mean_ttft_ms": summary.ttft_ms.mean,
        "p99_ttft_ms": summary.ttft_ms.p99,
        "mean_tpot_ms": summary.tpot_ms.mean,
        "mean_e2e_ms": summary.e2e_ms.mean,
        "prefix_hit_rate": summary.prefix_hit_rate,
        "num_preemptions": summary.num_preemptions,
    }


def where_the_time_goes(profiler: cProfile.Profile) -> list[dict[str, Any]]:
    """The functions with the largest shares of their own, under a profiler that makes small ones look slow."""
    stats = pstats.Stats(profiler)
    total = stats.total_tt  # type: ignore[attr-defined]
    rows = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:NUM_FUNCTIONS]  # type: ignore[attr-defined]
    return [
        {"function": f"{Path(file).name}:{name}", "share": round(own / total, 3), "num_calls": calls}
        for (file, _, name), (_, calls, own, _, _) in rows
    ]


if __name__ == "__main__":
    main()
