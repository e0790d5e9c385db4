"""How many KV blocks fit beside a model, by the arithmetic that vLLM does at its start.

    blocks = (utilisation * memory - weights - reserve) / bytes of a block

vLLM measures the reserve (activations at their peak, CUDA graphs, the CUDA context) by running the model; here it is
stated, and what is a guess is called one."""

from functools import cache
from importlib.resources import files

import msgspec

from rota.base.config import parse_toml
from rota.base.errors import ConfigError
from rota.base.nearest import did_you_mean
from rota.serving.predictors.step_time.models import shape_of

GIB = 1 << 30

_FILE = files("rota") / "data" / "accelerators.toml"


class Accelerator(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of GPU."""

    memory_gib: float
    """As CUDA reports it, less than on the box."""
    source: str
    is_guess: bool = False
    aliases: list[str] = []
    """Other names under which tables and engines know it."""


class Capacity(msgspec.Struct, frozen=True):
    """The blocks of one engine, and the numbers that they came from."""

    num_blocks: int
    memory_gib: float
    gpu_memory_utilization: float
    weights_gib: float
    reserve_gib: float
    block_bytes: int
    guesses: tuple[str, ...]
    """Which of these numbers nobody measured."""

    def __str__(self) -> str:
        guessed = f"; guessed: {', '.join(self.guesses)}" if self.guesses else ""
        return (
            f"({self.gpu_memory_utilization:g} * {self.memory_gib:.2f} GiB memory - {self.weights_gib:.2f} GiB weights"
            f" - {self.reserve_gib:.2f} GiB reserve) / {self.block_bytes} bytes = {self.num_blocks} blocks{guessed}"
        )


class _Accelerators(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    accelerators: dict[str, Accelerator]


@cache
def accelerators() -> dict[str, Accelerator]:
    """The GPUs that Rota knows, by name."""
    return parse_toml(_FILE.read_text(encoding="utf-8"), _Accelerators, "accelerators.toml").accelerators


def accelerator(name: str) -> Accelerator:
    """A GPU by name or alias. Raises `ConfigError` for one that is not known."""
    for known, entry in accelerators().items():
        if name == known or name in entry.aliases:
            return entry
    raise ConfigError(f"unknown accelerator {name!r}", hint=did_you_mean(name, list(accelerators())))


RESERVE_GIB = 1.2
"""What a 24 GB card under vLLM 0.19 with Llama-3.1-8B had left beside weights and 41,408 tokens of KV:
0.9 * 23.52 GiB - 14.96 GiB - 5.05 GiB = 1.15 GiB."""
SHARDED_RESERVE_GIB = 2.0
"""A guess: with several GPUs buffers for communication come on top."""


def capacity_of(
    model: str,
    on: str,
    *,
    tensor_parallel: int = 1,
    block_size: int = 16,
    gpu_memory_utilization: float = 0.9,
    reserve_gib: float | None = None,
    bytes_per_parameter: int = 2,
) -> Capacity:
    """The blocks that a model leaves on each of `tensor_parallel` GPUs of the kind `on`.

    Raises `ConfigError` for an unknown model or GPU, and where not one block is left."""
    shape, gpu = shape_of(model), accelerator(on)
    weights_gib = shape.num_parameters * bytes_per_parameter / tensor_parallel / GIB
    guesses = ["memory"] if gpu.is_guess else []
    if reserve_gib is None:
        reserve_gib = RESERVE_GIB if tensor_parallel == 1 else SHARDED_RESERVE_GIB
        guesses.append("reserve")
    block_bytes = shape.block_bytes(block_size, tensor_parallel)
    left = gpu_memory_utilization * gpu.memory_gib - weights_gib - reserve_gib
    num_blocks = int(left * GIB) // block_bytes
    if num_blocks < 1:
        raise ConfigError(f"{model} leaves no room for KV blocks on {on}: {left:.2f} GiB", hint="raise tensor_parallel")
    return Capacity(
        num_blocks, gpu.memory_gib, gpu_memory_utilization, weights_gib, reserve_gib, block_bytes, tuple(guesses)
    )
