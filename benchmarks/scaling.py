"""What scaling is worth: instance-seconds against promises kept, on days made of a real trace and on a real hour.

    python benchmarks/scaling.py                # under 15 CPU minutes; writes benchmarks/results/scaling.json
    python benchmarks/scaling.py --only flat    # one load, written into the same file
    python benchmarks/scaling.py --quick        # some arms only; writes nothing

**azure**: a day made of the Azure trace of 2023 (chat requests of one hour, bursts as they were). The hour is
repeated end to end and thinned by a day's curve: two humps, the night at an eighth of the noon. So arrivals, lengths
and bursts are real, and the curve is ours. A day is squeezed into two hours, which makes starts twelve times as slow
against it as they are in life. Instances are like an A10 with LLaMA-7B (step times are arithmetic over its data
sheet, as in `rescheduling.py`). Promised: 2 s to the first token, 100 ms a token. Policies that learn a season are
shown two days before the one that is measured.

**mooncake**: the conversation trace as it is, one hour, Llama-3.1-8B on H100s (long prompts with shared prefixes).
Promised: 5 s, 100 ms.

**flat**: a negative control, as many requests as the azure day has, at a constant rate (Poisson). No policy can be
better than the best fleet that stays.

**controls** on the azure day, against the best forecasting setting: the sizes that its fleet had minute by minute, had
again without looking at the demand (which must do as well), and the same sizes at the wrong moments, in random orders
of stretches of ten minutes (which must do worse, or a gain was one of size alone, not of foresight); and the forecast
from a history in random order, which says how much comes and not when.

A promise is kept by a request that ended well with both times kept; attainment is their share of all that arrived on
the day. Instance-seconds count from the order of each instance until it is gone, starts and drains included. Each
policy is tuned on the day itself, as the fleets that stay are: of its settings that which costs least at 99 %
attainment counts, or else the best attainment. Starts take 100 s cold, 30 s where the weights are in memory.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from rota import __version__
from rota.base.instant import Duration, Instant, milliseconds, seconds, to_seconds
from rota.base.random_streams import RandomStreams, Stream
from rota.serving.api import FleetRules, StepTimePredictor
from rota.serving.assemble import SystemConfig
from rota.serving.metrics.definitions import RequestRecord
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.model.request import SLO, Request
from rota.serving.predictors.step_time.affine import AffineStepTime
from rota.serving.predictors.step_time.profiles import load_profile
from rota.serving.sim.cluster import SimulatedCluster, WorldOptions
from rota.serving.sim.fleet import StartUp
from rota.serving.stack import Parameters, StackConfig
from rota.serving.workload.arrivals import Arrival, to_request
from rota.serving.workload.formats import recognise

DATA = Path(os.environ.get("ROTA_DATA") or Path(__file__).parents[2] / "shared") / "traces"
RESULTS = Path(__file__).parent / "results" / "scaling.json"
SEED = 1
DAY = 7200
BIN = 30.0
GOAL = 0.99
KV_BYTES = 2 * 32 * 4096 * 2
A10 = AffineStepTime(base_ms=22.5, token_us=224.0, kv_token_ns=KV_BYTES / 600.0)
A10_LIMITS = InstanceLimits(num_blocks=851, max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=8192)
MINUTE = seconds(60)


@dataclass(frozen=True)
class Load:
    """What arrives, what serves it, and what was promised."""

    name: str
    slo: SLO
    limits: InstanceLimits
    step_time: StepTimePredictor
    dispatch: str
    arrivals: Sequence[tuple[int, Arrival]] = field(repr=False)
    """Nanoseconds since the beginning of the first day."""
    num_days: int
    day_seconds: float
    max_instances: int
    first_instances: int


@dataclass(frozen=True)
class Arm:
    """One setting of one policy."""

    name: str
    setting: str
    scaling: str = "none"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    demand: str = "holt_winters"
    demand_parameters: Mapping[str, Any] = field(default_factory=dict)
    num_static: int = 0
    start_up: StartUp = StartUp()
    needs_history: bool = False


# --- loads ------------------------------------------------------------------------------------------------------------


def azure_days(num_days: int, stream: Stream) -> list[tuple[int, Arrival]]:
    """The hour end to end, thinned by the day's curve."""
    hour = [each for each in read(DATA / "azure2023" / "AzureLLMInferenceTrace_conv.csv") if each[0] < seconds(3600)]
    kept = []
    for number in range(num_days * DAY // 3600):
        for at, arrival in hour:
            later = at + number * seconds(3600)
            if stream.random() < of_noon(to_seconds(later)):
                kept.append((later, arrival))
    return kept


def of_noon(at: float) -> float:
    """The rate at a time of the day, as a share of the highest: two humps, before and after midday, and a night."""
    hour = at % DAY / DAY * 24
    humps = math.exp(-(((hour - 11) / 2.6) ** 2)) + 0.85 * math.exp(-(((hour - 16.5) / 2.8) ** 2))
    return min(1.0, 0.125 + 0.875 * humps)


def flat_day(num_requests: int, arrivals: Sequence[tuple[int, Arrival]], stream: Stream) -> list[tuple[int, Arrival]]:
    """So many requests of the day at a constant rate."""
    at, flat = 0.0, []
    for number in range(num_requests):
        at += stream.exponential(DAY * 1e9 / num_requests)
        flat.append((round(at), arrivals[number * 7919 % len(arrivals)][1]))
    return flat


def read(path: Path) -> Iterator[tuple[int, Arrival]]:
    if not path.exists():
        sys.exit(f"{path} is not there; ROTA_DATA names the folder that has traces/")
    for arrival in recognise(path).read(path, RandomStreams(SEED)):
        yield int(arrival.at or 0), arrival


def loads() -> dict[str, Load]:
    streams = RandomStreams(SEED)
    azure = azure_days(3, streams.stream("thinning"))
    last_day = [each for each in azure if each[0] >= 2 * seconds(DAY)]
    mooncake = list(read(DATA / "mooncake" / "conversation_trace.jsonl"))
    h100 = load_profile("llama-3.1-8b-h100")
    slo = SLO(ttft=seconds(2), tpot=milliseconds(100))
    common: dict[str, Any] = {
        "slo": slo,
        "limits": A10_LIMITS,
        "step_time": A10,
        "dispatch": "least_outstanding_tokens",
        "day_seconds": float(DAY),
        "max_instances": 10,
        "first_instances": 2,
    }
    return {
        "azure": Load(name="azure", arrivals=azure, num_days=3, **common),
        "mooncake": Load(
            name="mooncake",
            slo=SLO(ttft=seconds(5), tpot=milliseconds(100)),
            limits=h100.instance_limits(),
            step_time=h100.predictor(),
            dispatch="prefix_then_load",
            arrivals=mooncake,
            num_days=1,
            day_seconds=to_seconds(mooncake[-1][0]),
            max_instances=10,
            first_instances=4,
        ),
        "flat": Load(
            name="flat", arrivals=flat_day(len(last_day), last_day, streams.stream("flat")), num_days=1, **common
        ),
    }


# --- one run ----------------------------------------------------------------------------------------------------------


def run(load: Load, arm: Arm) -> dict[str, Any]:
    """Play the measured day, after those before it where the arm learns from them."""
    began = time.process_time()
    first_day = 0 if arm.needs_history else load.num_days - 1
    starts_at = round(first_day * load.day_seconds * 1e9)
    measured_at = round((load.num_days - 1) * load.day_seconds * 1e9) - starts_at
    ends_at = measured_at + seconds(load.day_seconds)
    num_first = arm.num_static or load.first_instances
    width = len(str(num_first))
    stack = StackConfig(
        dispatch=load.dispatch,
        scaling=arm.scaling,
        demand=arm.demand,
        fleet=FleetRules(min_instances=1, max_instances=load.max_instances),
        parameters=Parameters(scaling=dict(arm.parameters), demand=dict(arm.demand_parameters)),
    )
    config = SystemConfig(
        stack=stack,
        instances=tuple(InstanceSpec(InstanceId(f"i{number:0{width}}"), load.limits) for number in range(num_first)),
        seed=SEED,
    )
    records: list[RequestRecord] = []
    world = WorldOptions(start_up=arm.start_up)
    cluster = SimulatedCluster(config, requests_of(load, starts_at), load.step_time, world, on_record=records.append)
    paid: list[float] = []
    sizes: list[int] = []

    def note(now: Instant) -> None:
        fleet = cluster.cluster.fleet
        paid.append(fleet.counts(now).instance_seconds if fleet is not None else num_first * to_seconds(now))

    def note_size(now: Instant) -> None:
        fleet = cluster.cluster.fleet
        sizes.append(num_first if fleet is None else fleet.counts(now).num_members)
        if now + MINUTE < ends_at:
            cluster.loop.call_at(Instant(now + MINUTE), note_size, background=True)

    for at in (measured_at, ends_at):
        cluster.loop.call_at(Instant(at), note)
    cluster.loop.call_at(Instant(measured_at), note_size, background=True)
    cluster.run()
    day = [record for record in records if measured_at <= record.arrived_at < ends_at]
    fleet = cluster.cluster.fleet
    counts = None if fleet is None else fleet.counts(cluster.loop.now)
    return {
        "policy": arm.name,
        "setting": arm.setting,
        "instance_seconds": round(paid[1] - paid[0]),
        "attainment": round(sum(keeps(record, load.slo) for record in day) / len(day), 4),
        "num_requests": len(day),
        "num_not_finished": sum(record.status != "finished" for record in day),
        "ttft_p99_seconds": round(percentile([ttft(record) for record in day], 0.99), 2),
        "ttft_mean_seconds": round(sum(ttft(record) for record in day) / len(day), 3),
        "num_instances_min": min(sizes),
        "num_instances_max": max(sizes),
        "num_instances_by_minute": " ".join(map(str, sizes)),
        **({} if counts is None else told(counts, load, first_day)),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def told(counts: Any, load: Load, first_day: int) -> dict[str, Any]:
    """What became of the fleet over all days that were played."""
    num_seconds = (load.num_days - first_day) * load.day_seconds
    cool_down = FleetRules().cool_down_seconds
    return {
        "num_ordered": counts.num_ordered,
        "num_drained": counts.num_drained,
        "num_kept": counts.num_kept,
        "num_turns": counts.num_turns,
        "num_turns_at_most": int(num_seconds // cool_down) + 1,
        "num_days_played": load.num_days - first_day,
    }


def requests_of(load: Load, starts_at: int) -> Iterator[tuple[Request, int]]:
    for number, (at, arrival) in enumerate(load.arrivals):
        if at < starts_at:
            continue
        yield to_request(
            arrival,
            f"r-{number}",
            Instant(0),
            max_model_len=load.limits.max_model_len,
            block_size=load.limits.block_size,
            slo=load.slo,
            arrived_at=Instant(at - starts_at),
        )


def keeps(record: RequestRecord, slo: SLO) -> bool:
    """Whether both promises to a request were kept."""
    if record.status != "finished" or record.first_token_at is None or slo.ttft is None or slo.tpot is None:
        return False
    per_token = (record.finished_at - record.first_token_at) / max(1, record.num_output_tokens - 1)
    return record.first_token_at - record.arrived_at <= slo.ttft and per_token <= slo.tpot


def ttft(record: RequestRecord) -> float:
    """Seconds to the first token; for one who got none, to the end."""
    at = record.finished_at if record.first_token_at is None else record.first_token_at
    return to_seconds(at - record.arrived_at)


def percentile(values: list[float], share: float) -> float:
    values.sort()
    return values[min(len(values) - 1, int(share * len(values)))]


# --- arms -------------------------------------------------------------------------------------------------------------


def forecast(setting: str, rate: float, demand: str, season: int, **more: Any) -> Arm:
    """A forecasting arm; `season` in bins."""
    name = "forecast" if demand == "holt_winters" else "forecast, seasonal_naive"
    return Arm(
        more.pop("name", name),
        f"{rate:g}/s{setting}",
        "forecast",
        {"rate_per_instance": rate, "bin_seconds": BIN, "shrink_after_seconds": 120.0},
        demand,
        {"season_bins": season} if season or demand == "holt_winters" else {},
        needs_history=season > 0,
        **more,
    )


def arms(load: Load, quick: bool) -> Iterator[Arm]:
    """All that is tried on a load."""
    few = quick or load.name == "flat"
    rates = {"azure": (0.8, 0.95), "mooncake": (0.5, 0.7), "flat": (0.8,)}[load.name]
    season = round(DAY / BIN) if load.name == "azure" else 0
    statics = {"azure": range(4, 9), "mooncake": range(4, 9), "flat": range(2, 6)}[load.name]
    for num in statics:
        yield Arm("static", f"{num} instances", num_static=num)
    targets = {"azure": (4, 6, 9, 13), "mooncake": (6, 10, 14, 20), "flat": (4, 6, 9)}[load.name]
    for up, down in ((30.0, 600.0), (10.0, 120.0)):
        for target in targets[1:3] if few else targets:
            yield Arm(
                "queue_reactive",
                f"{target} requests, {up:g}/{down:g} s",
                "queue_reactive",
                {"target_requests": float(target), "upscale_delay_seconds": up, "downscale_delay_seconds": down},
            )
    for low, high in ((160, 960), (400, 1200), (800, 2400)):
        yield Arm("freeness_band", f"{low} to {high} steps", "freeness_band", {"min_steps": low, "max_steps": high})
    for target, calm in ((0.99, 300.0), (0.995, 300.0), (0.99, 120.0)):
        if few and calm < 300.0:
            continue
        yield Arm(
            "slo_attainment", f"{target:g}, calm {calm:g} s", "slo_attainment", {"target": target, "calm_seconds": calm}
        )
    for rate in rates:
        yield forecast("", rate, "holt_winters", season)
    yield forecast("", rates[0], "seasonal_naive", season)
    yield forecast(", no season", rates[0], "holt_winters", 0, name="forecast, trend only")


def wrong(load: Load, best: Mapping[str, dict[str, Any]]) -> Iterator[Arm]:
    """The best forecasting and the best queue setting, where the start-up time is another than they were told."""
    slow = StartUp(cold=seconds(160), page_cache=seconds(90))
    season = round(DAY / BIN) if load.name == "azure" else 0
    rate = float(best["forecast"]["setting"].split("/")[0])
    for setting, start_up in (
        (", told a minute less than true", StartUp(told_wrong=Duration(-MINUTE))),
        (", told a minute more than true", StartUp(told_wrong=MINUTE)),
        (", starts take a minute more, told so", slow),
        (", starts take a minute more, not told", told_otherwise(slow, Duration(-MINUTE))),
    ):
        yield forecast(setting, rate, "holt_winters", season, start_up=start_up)
    for name in ("queue_reactive", "slo_attainment"):
        found = next(arm for arm in arms(load, False) if (arm.name, arm.setting) == (name, best[name]["setting"]))
        yield Arm(name, f"{found.setting}, starts take a minute more", name, found.parameters, start_up=slow)


def controls(load: Load, best: Mapping[str, dict[str, Any]]) -> Iterator[Arm]:
    """What the best forecasting setting gains by knowing when: without its moments, and without a history."""
    found = best["forecast"]
    sizes = [int(word) for word in found["num_instances_by_minute"].split()]
    yield had_again("its sizes, at its moments", sizes)
    for number in range(3):
        stretches = [sizes[start : start + 10] for start in range(0, len(sizes), 10)]
        Random(number).shuffle(stretches)
        yield had_again(f"its sizes, in random order {number}", [size for stretch in stretches for size in stretch])
    rate, season = float(found["setting"].split("/")[0]), round(DAY / BIN)
    yield forecast(", history in random order", rate, "scaling_controls:Shuffled", season, name="control")


def had_again(setting: str, sizes: list[int]) -> Arm:
    return Arm("control", setting, "scaling_controls:SizesByMinute", {"sizes": sizes})


def told_otherwise(start_up: StartUp, told_wrong: Duration) -> StartUp:
    return StartUp(start_up.cold, start_up.page_cache, start_up.spare, told_wrong=told_wrong)


def best_of(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each policy the cheapest setting that reaches the goal, or else that with the best attainment."""
    best: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(result["policy"] for result in results):
        own = [result for result in results if result["policy"] == name]
        good = [result for result in own if result["attainment"] >= GOAL]
        best[name] = (
            min(good, key=lambda result: result["instance_seconds"])
            if good
            else max(own, key=lambda result: result["attainment"])
        )
    return best


def play(load: Load, tried: Iterator[Arm]) -> list[dict[str, Any]]:
    results = []
    for arm in tried:
        results.append(run(load, arm))
        print(load.name, json.dumps(results[-1]), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Instance-seconds against promises kept.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=["azure", "mooncake", "flat"])
    options = parser.parse_args()
    for name, load in loads().items():
        if options.only not in (None, name):
            continue
        began = time.process_time()
        results = play(load, arms(load, options.quick))
        best = best_of(results)
        print_table(name, best)
        if options.quick:
            continue
        found: dict[str, Any] = {"best": list(best.values()), "all": results}
        if name == "azure":
            found["start_up_wrong"] = play(load, wrong(load, best))
            found["controls"] = play(load, controls(load, best))
        keep(name, {"provenance": provenance(name, began), **found})


def keep(name: str, found: Mapping[str, Any]) -> None:
    """Write what was found on a load in place of what the file has of it."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**results, name: found}, indent=1) + "\n")


def print_table(name: str, best: Mapping[str, dict[str, Any]]) -> None:
    static = best["static"]["instance_seconds"]
    print(f"\n{name}: at {GOAL:.0%} of promises kept, or as near as it gets")
    for result in best.values():
        print(
            f"  {result['policy']:26} {result['setting']:28} {result['instance_seconds']:7,} instance-s "
            f"({result['instance_seconds'] / static:4.0%})  kept {result['attainment']:.2%}  "
            f"{result['num_instances_min']}-{result['num_instances_max']} instances"
        )


def provenance(name: str, began: float) -> dict[str, Any]:
    return {
        "command": f"python benchmarks/scaling.py --only {name}",
        "rota_version": __version__,
        "seed": SEED,
        "goal": GOAL,
        "day_seconds": DAY,
        "start_up": msgspec.to_builtins(StartUp()),
        "fleet": msgspec.to_builtins(FleetRules()) | {"cool_down_seconds": FleetRules().cool_down_seconds},
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu_seconds": round(time.process_time() - began),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


if __name__ == "__main__":
    main()
