"""The same workload for every simulator, as the file that it reads."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import msgspec
from benchmarks.truth.row import data

from rota.base.instant import NANOSECONDS_PER_MILLISECOND, NANOSECONDS_PER_SECOND, Duration
from rota.base.random_streams import RandomStreams
from rota.serving.workload.arrivals import Arrival
from rota.serving.workload.formats import read_trace
from rota.serving.workload.formats.azure import AzureFormat
from rota.serving.workload.formats.mooncake import HASH_BLOCK_TOKENS, MooncakeFormat
from rota.serving.workload.retiming import take, with_poisson

NUM_REQUESTS = 10_000


@dataclass(frozen=True, slots=True)
class Case:
    """One workload, and what each simulator is told to do with it; a simulator that cannot is not among `options`."""

    name: str
    what: str
    options: dict[str, dict[str, Any]]


def cases(folder: Path) -> Iterator[Case]:
    """The workloads of the comparison, with their files written into `folder`."""
    azure = data("traces", "azure2023", "AzureLLMInferenceTrace_conv.csv")
    mooncake = str(data("traces", "mooncake", "conversation_trace.jsonl"))
    w1, w8 = _poisson(azure, 6.0), _poisson(azure, 48.0)
    w1_file, w8_file = _as_mooncake(w1, folder / "w1.jsonl"), _as_mooncake(w8, folder / "w8.jsonl")
    own = {"trace": str(azure), "num_requests": NUM_REQUESTS}
    yield Case(
        "W1",
        "10,000 requests of the Azure conversation trace, Poisson at 6/s, one instance",
        {
            "rota": {**own, "rate": 6.0},
            "dynosim": {"trace": w1_file, "num_instances": 1, "router_mode": "round_robin"},
            "sched-sim": {"trace": _as_sched_sim(w1, folder / "w1.json")},
        },
    )
    yield Case(
        "W1 on H100",
        "the same; Rota with step times as short as DynoSim's own, so that both take as many steps",
        {"rota": {**own, "rate": 6.0, "profile": "llama-3.1-8b-h100"}},
    )
    yield Case(
        "W1 with ids",
        "the same; Rota reads the very file that DynoSim does, in which every prompt has block ids that nobody shares",
        {"rota": {"trace": w1_file}},
    )
    yield Case(
        "W8",
        "the same lengths at 48/s over eight instances in turn",
        {
            "rota": {**own, "rate": 48.0, "num_instances": 8},
            "dynosim": {"trace": w8_file, "num_instances": 8, "router_mode": "round_robin"},
        },
    )
    yield Case(
        "Mooncake",
        "the whole Mooncake conversation trace over eight instances, routed by prefix",
        {
            "rota": {"trace": mooncake, "num_instances": 8, "dispatch": "prefix_then_load"},
            "dynosim": {"trace": mooncake, "num_instances": 8, "router_mode": "kv_router"},
        },
    )


def endless_azure(num_requests: int, path: Path) -> dict[str, Any]:
    """Rota's options for a run of so many requests: the Azure conversation trace over and over, in a file of its own,
    48/s over eight instances."""
    rows = list(read_trace(data("traces", "azure2023", "AzureLLMInferenceTrace_conv.csv"), RandomStreams(0)))
    gap = Duration(NANOSECONDS_PER_SECOND // 48)
    endless = (
        msgspec.structs.replace(row, at=Duration(number * gap))
        for number, row in zip(count(), islice(cycle(rows), num_requests), strict=False)
    )
    AzureFormat().write(path, endless)
    return {"trace": str(path), "rate": 48.0, "num_instances": 8}


def _poisson(trace: Path, rate: float) -> list[Arrival]:
    """As `SimulationConfig(rate=…, seed=0)` has it."""
    streams = RandomStreams(0)
    rows = take(read_trace(trace, streams), NUM_REQUESTS)
    return list(with_poisson(rows, rate, streams.stream("arrivals")))


def _as_mooncake(arrivals: list[Arrival], path: Path) -> str:
    """In whole milliseconds, which is all that the format holds, with ids of their own for every prompt."""
    fresh = count()
    MooncakeFormat().write(
        path,
        (
            msgspec.structs.replace(
                arrival,
                at=Duration(arrival.at // NANOSECONDS_PER_MILLISECOND * NANOSECONDS_PER_MILLISECOND),
                prefix_hashes=tuple(islice(fresh, -(-arrival.num_prompt_tokens // HASH_BLOCK_TOKENS))),
                hash_block_tokens=HASH_BLOCK_TOKENS,
            )
            for arrival in arrivals
        ),
    )
    return str(path)


def _as_sched_sim(arrivals: list[Arrival], path: Path) -> str:
    rows = [
        {
            "id": f"r-{number}",
            "timestamp": arrival.at / NANOSECONDS_PER_SECOND,
            "prompt_tokens": arrival.num_prompt_tokens,
            "output_tokens": arrival.num_output_tokens,
        }
        for number, arrival in enumerate(arrivals)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)
