"""One run of sched-sim 0.2.1 in a process of its own, by a Python that has it: `run_sched_sim.py '{…}'`.

One engine, chunks of 512 tokens, at most 256 sequences, its A100. Imports nothing of Rota's. Timed as Rota is."""

import json
import resource
import sys
import time
from importlib.metadata import version

from sched_sim.core.event_engine import Simulator  # type: ignore[import-not-found]
from sched_sim.hardware.presets import get_hardware_profile  # type: ignore[import-not-found]
from sched_sim.schedulers.factory import create_scheduler  # type: ignore[import-not-found]
from sched_sim.workloads.trace_loader import load_trace_file  # type: ignore[import-not-found]


def main() -> None:
    options = json.loads(sys.argv[1])
    began = time.process_time()
    hardware = get_hardware_profile("a100")
    simulator = Simulator(hardware, create_scheduler("chunked", hardware, token_budget=512, max_batch_size=256))
    simulator.submit_workload(load_trace_file(options["trace"]))
    simulator.run()
    cpu_seconds = time.process_time() - began
    requests = simulator.all_requests
    ended = [request for request in requests if request.completed_at is not None]
    print(
        json.dumps(
            {
                "cpu_seconds": cpu_seconds,
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "num_steps": len(simulator.iteration_records),
                "outcome": {
                    "num_finished": len(ended),
                    "mean_ttft_ms": sum(r.first_token_at - r.arrived_at for r in ended) / len(ended) * 1e3,
                    "mean_e2e_ms": sum(r.completed_at - r.arrived_at for r in ended) / len(ended) * 1e3,
                },
                "version": version("sched-sim"),
            }
        )
    )


if __name__ == "__main__":
    main()
