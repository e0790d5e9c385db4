"""One run of DynoSim (ai-dynamo 1.6.1) in a process of its own, by a Python that has it: `run_dynosim.py '{…}'`.

Its default timing and engine settings. Imports nothing of Rota's. Timed as Rota is: the reading of the trace included,
the start of Python not."""

import json
import resource
import sys
import time
from importlib.metadata import version

from dynamo.replay.api import run_trace_replay  # type: ignore[import-not-found]


def main() -> None:
    options = json.loads(sys.argv[1])
    began = time.process_time()
    report = run_trace_replay(
        options["trace"],
        num_workers=options["num_instances"],
        router_mode=options["router_mode"],
        trace_block_size=512,
    )
    cpu_seconds = time.process_time() - began
    summary = report.summary
    print(
        json.dumps(
            {
                "cpu_seconds": cpu_seconds,
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                # It does not count its steps.
                "num_steps": None,
                "outcome": {
                    "num_finished": summary["completed_requests"],
                    "mean_ttft_ms": summary["mean_ttft_ms"],
                    "p99_ttft_ms": summary["p99_ttft_ms"],
                    "mean_tpot_ms": summary["mean_tpot_ms"],
                    "mean_e2e_ms": summary["mean_e2e_latency_ms"],
                    "prefix_hit_rate": summary["prefix_cache_reused_ratio"],
                },
                "version": version("ai-dynamo-runtime"),
            }
        )
    )


if __name__ == "__main__":
    main()
