"""The command line and environment of one vLLM server. Starting and watching it is `engines.managed`'s work."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rota.base.errors import ConfigError
from rota.serving.engines.vllm.control import check_path
from rota.serving.engines.vllm.hosting import VLLM_CAPABILITIES
from rota.serving.model.capabilities import NOTHING, Capability, EngineCapabilities

SCHEDULER = "rota.serving.engines.vllm.plugin.RotaScheduler"
ASYNC_SCHEDULER = "rota.serving.engines.vllm.plugin.RotaAsyncScheduler"

CPU_BLOCK_MULTIPLE = 32
"""vLLM's CPU attention takes block sizes that are multiples of this."""

_NIXL = {
    "kv_connector": "NixlConnector",
    "kv_connector_module_path": "rota.serving.engines.vllm.nixl_connector",
    "kv_role": "kv_both",
    "kv_buffer_device": "cpu",
    # A pool of threads would poll as well; see `nixl_connector`.
    "kv_connector_extra_config": {"num_threads": 0},
    # A pull that fails costs a computation, not the request.
    "kv_load_failure_policy": "recompute",
}


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
    control: Path | None = None
    """Unix socket at which the plug-in is told to hand requests over."""
    nixl_port: int | None = None
    """Where other engines ask for the layout of this one's blocks, so that they can pull them over NIXL; a port of its
    own for each engine. None moves no blocks."""
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
        if not self.plugin and (self.stack or self.facts or self.journal or self.control):
            raise ConfigError("stack, facts, journal and control are the plug-in's, and this server runs without it")
        if self.control is not None:
            check_path(self.control)
        if self.nixl_port is not None and self.cores is None:
            raise ConfigError(
                "nixl_port is set and cores is not: NIXL takes the last core, and engines that share it stall for good",
                hint="bind each engine to cores of its own",
            )

    @property
    def url(self) -> str:
        """Where it listens once it is up."""
        return f"http://{self.host}:{self.port}"

    @property
    def capabilities(self) -> EngineCapabilities:
        """What this server can be told. It goes on from any tokens; it lets go of blocks, and takes them, where the
        plug-in can be told to and NIXL is on."""
        if not self.plugin:
            return NOTHING
        capabilities = VLLM_CAPABILITIES | {Capability.RESUME_FROM_TOKENS}
        if self.control is not None and self.nixl_port is not None:
            capabilities |= {Capability.HAND_OVER_KV}
        return capabilities

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
        if self.nixl_port is not None:
            arguments["--kv-transfer-config"] = json.dumps(_NIXL)
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
        if self.nixl_port is not None:
            variables["VLLM_NIXL_SIDE_CHANNEL_HOST"] = self.host
            variables["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(self.nixl_port)
            variables["UCX_TLS"] = "tcp,shm,self,posix,cma"
        return variables

    def _plugin_config(self) -> dict[str, str]:
        # vLLM's processes may run elsewhere than in our working directory.
        paths = {"stack": self.stack, "facts": self.facts, "journal": self.journal, "control": self.control}
        return {name: str(path.absolute()) for name, path in paths.items() if path is not None}
