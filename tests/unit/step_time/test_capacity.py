"""Where KV blocks come from: the arithmetic behind each shipped profile, and the engine's own settings, which win."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rota.base.errors import ConfigError, DataError
from rota.serving.api import InstanceLimits
from rota.serving.predictors.step_time.engine_settings import read_engine_settings
from rota.serving.predictors.step_time.memory import GIB, accelerators, capacity_of
from rota.serving.predictors.step_time.models import model_shapes
from rota.serving.predictors.step_time.profiles import load_profile, profile_names

SHARED = Path(os.environ.get("ROTA_DATA", Path(__file__).parents[4] / "shared"))
META = SHARED / "truth" / "vllm-0.19" / "RTX4090-Llama-3.1-8B" / "meta.json"


@pytest.mark.parametrize("name", profile_names())
def test_every_shipped_capacity_is_derived_and_its_guesses_are_marked(name: str) -> None:
    profile = load_profile(name)
    capacity = capacity_of(profile.model, profile.accelerator, tensor_parallel=profile.tensor_parallel)
    assert profile.limits.num_blocks == capacity.num_blocks // 10 * 10, f"{name}: {capacity}"
    assert "reserve" in capacity.guesses


def test_the_arithmetic_comes_within_one_per_cent_of_an_engine_that_measured() -> None:
    capacity = capacity_of("meta-llama/Llama-3.1-8B", "NVIDIA GeForce RTX 4090")
    noted = read_engine_settings(META)
    assert noted.device_memory_bytes == pytest.approx(capacity.memory_gib * GIB, rel=0.001)
    assert noted.num_gpu_blocks == pytest.approx(capacity.num_blocks, rel=0.01)
    assert "2565 blocks; guessed: reserve" in str(capacity)


def test_parameters_fit_the_shape() -> None:
    """Attention and MLP of the layers and the two embeddings come to no more than the parameters, and to most."""
    for name, shape in model_shapes().items():
        attention = 2 * shape.hidden_size * (shape.hidden_size + shape.num_kv_heads * shape.head_size)
        least = shape.num_layers * attention
        assert 3 * least < shape.num_parameters < 12 * least, name


def test_no_room_is_said() -> None:
    with pytest.raises(ConfigError, match="leaves no room"):
        capacity_of("Llama-3.1-70B", "NVIDIA A100-SXM4-80GB")
    with pytest.raises(ConfigError, match="unknown accelerator"):
        capacity_of("Llama-3.1-8B", "A1000")
    assert all(entry.source for entry in accelerators().values())


def test_an_engines_settings_win_and_one_block_is_the_null_block() -> None:
    settings = read_engine_settings(META)
    limits = settings.limits(InstanceLimits(num_blocks=1, watermark_blocks=3))
    assert (limits.num_blocks, limits.block_size, limits.max_num_seqs) == (2587, 16, 256)
    assert (limits.max_num_batched_tokens, limits.max_model_len) == (2048, 32768)
    assert limits.enable_prefix_caching and limits.reserve_full_prompt
    assert limits.watermark_blocks == 3, "what the file does not say stays"
    assert settings.engine == "vLLM 0.19.0"


def test_a_wrong_capacity_is_reported() -> None:
    profile = load_profile("llama-3.1-8b-l40s")
    limits = read_engine_settings(META).limits(profile.instance_limits())
    assert profile.capacity_differences(limits)[0] == "num_blocks is 2587 here, and the profile says 12180"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", r"meta\.json:1:2: not JSON"),
        ("[]", r"meta\.json:1:1: expected an object"),
        ({}, "no settings of an engine"),
        ({"kv_cache": {"num_gpu_blocks": "many"}}, r"meta\.json: num_gpu_blocks: expected a whole number"),
        ({"kv_cache": {"num_gpu_blocks": -1}}, r"meta\.json: num_gpu_blocks: expected a whole number"),
        ({"kv_cache": {"enable_prefix_caching": 1}}, r"enable_prefix_caching: expected true or false"),
        ({"engine_kwargs": [1]}, r"engine_kwargs: expected an object"),
        ("[" * 100_000, "nested too deeply|not JSON"),
    ],
)
def test_broken_settings_are_refused_by_spot(tmp_path: Path, document: Any, message: str) -> None:
    path = tmp_path / "meta.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(DataError, match=message):
        read_engine_settings(path)


def test_a_folder_of_tables_is_a_profile() -> None:
    profile = load_profile(str(SHARED / "profiles" / "layerwise" / "RTX4090"))
    assert profile.limits.num_blocks == 2565 and profile.step_time.name == "layerwise"
    assert "guessed: reserve" in profile.source
    assert profile.predictor().step_time(prefills=(), num_decodes=1, decode_kv_tokens=100) > 0


def test_tables_beside_a_profile_file_are_found(tmp_path: Path) -> None:
    (tmp_path / "here").symlink_to(SHARED / "profiles" / "layerwise" / "RTX4090")
    (tmp_path / "p.toml").write_text(
        'model = "m"\naccelerator = "a"\nsource = "s"\nstep_overhead_ms = 0.5\n'
        '[step_time]\nname = "layerwise"\n[step_time.parameters]\ntables = "here"\nskew = true\n'
        "[limits]\nnum_blocks = 2587\n"
    )
    profile = load_profile(str(tmp_path / "p.toml"))
    assert profile.predictor().step_time(prefills=[(10, 0)], num_decodes=0, decode_kv_tokens=0) > 0
