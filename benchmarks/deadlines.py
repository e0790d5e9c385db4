"""What it is worth to promise a first token or refuse: goodput, and promises kept, under overload.

    python benchmarks/deadlines.py            # writes benchmarks/results/deadlines.json
    python benchmarks/deadlines.py --quick    # a quarter of the requests, fewer limits; writes nothing

**Loads.** Azure 2023 (chat, the first 4,000 requests) and Mooncake's conversation trace (the first 1,200), two
instances of Llama-3.1-8B on an A100 (Azure) and an H100 (Mooncake), chunks of 512 and 2,048 tokens. Promised: 2 s to
the first token and 100 ms a token (Azure), 8 s and 150 ms (Mooncake). **Capacity** is the rate at which requests end
when all of the trace comes at once and nobody is refused; the trace's own arrivals, bursts as they are, are sped up to
0.7, 1, 1.4 and 2 times that.

**Arms**, with the same dispatch, order and batch policies: `deadline_admission` (margin 10 %); `bounded_queue` with the
one limit that has the best goodput at that load, found by search (an operator who knew the load could do no better with
one number); no limit. Nobody knows lengths: a request declares the cap of 2,048 tokens.

A promise is kept by an admitted request that ended with both targets met. Goodput counts those, by second of the trace.
**Errors**: the world's steps take 0.7 to 1.3 times what the policy's predictor says.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rota import __version__
from rota.base.instant import Duration, Instant, milliseconds, seconds, to_seconds
from rota.base.random_streams import RandomStreams
from rota.serving.api import StepTimePredictor
from rota.serving.assemble import SystemConfig
from rota.serving.metrics.definitions import RequestRecord
from rota.serving.model.instance import InstanceId, InstanceSpec
from rota.serving.model.request import SLO, Request
from rota.serving.predictors.step_time.profiles import load_profile
from rota.serving.sim.cluster import SimulatedCluster, WorldOptions
from rota.serving.stack import Parameters, StackConfig
from rota.serving.workload.arrivals import Arrival, to_request
from rota.serving.workload.formats import recognise

DATA = Path(os.environ.get("ROTA_DATA") or Path(__file__).parents[2] / "shared") / "traces"
RESULTS = Path(__file__).parent / "results" / "deadlines.json"
SEED = 1
NUM_INSTANCES = 2
TIMES_CAPACITY = (0.7, 1.0, 1.4, 2.0)
ERRORS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
STATIC_LIMITS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)


@dataclass(frozen=True)
class Load:
    """What arrives, what serves it, and what is promised."""

    name: str
    trace: Path
    num_requests: int
    profile: str
    chunk: int
    slo: SLO
    arrivals: Sequence[Arrival] = field(repr=False, default=())


class Scaled:
    """A predictor's step times, times a factor: the world where the policy's own are off."""

    def __init__(self, inner: StepTimePredictor, factor: float) -> None:
        self._inner = inner
        self._factor = factor

    def step_time(
        self, *, prefills: Sequence[tuple[int, int]], num_decodes: int, decode_kv_tokens: int, now: Instant = Instant(0)
    ) -> int:
        exact = self._inner.step_time(
            prefills=prefills, num_decodes=num_decodes, decode_kv_tokens=decode_kv_tokens, now=now
        )
        return round(exact * self._factor)


def loads(is_quick: bool) -> list[Load]:
    part = 4 if is_quick else 1
    wanted = [
        Load(
            "azure",
            DATA / "azure2023" / "AzureLLMInferenceTrace_conv.csv",
            4000 // part,
            "llama-3.1-8b-a100",
            512,
            SLO(ttft=seconds(2), tpot=milliseconds(100)),
        ),
        Load(
            "mooncake",
            DATA / "mooncake" / "conversation_trace.jsonl",
            1200 // part,
            "llama-3.1-8b-h100",
            2048,
            SLO(ttft=seconds(8), tpot=milliseconds(150)),
        ),
    ]
    return [Load(**{**vars(load), "arrivals": read(load)}) for load in wanted]


def read(load: Load) -> list[Arrival]:
    if not load.trace.exists():
        sys.exit(f"{load.trace} is not there; ROTA_DATA names the folder that has traces/")
    found: list[Arrival] = []
    for arrival in recognise(load.trace).read(load.trace, RandomStreams(SEED)):
        found.append(arrival)
        if len(found) == load.num_requests:
            break
    return found


def stack_of(load: Load, admission: str, parameters: Mapping[str, Any]) -> StackConfig:
    return StackConfig(
        batch="stall_free_chunks",
        dispatch="least_outstanding_tokens",
        admission=admission,
        parameters=Parameters(batch={"chunk_size": load.chunk}, admission=dict(parameters), profile=load.profile),
    )


def play(load: Load, stack: StackConfig, speedup: float, error: float = 1.0) -> list[RequestRecord]:
    """The records of the trace, so many times as fast; infinitely fast is all at once."""
    profile = load_profile(load.profile)
    limits = profile.instance_limits()
    first = load.arrivals[0].at or 0
    pairs: list[tuple[Request, int]] = []
    for number, arrival in enumerate(load.arrivals):
        at = 0 if speedup == float("inf") else round(((arrival.at or 0) - first) / speedup)
        pairs.append(
            to_request(
                arrival,
                f"r-{number}",
                Instant(0),
                max_model_len=limits.max_model_len,
                max_tokens=2048,
                slo=load.slo,
                arrived_at=Instant(at),
            )
        )
    instances = tuple(InstanceSpec(InstanceId(f"i{number}"), limits) for number in range(NUM_INSTANCES))
    predictor = profile.predictor() if error == 1.0 else Scaled(profile.predictor(), error)
    options = WorldOptions(step_overhead=Duration(round(profile.step_overhead() * error)))
    cluster = SimulatedCluster(SystemConfig(stack, instances, SEED), pairs, predictor, options)
    cluster.run()
    return cluster.records


def judge(load: Load, records: Sequence[RequestRecord]) -> dict[str, float]:
    """What came of them."""
    admitted = [each for each in records if each.status != "rejected"]
    kept = [each for each in admitted if is_kept(load, each)]
    span = to_seconds(Duration(max(each.arrived_at for each in records)))
    ttfts = sorted(
        to_seconds(Duration(each.first_token_at - each.arrived_at)) for each in admitted if each.first_token_at
    )
    return {
        "num_requests": len(records),
        "num_admitted": len(admitted),
        "share_kept_of_admitted": round(len(kept) / max(1, len(admitted)), 5),
        "share_kept_of_all": round(len(kept) / len(records), 5),
        "goodput_per_second": round(len(kept) / span, 4) if span else 0.0,
        # Who refuses the long keeps many promises with little work: this counts the work.
        "good_tokens_per_second": round(sum(each.num_prompt_tokens + each.num_output_tokens for each in kept) / span, 1)
        if span
        else 0.0,
        "mean_ttft_seconds": round(sum(ttfts) / max(1, len(ttfts)), 4),
        "p99_ttft_seconds": round(ttfts[int(0.99 * (len(ttfts) - 1))], 4) if ttfts else 0.0,
    }


def is_kept(load: Load, record: RequestRecord) -> bool:
    if record.status != "finished" or record.first_token_at is None:
        return False
    ttft, tpot = load.slo.ttft, load.slo.tpot
    assert ttft is not None
    assert tpot is not None
    decode = record.finished_at - record.first_token_at
    return record.first_token_at - record.arrived_at <= ttft and decode <= tpot * (record.num_output_tokens - 1)


def capacity_of(load: Load) -> float:
    """Requests per second when all are there from the beginning."""
    stack = stack_of(load, "bounded_queue", {"max_unfinished": 10**9})
    records = play(load, stack, float("inf"))
    return len(records) / to_seconds(Duration(max(each.finished_at for each in records)))


def measure(load: Load, is_quick: bool) -> dict[str, Any]:
    capacity = capacity_of(load)
    own = len(load.arrivals) / to_seconds(Duration((load.arrivals[-1].at or 0) - (load.arrivals[0].at or 0)))
    say(f"{load.name}: {capacity:.2f} requests per second are its capacity; the trace has {own:.2f}")
    promise = stack_of(load, "deadline_admission", {"step_tokens": load.chunk})
    rows: list[dict[str, Any]] = []
    for times in TIMES_CAPACITY:
        speedup = times * capacity / own
        row: dict[str, Any] = {"times_capacity": times, "speedup": round(speedup, 4)}
        row["deadline_admission"] = judge(load, play(load, promise, speedup))
        found = []
        for limit in STATIC_LIMITS[:: 3 if is_quick else 1]:
            stack = stack_of(load, "bounded_queue", {"max_unfinished": limit})
            found.append({"max_unfinished": limit, **judge(load, play(load, stack, speedup))})
        row["static_limits"] = found
        row["best_static"] = max(found, key=lambda each: each["goodput_per_second"])
        free = stack_of(load, "bounded_queue", {"max_unfinished": 10**9})
        row["no_limit"] = judge(load, play(load, free, speedup))
        row["off_by"] = {}
        if not is_quick and times in (1.0, 1.4):
            for error in ERRORS:
                row["off_by"][str(error)] = judge(load, play(load, promise, speedup, error))
        rows.append(row)
        ours, best = row["deadline_admission"], row["best_static"]
        say(
            f"  {times:.1f}: ours keeps {ours['share_kept_of_admitted']:.2%} of {ours['num_admitted']} admitted, "
            f"goodput {ours['goodput_per_second']:.2f}/s; best limit {best['max_unfinished']} keeps "
            f"{best['share_kept_of_admitted']:.2%} of {best['num_admitted']}, {best['goodput_per_second']:.2f}/s; "
            f"tokens {ours['good_tokens_per_second']:.0f} against {best['good_tokens_per_second']:.0f}/s; "
            f"no limit {row['no_limit']['goodput_per_second']:.2f}/s"
        )
        for error, each in row["off_by"].items():
            say(f"    steps × {error}: {each['share_kept_of_admitted']:.2%} kept, {each['goodput_per_second']:.2f}/s")
    ttft, tpot = load.slo.ttft, load.slo.tpot
    return {
        "capacity_per_second": round(capacity, 4),
        "slo": {"ttft_seconds": to_seconds(ttft or Duration(0)), "tpot_seconds": to_seconds(tpot or Duration(0))},
        "profile": load.profile,
        "chunk": load.chunk,
        "rows": rows,
    }


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    is_quick = parser.parse_args().quick
    began = time.process_time()
    results = {load.name: measure(load, is_quick) for load in loads(is_quick)}
    cpu = time.process_time() - began
    say(f"{cpu:.0f} s of CPU")
    if not is_quick:
        provenance = {
            "command": "python benchmarks/deadlines.py",
            "rota": __version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "cpu_seconds": round(cpu, 1),
            "seed": SEED,
            "note": "one run each; lengths declared as a cap of 2,048 tokens, never as the truth",
        }
        RESULTS.write_text(json.dumps({"provenance": provenance, "loads": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
