"""The command line and environment of one vLLM server. Starting and watching it is `engines.managed`'s work."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rota.base.errors import ConfigError

SCHEDULER = "rota.serving.engines.vllm.plugin.RotaScheduler"
ASYNC_SCHEDULER = "rota.serving.engines.vllm.plugin.RotaAsyncScheduler"

CPU_BLOCK_MULTIPLE = 32
"""vLLM's CPU attention takes block sizes that are multiples of this."""


@dataclass(frozen=True, slots=True)
class VllmServer:
    """One vLLM server as it is to be started. Field names follow vLLM's flags; the defaults suit a small CPU machine.

    `python -m vllm.entrypoints.openai.api_server` is run rather than the `vllm` command, which the CPU package breaks.
    """

    model: Path
    """A folder that vLLM can load."""
    port: int
    served_model_name: str
    host: str = "127.0.0.1"
    plugin: bool = True
    """Whether our scheduler runs inside; without it this is stock vLLM."""
    stack: Path | None = None
    """Stack file for the plug-in; without one, the default stack."""
    facts: Path | None = None
    journal: Path | None = None
    async_scheduling: bool = False
    """vLLM's asynchronous scheduler, and ours on top of it. Its CPU build has none."""
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    """vLLM's own policy; the plug-in wants `fcfs`."""
    dtype: str = "bfloat16"
    max_model_len: int = 2048
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2048
    block_size: int = CPU_BLOCK_MULTIPLE
    num_gpu_blocks_override: int | None = None
    """KV blocks, the null block among them; None takes what the KV cache's memory holds."""
    kv_cache_gib: int = 1
    """Memory for the KV cache, in GiB (`VLLM_CPU_KVCACHE_SPACE`)."""
    cores: str | None = None
    """CPU cores to bind to, e.g. `"0"` or `"0-3"`; instances that share cores stall each other."""
    enforce_eager: bool = True
    python: str = sys.executable

    def __post_init__(self) -> None:
        if self.block_size % CPU_BLOCK_MULTIPLE:
            raise ConfigError(
                f"block_size is {self.block_size}, and vLLM's CPU attention wants a multiple of {CPU_BLOCK_MULTIPLE}"
            )
        if self.plugin and self.scheduling_policy != "fcfs":
            raise ConfigError(
                f"scheduling_policy is {self.scheduling_policy!r}, and the plug-in brings the order",
                hint="leave it at fcfs, or run without the plug-in",
            )
        if not self.plugin and (self.stack or self.facts or self.journal):
            raise ConfigError("stack, facts and journal are the plug-in's, and this server runs without it")

    @property
    def url(self) -> str:
        """Where it listens once it is up."""
        return f"http://{self.host}:{self.port}"

    def command(self) -> list[str]:
        """The command line, program first."""
        arguments = {
            "--model": str(self.model),
            "--served-model-name": self.served_model_name,
            "--host": self.host,
            "--port": str(self.port),
            "--dtype": self.dtype,
            "--max-model-len": str(self.max_model_len),
            "--max-num-seqs": str(self.max_num_seqs),
            "--max-num-batched-tokens": str(self.max_num_batched_tokens),
            "--block-size": str(self.block_size),
            "--scheduling-policy": self.scheduling_policy,
        }
        if self.num_gpu_blocks_override is not None:
            arguments["--num-gpu-blocks-override"] = str(self.num_gpu_blocks_override)
        if self.plugin:
            arguments["--scheduler-cls"] = ASYNC_SCHEDULER if self.async_scheduling else SCHEDULER
            arguments["--additional-config"] = json.dumps({"rota": self._plugin_config()})
        flags = ["--async-scheduling" if self.async_scheduling else "--no-async-scheduling"]
        if self.enforce_eager:
            flags.append("--enforce-eager")
        words = [word for pair in arguments.items() for word in pair]
        return [self.python, "-m", "vllm.entrypoints.openai.api_server", *words, *flags]

    def environment(self) -> Mapping[str, str]:
        """Variables to set on top of the parent's."""
        variables = {
            # The model is a folder on this machine: nothing may wait for a model hub, or tell anyone about this run.
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_cache_gib),
            "PYTHONUNBUFFERED": "1",
        }
        if self.cores is not None:
            variables["VLLM_CPU_OMP_THREADS_BIND"] = self.cores
        return variables

    def _plugin_config(self) -> dict[str, str]:
        # vLLM's processes may run elsewhere than in our working directory.
        paths = {"stack": self.stack, "facts": self.facts, "journal": self.journal}
        return {name: str(path.absolute()) for name, path in paths.items() if path is not None}
