"""Splitwise's claims (ISCA 2024) with its own measured step times: pools of prefill and decode machines, of one kind or
of two, against machines that do both, at equal power and at equal cost.

    python benchmarks/splitwise.py             # half an hour of CPU; writes benchmarks/results/splitwise.json
    python benchmarks/splitwise.py --quick     # a small fleet, one case; writes nothing

Machines, cost and power are those of the authors' simulator: an A100 costs 2.21 and an H100 4.76 a GPU hour, a DGX
takes 24.8 and 44 units of power, an H100 with its power capped 0.7 of that. The budget is what 16 H100 machines take,
or cost, or 0.8 of that; theirs is that of 40. Designs are named as there: `HA`
has H100 for prompts and A100 for tokens, `HHcap` caps the token machines. For each design the pool sizes that use the
budget up are searched, in steps of 5 and then around the best.

A load is met where every request ends and all nine targets are met: p50, p90 and p99 of the slowdown against an A100
that does nothing else, at most 2, 3 and 6 for TTFT, 1.25, 1.5 and 5 for the time between tokens and for the whole.
Throughput is the highest Poisson rate that is met, by bisection to 3 %, over 45 seconds of arrivals.

Conversations have the lengths of Azure's trace of 2023. The coding trace is not at hand: its lengths are drawn from
log-normal distributions with the mean, deviation, least and most that the authors published of it.

Arms beside theirs: the baselines with `stall_free_chunks`, chunked prefills in place of pools (an ablation); the best
pools with nothing sent during the prefill over links of 64 Gb/s; the best pools with their sizes swapped (a control).
And, for BLOOM at equal power, all once more with decode times as the authors' simulator looks them up, which is as if a
batch of 64 took as long as one of 1 (see `rota.serving.predictors.step_time.phases`).
"""

import argparse
import csv
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rota import __version__
from rota.base.instant import Duration, Instant
from rota.serving.assemble import SystemConfig
from rota.serving.metrics.definitions import RequestRecord
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec, Role
from rota.serving.model.request import Request, RequestId
from rota.serving.predictors.step_time.phases import PhasesStepTime
from rota.serving.sim.cluster import SimulatedCluster, WorldOptions
from rota.serving.sim.migration import Transfer
from rota.serving.stack import Parameters, StackConfig

DATA = Path(os.environ.get("ROTA_DATA", Path(__file__).parents[2] / "shared"))
TABLE = DATA / "profiles" / "splitwise" / "perf_model.csv"
CONVERSATIONS = DATA / "traces" / "azure2023" / "AzureLLMInferenceTrace_conv.csv"
RESULTS = Path(__file__).parent / "results" / "splitwise.json"

HARDWARE = {"A": "a100-80gb", "H": "h100-80gb", "C": "h100-80gb-pcap"}
COST = {"A": 2.21, "H": 4.76, "C": 4.76}
POWER = {"A": 24.8, "H": 44.0, "C": 44.0 * 0.7}
BUDGETS = {"power": (POWER, 1.0), "cost": (COST, 1.0), "cost less 20 %": (COST, 0.8)}
"""What must be equal, and to what share of the H100 machines' own."""
DESIGNS = {"AA": ("A", "A"), "HH": ("H", "H"), "HA": ("H", "A"), "HHcap": ("H", "C")}
BASELINES = {"Baseline-A100": "A", "Baseline-H100": "H"}
SLOWDOWNS = {"ttft": (2.0, 3.0, 6.0), "tbt": (1.25, 1.5, 5.0), "e2e": (1.25, 1.5, 5.0)}
QUANTILES = (50, 90, 99)
SPAN = 45.0
"""Seconds of arrivals."""

# 8 x 80 GB for weights in 16 bits and KV, as the authors' simulator has it.
KV_BYTES = {"bloom-176b": 2 * 70 * 14336 * 2, "llama2-70b": 2 * 80 * 8 * 128 * 2}
WEIGHT_BYTES = {"bloom-176b": 2 * 176e9, "llama2-70b": 2 * 70e9}
LINK = {"published": (200e9, 0.9), "64 Gb/s, nothing ahead": (8e9, 0.0)}


@dataclass(frozen=True, slots=True)
class Arm:
    """A fleet and how it is run."""

    model: str
    workload: str
    prefill: tuple[str, int]
    """Kind of machine and how many; with no decode machines they do both."""
    decode: tuple[str, int] = ("", 0)
    batch: str = "vllm_default"
    link: str = "published"
    flat_decodes: bool = False

    @property
    def machines(self) -> list[tuple[str, Role]]:
        (kind, count), (other, num_others) = self.prefill, self.decode
        role = Role.PREFILL if num_others else Role.MIXED
        return [(kind, role)] * count + [(other, Role.DECODE)] * num_others

    def total(self, price: dict[str, float]) -> float:
        return sum(price[kind] for kind, _ in self.machines)


class FlatDecodes(PhasesStepTime):
    """Decode steps as the authors' simulator has them: the time of one sequence, however many there are."""

    def step_time(
        self, *, prefills: Sequence[tuple[int, int]], num_decodes: int, decode_kv_tokens: int, now: Instant = Instant(0)
    ) -> int:
        if prefills:
            return super().step_time(prefills=prefills, num_decodes=num_decodes, decode_kv_tokens=decode_kv_tokens)
        return super().step_time(prefills=(), num_decodes=min(num_decodes, 1), decode_kv_tokens=0)

    def decode_run(self, num_decodes: int, decode_kv_tokens: int, num_steps: int) -> list[int]:
        return super().decode_run(min(num_decodes, 1), 0, num_steps)


@cache
def step_time(model: str, kind: str, *, flat: bool = False) -> PhasesStepTime:
    return (FlatDecodes if flat else PhasesStepTime)(table=str(TABLE), model=model, hardware=HARDWARE[kind])


@cache
def lengths(workload: str) -> np.ndarray:
    """Prompt and output lengths to draw from, by row."""
    if workload == "conversation":
        with CONVERSATIONS.open(encoding="utf-8") as file:
            rows = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
        return np.asarray([row for row in rows if min(row) > 0])
    drawn = np.random.default_rng(2024)
    prompts = np.clip(log_normal(drawn, 2048, 1973), 3, 7437)
    outputs = np.clip(log_normal(drawn, 28, 60), 6, 1899)
    return np.stack([prompts, outputs], axis=1).astype(int)


def log_normal(drawn: np.random.Generator, mean: float, deviation: float, size: int = 20_000) -> np.ndarray:
    variance = np.log(1 + (deviation / mean) ** 2)
    return drawn.lognormal(np.log(mean) - variance / 2, np.sqrt(variance), size)


def limits_of(model: str) -> InstanceLimits:
    num_tokens = int((640e9 - WEIGHT_BYTES[model]) / KV_BYTES[model])
    return InstanceLimits(
        num_blocks=num_tokens // 16,
        max_num_seqs=512,
        max_num_batched_tokens=2048,
        max_model_len=16_384,
        enable_prefix_caching=False,
    )


def requests_of(workload: str, rate: float, span: float, seed: int) -> Iterator[tuple[Request, int]]:
    drawn = np.random.default_rng(seed)
    table = lengths(workload)
    at, number = 0.0, 0
    while (at := at + drawn.exponential(1 / rate)) < span:
        num_prompt_tokens, num_output_tokens = map(int, table[drawn.integers(len(table))])
        yield Request(RequestId(f"r{number}"), Instant(round(at * 1e9)), num_prompt_tokens, 2048), num_output_tokens
        number += 1


def play(arm: Arm, rate: float, span: float, seed: int = 1) -> tuple[list[RequestRecord], dict[str, Any]]:
    """The requests of a rate through a fleet, and what became of its moves."""
    bytes_per_second, ahead = LINK[arm.link]
    limits = limits_of(arm.model)
    specs = tuple(
        InstanceSpec(InstanceId(f"i{number:02d}"), limits, role) for number, (_, role) in enumerate(arm.machines)
    )
    step_times = {
        spec.id: step_time(arm.model, kind, flat=arm.flat_decodes)
        for spec, (kind, _) in zip(specs, arm.machines, strict=True)
    }
    expected = int(lengths(arm.workload)[:, 1].mean())
    is_split = arm.decode[1] > 0
    parameters = Parameters(dispatch={"expected_output_tokens": expected} if is_split else {})
    stack = StackConfig(
        batch=arm.batch, dispatch="pools" if is_split else "least_outstanding_tokens", parameters=parameters
    )
    world = SimulatedCluster(
        SystemConfig(stack, specs),
        requests_of(arm.workload, rate, span, seed),
        step_time(arm.model, "A"),
        WorldOptions(
            report_interval=Duration(0),
            transfer=Transfer(
                bytes_per_second=bytes_per_second,
                kv_bytes_per_token=KV_BYTES[arm.model],
                share_sent_in_prefill=ahead,
            ),
        ),
        step_times=step_times,
    )
    world.run()
    counts = world.cluster.migration_counts()
    moves = {
        "num_moved": counts.num_committed,
        "num_given_up": sum(counts.num_aborted.values()) + sum(counts.num_dropped.values()),
        "mean_downtime_ms": counts.downtime / 1e6 / max(1, counts.num_committed),
        "num_preemptions": sum(machine.statistics().num_preemptions for machine in world.machines()),
    }
    return world.records, moves


def slowdowns(model: str, records: Sequence[RequestRecord]) -> dict[str, list[float]]:
    """p50, p90 and p99 of the slowdown against an A100 that has nothing else to do."""
    alone = step_time(model, "A")
    token = alone.step_time(prefills=(), num_decodes=1, decode_kv_tokens=0)
    found: dict[str, list[float]] = {name: [] for name in SLOWDOWNS}
    for record in records:
        assert record.first_token_at is not None and record.finished_at is not None
        prompt = alone.step_time(prefills=[(record.num_prompt_tokens, 0)], num_decodes=0, decode_kv_tokens=0)
        num_more = record.num_output_tokens - 1
        found["ttft"].append((record.first_token_at - record.arrived_at) / prompt)
        found["e2e"].append((record.finished_at - record.arrived_at) / (prompt + num_more * token))
        if num_more:
            found["tbt"].append((record.finished_at - record.first_token_at) / num_more / token)
    return {name: [float(each) for each in np.percentile(values, QUANTILES)] for name, values in found.items()}


def is_met(arm: Arm, rate: float, span: float) -> bool:
    records, _ = play(arm, rate, span)
    if not records or any(record.status != "finished" for record in records):
        return False
    found = slowdowns(arm.model, records)
    return all(
        value <= bound for name, bounds in SLOWDOWNS.items() for value, bound in zip(found[name], bounds, strict=True)
    )


def throughput(arm: Arm, span: float, least: float = 0.5) -> float:
    """The highest rate that is met, requests a second, to 3 %; 0 where `least` is not."""
    low, high = least, 1.5 * least
    if not is_met(arm, low, span):
        return 0.0
    while is_met(arm, high, span):
        low, high = high, 1.5 * high
    while high > 1.03 * low:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if is_met(arm, middle, span) else (low, middle)
    return low


@dataclass(frozen=True, slots=True)
class Case:
    """A load, and what is equal."""

    model: str
    workload: str
    equal: str
    num_h100: int = 16
    flat_decodes: bool = False


CASES = (
    *(Case("bloom-176b", workload, equal) for workload in ("conversation", "coding") for equal in BUDGETS),
    *(Case("bloom-176b", workload, "power", flat_decodes=True) for workload in ("conversation", "coding")),
    Case("llama2-70b", "conversation", "power"),
)


def designs(case: Case) -> dict[str, dict[int, Arm]]:
    """The fleets of each design that use the budget up, by how many machines prefill."""
    price, share = BUDGETS[case.equal]
    most = share * case.num_h100 * price["H"] + 1e-6
    model, workload, flat = case.model, case.workload, case.flat_decodes
    found: dict[str, dict[int, Arm]] = {}
    for name, kind in BASELINES.items():
        count = int(most / price[kind])
        arm = Arm(model, workload, (kind, count), flat_decodes=flat)
        found[name] = {count: arm}
        found[f"{name}, stall_free_chunks"] = {count: replace(arm, batch="stall_free_chunks")}
    for name, (prompt, token) in DESIGNS.items():
        found[f"Splitwise-{name}"] = {
            num_prompt: Arm(model, workload, (prompt, num_prompt), (token, num_token), flat_decodes=flat)
            for num_prompt in range(1, int(most / price[prompt]) + 1)
            if (num_token := int((most - num_prompt * price[prompt]) / price[token])) >= 1
        }
    return found


def best_of(arms: dict[int, Arm], span: float) -> tuple[Arm, float]:
    """The fleet with the highest throughput: every fifth size, then those around the best. A size is measured only
    where it beats the best so far by 3 %."""
    sizes = sorted(arms)
    coarse = [size for size in sizes if size % 5 == 0] if len(sizes) > 8 else sizes
    middle = coarse[len(coarse) // 2]
    best, rate = middle, 0.0
    for stage in (sorted(coarse, key=lambda size: abs(size - middle)), None):
        for size in stage or [best + step for step in (-2, -1, 1, 2) if best + step in arms and len(sizes) > 8]:
            found = throughput(arms[size], span, max(1.03 * rate, 0.5))
            if found > rate:
                best, rate = size, found
    return arms[best], rate


def shown(arm: Arm, rate: float, span: float) -> dict[str, Any]:
    records, moves = play(arm, rate, span) if rate else ([], {})
    return {
        "machines": [arm.prefill, arm.decode] if arm.decode[1] else [arm.prefill],
        "throughput_rps": rate,
        "cost": arm.total(COST),
        "power": arm.total(POWER),
        **({"slowdown_p50_p90_p99": slowdowns(arm.model, records), **moves} if records else {}),
    }


def search(case: Case) -> dict[str, Any]:
    """The best fleet of each design within a budget, and two variants of the best of all."""
    best = {}
    for name, arms in designs(case).items():
        best[name] = best_of(arms, SPAN)
        tell(case, name, *best[name])
    winner = max((name for name in best if name.startswith("Splitwise")), key=lambda name: best[name][1])
    arm = best[winner][0]
    swapped = replace(arm, prefill=(arm.prefill[0], arm.decode[1]), decode=(arm.decode[0], arm.prefill[1]))
    slow = replace(arm, link="64 Gb/s, nothing ahead")
    for what, other in (("64 Gb/s, nothing ahead", slow), ("pool sizes swapped", swapped)):
        best[f"{winner}, {what}"] = other, throughput(other, SPAN)
        tell(case, f"{winner}, {what}", *best[f"{winner}, {what}"])
    return {name: shown(arm, rate, SPAN) for name, (arm, rate) in best.items()}


def tell(case: Case, name: str, arm: Arm, rate: float) -> None:
    say(f"{case}: {name} {arm.prefill} {arm.decode}: {rate:.2f}/s, cost {arm.total(COST):.1f}, "
        f"power {arm.total(POWER):.0f}")  # fmt: skip


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small fleet, one case; writes nothing")
    options = parser.parse_args()
    cases = []
    for case in CASES[:1] if options.quick else CASES:
        began = time.process_time()
        case = replace(case, num_h100=5) if options.quick else case
        found = search(case)
        cases.append({**asdict(case), "designs": found, "cpu_seconds": round(time.process_time() - began)})
        result = {
            "provenance": {
                "date": datetime.now(UTC).date().isoformat(),
                "rota": __version__,
                "platform": f"{platform.system()} {platform.machine()}",
                "num_cpus": os.cpu_count(),
                "span_seconds": SPAN,
            },
            "cases": cases,
        }
        if not options.quick:
            RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
