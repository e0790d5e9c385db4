"""CPU seconds of a simulated run: 10,000 requests of the Azure conversation trace, Poisson at 6 a second, one instance.

    python benchmarks/simulator_speed.py > result.json

Policies and KV blocks are in the loop, the journal is off. Every run is a process of its own; the figures are the
median of five, with the lowest and the highest, and include nothing but the run itself (imports are not counted). The
profile says what the time goes to. Peers on the same workload come with the tuning of this loop; none is run here
yet."""

import argparse
import cProfile
import json
import os
import platform
import pstats
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rota import __version__
from rota.serving.sim.run import SimulationConfig, simulate

TARGET_CPU_SECONDS = 5.0
DATA = Path(os.environ.get("ROTA_DATA") or Path(__file__).parents[2] / "shared")
TRACE = DATA / "traces" / "azure2023" / "AzureLLMInferenceTrace_conv.csv"
CONFIG = SimulationConfig(trace=TRACE, num_requests=10_000, rate=6.0)
NUM_FUNCTIONS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        summary = simulate(CONFIG, with_digest=False).summary
        print(json.dumps({"cpu_seconds": summary.cpu_seconds, "peak_rss_mb": summary.peak_rss_mb,
                          "num_steps": summary.num_steps}))  # fmt: skip
        return
    runs = [json.loads(subprocess.run([sys.executable, __file__, "--once"], check=True, stdout=subprocess.PIPE,
                                      text=True).stdout) for _ in range(options.rounds)]  # fmt: skip
    seconds = [run["cpu_seconds"] for run in runs]
    median = statistics.median(seconds)
    result = {
        "cpu_seconds": {"median": median, "min": min(seconds), "max": max(seconds), "target": TARGET_CPU_SECONDS},
        "peak_rss_mb": max(run["peak_rss_mb"] for run in runs),
        "num_steps": runs[0]["num_steps"],
        "steps_per_cpu_second": runs[0]["num_steps"] / median,
        "where_the_time_goes": profile(),
        "provenance": {
            "rota": __version__,
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
            "trace": TRACE.name,
            "rounds": options.rounds,
        },
    }
    print(json.dumps(result, indent=2))


def profile() -> list[dict[str, Any]]:
    """The functions that take most of the time, by their own share of it, under a profiler that slows small ones."""
    profiler = cProfile.Profile()
    profiler.runcall(simulate, CONFIG, with_digest=False)
    stats = pstats.Stats(profiler)
    total = stats.total_tt  # type: ignore[attr-defined]
    rows = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:NUM_FUNCTIONS]  # type: ignore[attr-defined]
    return [
        {"function": f"{Path(file).name}:{name}", "share": round(own / total, 3), "calls": calls}
        for (file, _, name), (_, calls, own, _, _) in rows
    ]


if __name__ == "__main__":
    main()
