"""What moving running requests is worth, in the setting of Llumnix (OSDI 2024), simulated.

    python benchmarks/rescheduling.py            # about ten CPU minutes; writes benchmarks/results/rescheduling.json
    python benchmarks/rescheduling.py --quick    # a tenth of the requests; writes nothing

Sixteen instances of LLaMA-7B on something like an A10. Lengths of a bounded power law with means of 128, 256 or 512
tokens (at most 6,144), Poisson and bursty arrivals (gamma gaps, coefficient of variation 4). Every arm gets the same
requests at the same instants:

* `round_robin`: the paper's first baseline;
* `load`: fewest outstanding tokens by the router's own account, a baseline that the paper does not have;
* `freeness`: dispatch by virtual usage, nothing moves: what the paper calls INFaaS++ is near it;
* `freeness, moving`: the same dispatch, and `balance_load`;
* `round_robin, moving`: the control that says what moving alone does for a bad dispatch.

So the gain of the whole over `round_robin` falls into the share of dispatch and the share of moving. The rate is where
`load` has a p99 TTFT of 2 or 10 seconds, found by bisection: a fleet at its knee, and one beyond it.

Step times are arithmetic over data sheets, not measurements: 13.5 GB of weights at 600 GB/s a step, 14 GFLOP a new
token at half of 125 TFLOP/s, 512 KiB of KV a context token at 600 GB/s. Capacity is the paper's 13,616 tokens.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rota import __version__
from rota.base.instant import Instant, milliseconds
from rota.base.random_streams import RandomStreams
from rota.serving.assemble import SystemConfig
from rota.serving.metrics.definitions import RequestRecord
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.model.request import Request
from rota.serving.predictors.step_time.affine import AffineStepTime
from rota.serving.sim.cluster import SimulatedCluster, WorldOptions
from rota.serving.sim.migration import Transfer
from rota.serving.stack import StackConfig
from rota.serving.workload.arrival_process import ArrivalProcess
from rota.serving.workload.arrivals import to_request
from rota.serving.workload.distributions import Lengths
from rota.serving.workload.generator import RequestClass, SyntheticWorkload, generate

RESULTS = Path(__file__).parent / "results" / "rescheduling.json"
LIMITS = InstanceLimits(num_blocks=851, max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=8192)
KV_BYTES = 2 * 32 * 4096 * 2
STEP_TIME = AffineStepTime(base_ms=22.5, token_us=224.0, kv_token_ns=KV_BYTES / 600.0)
WORLD = WorldOptions(
    report_interval=milliseconds(200),
    report_delay=milliseconds(5),
    transfer=Transfer(kv_bytes_per_token=KV_BYTES),
)
MAX_LENGTH = 6144
NUM_INSTANCES = 16
MOVING = "balance_load"
ARMS = {
    "round_robin": StackConfig(dispatch="round_robin"),
    "load": StackConfig(dispatch="least_outstanding_tokens"),
    "freeness": StackConfig(dispatch="virtual_usage"),
    "freeness, moving": StackConfig(dispatch="virtual_usage", migration=MOVING),
    "round_robin, moving": StackConfig(dispatch="round_robin", migration=MOVING),
}


@dataclass(frozen=True, slots=True)
class Case:
    """A load, up to its rate: that at which the p99 TTFT of `load` is `knee_seconds`."""

    prompt_mean: int
    output_mean: int
    cv: float
    knee_seconds: float

    @property
    def name(self) -> str:
        arrivals = "Poisson" if self.cv == 1 else f"gamma, cv {self.cv:g}"
        return f"{self.prompt_mean} in, {self.output_mean} out, {arrivals}, p99 TTFT of `load` {self.knee_seconds:g} s"


CASES = (
    Case(128, 128, 1, 2),
    Case(256, 256, 1, 2),
    Case(512, 512, 1, 2),
    Case(512, 512, 1, 10),
    Case(128, 512, 1, 2),
    Case(512, 128, 1, 2),
    Case(256, 256, 4, 2),
    Case(512, 512, 4, 10),
)


def power_law(mean: int) -> Lengths:
    """Lengths from 1 to `MAX_LENGTH` whose probability falls as a power, with the power that gives the mean."""
    values = np.arange(1, MAX_LENGTH + 1, dtype=np.float64)
    low, high = 0.0, 4.0
    for _ in range(60):
        power = (low + high) / 2
        weights = values**-power
        low, high = (power, high) if float((values * weights).sum() / weights.sum()) > mean else (low, power)
    cumulative = np.cumsum(weights) / weights.sum()
    places = [0.0, *np.linspace(0.02, 0.98, 49), *(1 - np.geomspace(0.015, 0.0005, 16))]
    quantiles = {f"{place:.4f}": int(np.searchsorted(cumulative, place) + 1) for place in places}
    return Lengths(quantiles | {"0.0000": 1, "1": MAX_LENGTH})


def requests_of(case: Case, rate: float, num_requests: int, seed: int, high: float = 0.0) -> list[tuple[Request, int]]:
    """The requests with their true output lengths; a share `high` of them is of class -1."""
    classes = (RequestClass(high, priority=-1), RequestClass(1 - high)) if high else ()
    workload = SyntheticWorkload(
        num_requests,
        ArrivalProcess(rate, cv=case.cv),
        power_law(case.prompt_mean),
        power_law(case.output_mean),
        classes=classes,
    )
    return [
        to_request(arrival, f"r{number}", Instant(0), max_model_len=LIMITS.max_model_len, max_tokens=MAX_LENGTH)
        for number, arrival in enumerate(generate(workload, RandomStreams(seed)))
        if arrival.num_prompt_tokens + arrival.num_output_tokens <= LIMITS.max_model_len
    ]


@dataclass(frozen=True, slots=True)
class Played:
    """One run."""

    records: list[RequestRecord]
    counts: dict[str, Any]
    num_preemptions: int
    cpu_seconds: float


def play(stack: StackConfig, requests: Sequence[tuple[Request, int]], num_instances: int = NUM_INSTANCES) -> Played:
    """The requests through a fleet."""
    began = time.process_time()
    instances = tuple(InstanceSpec(InstanceId(f"i{number:02d}"), LIMITS) for number in range(num_instances))
    world = SimulatedCluster(SystemConfig(stack, instances), iter(requests), STEP_TIME, WORLD)
    world.run()
    statistics = [machine.statistics() for machine in world.machines()]
    moves = world.cluster.migration_counts()
    counts = {
        "num_committed": moves.num_committed,
        "num_aborted": sum(moves.num_aborted.values()),
        "mean_downtime_ms": moves.downtime / 1e6 / moves.num_committed if moves.num_committed else None,
    }
    num_preemptions = sum(one.num_preemptions for one in statistics)
    return Played(world.records, counts, num_preemptions, time.process_time() - began)


def latencies(records: Sequence[RequestRecord]) -> dict[str, float]:
    """Prefill latency is TTFT; decode latency is the mean time of a token after the first, as in the paper. In ms."""
    ended = [record for record in records if record.status == "finished" and record.first_token_at is not None]
    ttft = np.asarray([record.first_token_at - record.arrived_at for record in ended]) / 1e6  # type: ignore[operator]
    tpot = np.asarray([
        (record.finished_at - record.first_token_at) / (record.num_output_tokens - 1)  # type: ignore[operator]
        for record in ended
        if record.num_output_tokens > 1
    ]) / 1e6  # fmt: skip
    return {
        "num_finished": len(ended),
        "ttft_mean": float(ttft.mean()),
        "ttft_p99": float(np.percentile(ttft, 99)),
        "tpot_mean": float(tpot.mean()),
        "tpot_p99": float(np.percentile(tpot, 99)),
    }


def knee(case: Case, num_requests: int) -> float:
    """Requests a second at which the p99 TTFT of `load` is what the case asks for, to 3 %."""
    low, high = 1.0, 256.0
    while high > 1.03 * low:
        rate = (low * high) ** 0.5
        records = play(ARMS["load"], requests_of(case, rate, num_requests, seed=99)).records
        is_below = latencies(records)["ttft_p99"] < 1000 * case.knee_seconds
        low, high = (rate, high) if is_below else (low, rate)
    return low


def compare(case: Case, num_requests: int) -> dict[str, Any]:
    """All arms on one load."""
    rate = knee(case, num_requests)
    requests = requests_of(case, rate, num_requests, seed=1)
    arms = {}
    for name, stack in ARMS.items():
        played = play(stack, requests)
        arms[name] = {
            **latencies(played.records),
            "num_preemptions": played.num_preemptions,
            **played.counts,
            "cpu_seconds": played.cpu_seconds,
        }
        say(f"{case.name}: {name}: p99 TTFT {arms[name]['ttft_p99']:,.0f} ms, TPOT {arms[name]['tpot_p99']:.1f} ms, "
            f"{played.num_preemptions} preemptions, {arms[name]['num_committed']} moves")  # fmt: skip
    return {"case": case.name, "rate_rps": rate, "arms": arms}


def high_class(num_requests: int) -> dict[str, Any]:
    """One request in ten of a high class: mean latencies of each class with headroom, and without (the control)."""
    case = Case(256, 256, 4, 10)
    rate = knee(case, num_requests)
    requests = requests_of(case, rate, num_requests, seed=2, high=0.1)
    arms = {}
    for name, target in (("headroom", None), ("none", 1.0)):
        parameters = {} if target is None else {"high_load_target": target}
        stack = replace_parameters(ARMS["freeness, moving"], parameters)
        records = play(stack, requests).records
        arms[name] = {
            kind: latencies([record for record in records if (record.priority < 0) == is_high])
            for kind, is_high in (("high", True), ("rest", False))
        }
    return {"case": case.name, "rate_rps": rate, "arms": arms}


def replace_parameters(stack: StackConfig, parameters: dict[str, Any]) -> StackConfig:
    """The stack with these parameters of dispatch and migration, and classes in order inside."""
    given = msgspec.structs.replace(stack.parameters, dispatch=parameters, migration=parameters)
    return msgspec.structs.replace(stack, order="strict_priority", parameters=given)


def instances_saved(num_requests: int) -> dict[str, Any]:
    """How few instances each arm needs for a p99 TTFT no worse than that of `freeness` with sixteen."""
    case = Case(512, 512, 4, 10)
    requests = requests_of(case, knee(case, num_requests), num_requests, seed=3)
    bound = latencies(play(ARMS["freeness"], requests).records)["ttft_p99"]
    needed: dict[str, int | None] = {}
    for name in ("round_robin", "freeness", "freeness, moving"):
        needed[name] = next(
            (
                number
                for number in range(8, 33)
                if latencies(play(ARMS[name], requests, number).records)["ttft_p99"] <= bound
            ),
            None,
        )
        say(f"instances for a p99 TTFT of {bound:,.0f} ms: {name}: {needed[name]}")
    return {"case": case.name, "bound_ttft_p99_ms": bound, "num_instances": needed}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests; writes nothing")
    options = parser.parse_args()
    num_requests = 800 if options.quick else 8000
    result = {
        "provenance": {
            "date": datetime.now(UTC).date().isoformat(),
            "rota": __version__,
            "platform": f"{platform.system()} {platform.machine()}",
            "num_cpus": os.cpu_count(),
            "num_requests": num_requests,
        },
        "cases": [compare(case, num_requests) for case in CASES],
        "high_class": high_class(num_requests),
        "instances": instances_saved(num_requests),
    }
    if not options.quick:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
