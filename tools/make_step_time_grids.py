"""Make the step-time tables in src/rota/data/step_time from the kernel measurements in the PyPI package aiconfigurator.

Run it in an environment of its own; the package is needed for this and nothing else:

    python -m venv grids && grids/bin/pip install aiconfigurator==0.12.0
    grids/bin/python tools/make_step_time_grids.py                          # all that are shipped
    grids/bin/python tools/make_step_time_grids.py --only llama-3.1-8b-h100
    grids/bin/python tools/make_step_time_grids.py --compare TABLE.csv=llama-3.1-8b-a100 …

`--compare` writes nothing: it asks the package for each row of a table that somebody else made with it, and prints the
largest relative difference of each phase.

aiconfigurator and its data are Apache-2.0, copyright NVIDIA CORPORATION & AFFILIATES; see src/rota/data/NOTICE.

A step of mixed work is composed of the package's own parts: what all tokens share (matrix products over prefill and
decode tokens together), attention of a fresh prefill, attention of the decodes. Its `mixed_step_latency` takes one
prompt length for both kinds; calling it with the decodes' context, as one must to get their attention right, slices the
prefill tokens into prompts of that length. Tables made that way differ from ours in their mixed rows, and `--compare`
makes rows their way.
"""

import argparse
import csv
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from aiconfigurator_core.sdk.engine import EngineHandle

VERSION = "0.12.0"
OUT = Path(__file__).parents[1] / "src" / "rota" / "data" / "step_time"
COLUMNS = ("phase", "n_prefill_seqs", "new_tokens", "prefix_tokens", "n_decode", "decode_kv", "latency_ms")


class Recipe(NamedTuple):
    """What to ask the package for."""

    model: str
    system: str
    tensor_parallel: int = 1
    backend: str = "vllm"
    quantization: Mapping[str, str] = {}
    """Arguments of the package; without, all is bfloat16."""


_8B, _70B = "meta-llama/Meta-Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-70B"
PROFILES = {
    "llama-3.1-8b-a100": Recipe(_8B, "a100_sxm"),
    "llama-3.1-8b-h100": Recipe(_8B, "h100_sxm"),
    "llama-3.1-8b-l40s": Recipe(_8B, "l40s"),
    "llama-3.1-8b-rtx-pro-6000": Recipe(_8B, "rtx_pro_6000_server"),
    "llama-3.1-70b-a100-tp4": Recipe(_70B, "a100_sxm", 4),
    "llama-3.1-70b-h100-tp4": Recipe(_70B, "h100_sxm", 4),
    "qwen3-32b-h100-tp2": Recipe("Qwen/Qwen3-32B", "h100_sxm", 2),
    "llama-3.1-8b-h100-trtllm": Recipe(_8B, "h100_sxm", backend="trtllm"),
    "llama-3.1-8b-fp8-h200": Recipe(
        _8B, "h200_sxm", quantization={"gemm_quant_mode": "fp8", "kvcache_quant_mode": "fp8"}
    ),
    "llama-3.1-8b-fp8-h200-sglang": Recipe(
        _8B, "h200_sxm", backend="sglang", quantization={"gemm_quant_mode": "fp8_block"}
    ),
}
SHIPPED = (
    "llama-3.1-8b-a100",
    "llama-3.1-8b-h100",
    "llama-3.1-8b-l40s",
    "llama-3.1-70b-h100-tp4",
    "qwen3-32b-h100-tp2",
    "llama-3.1-8b-h100-trtllm",
    "llama-3.1-8b-fp8-h200",
    "llama-3.1-8b-fp8-h200-sglang",
)

# Pairs such as 512 and 513: one token more takes one tile more of a matrix product, 23 % more time on an L40S.
NEW_TOKENS = (1, 8, 16, 32, 48, 64, 65, 80, 96, 128, 129, 144, 160, 192, 256, 257, 320, 384, 448, 512, 513, 576, 640)
NEW_TOKENS += (768, 769, 896, 1024, 1025, 1152, 1280, 1281, 1536, 1537, 1792, 2048, 2049, 2304, 3072, 4096, 8192, 16384)
PREFIX_TOKENS = (0, 4096, 65536)
NUM_DECODES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 65, 80, 96, 112, 128, 129, 144, 160, 192, 224, 256, 257, 320, 384, 512)
DECODE_KV = (128, 512, 2048, 4096, 8192, 32768, 131072)
# No accelerator here holds more tokens than this, and what cannot happen shall not bend what can.
MAX_CONTEXT = 2**20
MIXED_TOKENS, MIXED_DECODES, MIXED_KV = (128, 256, 512, 1024, 2048), (1, 8, 32, 64, 128, 256), (512, 2048)


def prefill_ms(engine: EngineHandle, num_seqs: int, new_tokens: int, prefix_tokens: int) -> float:
    """One step that computes `new_tokens` of each of `num_seqs` prompts, on top of `prefix_tokens` computed ones."""
    return engine.predict_prefill_latency(num_seqs, new_tokens + prefix_tokens, prefix_tokens)


def decode_ms(engine: EngineHandle, num_decodes: int, decode_kv: int) -> float:
    """One step of `num_decodes` sequences, each over `decode_kv` tokens."""
    return engine.predict_decode_latency(num_decodes, decode_kv, 2)


def mixed_ms(engine: EngineHandle, new_tokens: int, num_decodes: int, decode_kv: int) -> float:
    """One step that holds a fresh prefill and decodes."""
    _, shared, prefill_attention, _ = engine.mixed_step_breakdown(new_tokens, num_decodes, new_tokens, 2)
    _, _, _, decode_attention = engine.mixed_step_breakdown(new_tokens, num_decodes, decode_kv, 2)
    return shared + prefill_attention + decode_attention


def rows(engine: EngineHandle) -> list[tuple[str, int, int, int, int, int, float]]:
    """Every row of a table."""
    prefills = [("prefill", 1, t, p, 0, 0, prefill_ms(engine, 1, t, p)) for t in NEW_TOKENS for p in PREFIX_TOKENS]
    decodes = [
        ("decode", 0, 0, 0, n, k, decode_ms(engine, n, k))
        for n in NUM_DECODES
        for k in DECODE_KV
        if n * k <= MAX_CONTEXT
    ]
    mixed = [
        ("mixed", 1, t, 0, n, k, mixed_ms(engine, t, n, k))
        for t in MIXED_TOKENS
        for n in MIXED_DECODES
        for k in MIXED_KV
    ]
    return prefills + decodes + mixed


def compile_engine(name: str) -> EngineHandle:
    """The package's model of one profile, for the newest version of its engine that was measured."""
    recipe = PROFILES[name]
    return EngineHandle.compile(
        recipe.model, recipe.system, recipe.backend, tp_size=recipe.tensor_parallel, **recipe.quantization
    )


def compare(path: Path, name: str) -> dict[str, float]:
    """Largest relative difference by phase between a table made with the package and what the package says here."""
    engine = compile_engine(name)
    worst: dict[str, float] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            num_seqs, new, prefix, num_decodes, kv = (int(row[column]) for column in COLUMNS[1:6])
            if row["phase"] == "prefill":
                ours = prefill_ms(engine, num_seqs, new, prefix)
            elif row["phase"] == "decode":
                ours = decode_ms(engine, num_decodes, kv)
            else:
                ours = engine.mixed_step_latency(new, num_decodes, kv, 2)
            worst[row["phase"]] = max(worst.get(row["phase"], 0.0), abs(ours / float(row["latency_ms"]) - 1))
    return worst


def main() -> None:
    """Write every shipped table, or compare others'."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", nargs="+", metavar="TABLE.csv=PROFILE", help="compare tables instead of writing")
    parser.add_argument("--only", nargs="+", choices=PROFILES, metavar="PROFILE", help="write these tables alone")
    arguments = parser.parse_args()
    for pair in arguments.compare or ():
        path, _, name = pair.rpartition("=")
        worst = compare(Path(path), name)
        sys.stdout.write(f"{name}: " + ", ".join(f"{phase} {value:.1e}" for phase, value in worst.items()) + "\n")
    if arguments.compare:
        return
    OUT.mkdir(parents=True, exist_ok=True)
    for name in arguments.only or SHIPPED:
        with (OUT / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for *facts, latency_ms in rows(compile_engine(name)):
                writer.writerow([*facts, f"{latency_ms:.5f}"])
        sys.stdout.write(f"wrote {name}.csv\n")


if __name__ == "__main__":
    main()
