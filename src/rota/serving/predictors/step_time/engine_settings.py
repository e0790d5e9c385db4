"""The limits of an engine, from what the engine itself resolved.

How many KV blocks there are decides everything once memory is short: on a published run of a card whose blocks were
guessed 31 % too many, latency came out 12 % too low. An engine knows; where its settings are at hand they win over a
profile's, and the difference is reported (`Profile.capacity_differences`)."""

import json
from pathlib import Path
from typing import Any

import msgspec

from rota.base.errors import DataError
from rota.serving.api import InstanceLimits

_MAX_COUNT = 2**31 - 1


class EngineSettings(msgspec.Struct, frozen=True):
    """What a vLLM engine ran with, as far as its file tells; None where it does not."""

    source: str
    model: str | None = None
    engine: str | None = None
    num_gpu_blocks: int | None = None
    """As vLLM counts them, its null block included."""
    block_size: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    enable_prefix_caching: bool | None = None
    long_prefill_token_threshold: int | None = None
    scheduler_reserve_full_isl: bool | None = None
    gpu_memory_utilization: float | None = None
    device_memory_bytes: int | None = None

    def limits(self, otherwise: InstanceLimits) -> InstanceLimits:
        """The limits of that engine; `otherwise` gives what the file leaves out."""
        stated = {
            "num_blocks": None if self.num_gpu_blocks is None else self.num_gpu_blocks - 1,
            "block_size": self.block_size,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "max_model_len": self.max_model_len,
            "enable_prefix_caching": self.enable_prefix_caching,
            "long_prefill_token_threshold": self.long_prefill_token_threshold,
            "reserve_full_prompt": self.scheduler_reserve_full_isl,
        }
        return msgspec.structs.replace(
            otherwise, **{name: value for name, value in stated.items() if value is not None}
        )


def read_engine_settings(path: str | Path) -> EngineSettings:
    """Read a JSON file in which an engine's settings were noted: `engine_kwargs` as it was asked for, and `kv_cache`
    and `resolved_config` (vLLM's `VllmConfig`, section by section) as it resolved them, which win.

    Raises `DataError` naming the file and the field."""
    document = _document(Path(path))
    asked = _section(document, "engine_kwargs", path)
    resolved = _section(document, "resolved_config", path)
    cache = {**_section(resolved, "cache_config", path), **_section(document, "kv_cache", path)}
    scheduler = _section(resolved, "scheduler_config", path)
    model = _section(resolved, "model_config", path)
    if not asked and not cache and not scheduler:
        raise DataError(f"{path}: no settings of an engine", hint="expected engine_kwargs, kv_cache or resolved_config")

    def count(name: str, *sections: dict[str, Any]) -> int | None:
        value = _first(name, sections)
        if value is not None and (type(value) is not int or not 0 <= value <= _MAX_COUNT):
            raise DataError(f"{path}: {name}: expected a whole number from 0 to {_MAX_COUNT}, got {value!r}")
        return value

    def flag(name: str, *sections: dict[str, Any]) -> bool | None:
        value = _first(name, sections)
        if value is not None and type(value) is not bool:
            raise DataError(f"{path}: {name}: expected true or false, got {value!r}")
        return value

    utilization = _first("gpu_memory_utilization", (cache,))
    memory = _first("device_total_memory_bytes", (_section(document, "hardware", path),))
    return EngineSettings(
        source=str(path),
        model=_first("model", (model, asked)),
        engine=f"vLLM {document['vllm_version']}" if isinstance(document.get("vllm_version"), str) else None,
        num_gpu_blocks=count("num_gpu_blocks", cache),
        block_size=count("block_size", cache, asked),
        max_num_seqs=count("max_num_seqs", scheduler, asked),
        max_num_batched_tokens=count("max_num_batched_tokens", scheduler, asked),
        max_model_len=count("max_model_len", model, asked),
        enable_prefix_caching=flag("enable_prefix_caching", cache, asked),
        long_prefill_token_threshold=count("long_prefill_token_threshold", scheduler),
        scheduler_reserve_full_isl=flag("scheduler_reserve_full_isl", scheduler),
        gpu_memory_utilization=utilization if isinstance(utilization, float) else None,
        device_memory_bytes=memory if isinstance(memory, int) else None,
    )


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply") from None
    if not isinstance(document, dict):
        raise DataError(f"{path}:1:1: expected an object")
    return document


def _section(document: dict[str, Any], name: str, path: str | Path) -> dict[str, Any]:
    section = document.get(name) or {}
    if not isinstance(section, dict):
        raise DataError(f"{path}: {name}: expected an object")
    return section


def _first(name: str, sections: tuple[dict[str, Any], ...]) -> Any:
    return next((section[name] for section in sections if section.get(name) is not None), None)
