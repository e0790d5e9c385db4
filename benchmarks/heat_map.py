"""For which lengths it pays to split a request between a prefill and a decode instance: DeepFlow's heat map, made by
our simulator, and what the policy that goes by it is worth.

    python benchmarks/heat_map.py     # a few CPU minutes; writes the shipped map and benchmarks/results/heat_map.json

Four instances of Llama-3.1-8B on A100, links of 64 Gb/s. Each cell is a load of requests that are all alike, Poisson,
at shares of what four mixed instances can take (measured with all requests there at once): mean time of a
request where all four do both (`least_outstanding_tokens`), over that where two prefill and two decode (`pools`), - 1.

Then a load of mixed lengths on two mixed, one prefill and one decode instance: the policy with its map, with the map's
sign turned, with a map of zeros (both controls), and four mixed instances.
"""

import json
import platform
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rota import __version__
from rota.base.instant import Instant
from rota.serving.assemble import SystemConfig
from rota.serving.metrics.definitions import RequestRecord
from rota.serving.model.instance import InstanceId, InstanceSpec, Role
from rota.serving.model.request import Request, RequestId
from rota.serving.predictors.step_time.profiles import load_profile
from rota.serving.sim.cluster import SimulatedCluster
from rota.serving.stack import Parameters, StackConfig

PROFILE = "llama-3.1-8b-a100"
SHIPPED = Path(__file__).parents[1] / "src" / "rota" / "data" / "heat_maps" / f"{PROFILE}.json"
RESULTS = Path(__file__).parent / "results" / "heat_map.json"
PROMPT_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)
RATIOS = (1 / 64, 1 / 16, 1 / 4, 1.0, 4.0)
LOADS = (0.3, 0.6, 0.9)
NUM_REQUESTS = 150
OUTPUT_TOKENS_MAX = 4096
TOGETHER = (Role.MIXED,) * 4
APART = (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)
BOTH = (Role.MIXED, Role.MIXED, Role.PREFILL, Role.DECODE)


def play(
    roles: Iterable[Role], dispatch: str, requests: Iterable[tuple[Request, int]], **parameters: Any
) -> list[RequestRecord]:
    profile = load_profile(PROFILE)
    limits = profile.instance_limits()
    specs = tuple(InstanceSpec(InstanceId(f"i{number}"), limits, role) for number, role in enumerate(roles))
    stack = StackConfig(dispatch=dispatch, parameters=Parameters(dispatch=parameters))
    world = SimulatedCluster(SystemConfig(stack, specs), requests, profile.predictor())
    world.run()
    assert all(record.status == "finished" for record in world.records)
    return world.records


def alike(num_prompt: int, num_output: int, rate: float | None, seed: int) -> Iterator[tuple[Request, int]]:
    """Requests of one kind; without a rate all are there at once."""
    drawn = np.random.default_rng(seed)
    at = 0.0
    for number in range(NUM_REQUESTS):
        at += 0.0 if rate is None else drawn.exponential(1 / rate)
        yield Request(RequestId(f"r{number}"), Instant(round(at * 1e9)), num_prompt, OUTPUT_TOKENS_MAX), num_output


def mean_seconds(records: list[RequestRecord]) -> float:
    return sum((record.finished_at or 0) - record.arrived_at for record in records) / len(records) / 1e9


def cell(num_prompt: int, ratio: float) -> list[float]:
    """The gain of a kind of request at each load."""
    num_output = min(max(2, round(num_prompt * ratio)), OUTPUT_TOKENS_MAX)
    together = play(TOGETHER, "least_outstanding_tokens", alike(num_prompt, num_output, None, 0))
    capacity = NUM_REQUESTS / (max(record.finished_at or 0 for record in together) / 1e9)
    gains = []
    for load in LOADS:
        requests = list(alike(num_prompt, num_output, load * capacity, 1))
        times = [
            mean_seconds(play(TOGETHER, "least_outstanding_tokens", requests)),
            mean_seconds(play(APART, "pools", requests, expected_output_tokens=num_output)),
        ]
        gains.append(round(times[0] / times[1] - 1, 3))
    return gains


def of_many_lengths(rate: float, num_requests: int = 3000) -> Iterator[tuple[Request, int]]:
    """Log-normal prompts and outputs, drawn apart, so that all corners of the map are met."""
    drawn = np.random.default_rng(3)
    at = 0.0
    for number in range(num_requests):
        at += drawn.exponential(1 / rate)
        num_prompt = int(np.clip(drawn.lognormal(np.log(800), 1.2), 16, 8192))
        num_output = int(np.clip(drawn.lognormal(np.log(100), 1.2), 2, OUTPUT_TOKENS_MAX))
        yield Request(RequestId(f"r{number}"), Instant(round(at * 1e9)), num_prompt, OUTPUT_TOKENS_MAX), num_output


def worth(heat_map: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean and p99 of a request's time, by rate and arm."""
    found = []
    gains = np.asarray(heat_map["gains"])
    with TemporaryDirectory() as folder:
        maps = {"map": gains, "sign turned": -gains, "zeros": 0 * gains}
        for name, values in maps.items():
            Path(folder, f"{name}.json").write_text(json.dumps({**heat_map, "gains": values.tolist()}))
        for rate in (5.0, 10.0, 15.0, 20.0):
            requests = list(of_many_lengths(rate))
            arms = {
                name: play(BOTH, "prefill_or_together", requests, heat_map=str(Path(folder, f"{name}.json")))
                for name in maps
            }
            arms["all four mixed"] = play(TOGETHER, "least_outstanding_tokens", requests)
            for name, records in arms.items():
                times = np.asarray([(record.finished_at or 0) - record.arrived_at for record in records]) / 1e9
                ttft = np.asarray([(record.first_token_at or 0) - record.arrived_at for record in records]) / 1e9
                found.append({
                    "rate_rps": rate,
                    "arm": name,
                    "num_moved": sum(record.num_migrations for record in records),
                    "mean_seconds": round(float(times.mean()), 3),
                    "p99_seconds": round(float(np.percentile(times, 99)), 3),
                    "ttft_p99_seconds": round(float(np.percentile(ttft, 99)), 3),
                })  # fmt: skip
                print(found[-1], flush=True)
    return found


def main() -> None:
    gains = []
    for num_prompt in PROMPT_TOKENS:
        gains.append([cell(num_prompt, ratio) for ratio in RATIOS])
        print(num_prompt, gains[-1], flush=True)
    heat_map = {
        "source": f"rota {__version__}, {PROFILE}, 4 mixed against 2 prefill and 2 decode, 64 Gb/s",
        "prompt_tokens": PROMPT_TOKENS,
        "ratios": RATIOS,
        "loads": LOADS,
        "gains": gains,
    }
    SHIPPED.parent.mkdir(exist_ok=True)
    SHIPPED.write_text(json.dumps(heat_map, indent=1) + "\n", encoding="utf-8")
    result = {
        "provenance": {
            "date": datetime.now(UTC).date().isoformat(),
            "rota": __version__,
            "platform": f"{platform.system()} {platform.machine()}",
            "num_requests": NUM_REQUESTS,
        },
        "share_of_cells_with_one_sign": float(
            np.mean([min(each) > 0 or max(each) < 0 for row in gains for each in row])
        ),
        "heat_map": heat_map,
        "worth": worth(heat_map),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
