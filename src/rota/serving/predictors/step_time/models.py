"""What the shape of a model says about its memory and its layers."""

from functools import cache
from importlib.resources import files

import msgspec

from rota.base.config import parse_toml
from rota.base.errors import ConfigError
from rota.base.nearest import did_you_mean

_FILE = files("rota") / "data" / "models.toml"


class ModelShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The numbers of a model's `config.json` that memory and time depend on."""

    num_layers: int
    hidden_size: int
    num_kv_heads: int
    head_size: int
    num_parameters: int

    def block_bytes(self, block_size: int, tensor_parallel: int = 1, bytes_per_value: int = 2) -> int:
        """Bytes of one KV block on each of `tensor_parallel` GPUs: keys and values of every layer."""
        heads = max(1, self.num_kv_heads // tensor_parallel)
        return 2 * self.num_layers * heads * self.head_size * bytes_per_value * block_size


class _Shapes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    models: dict[str, ModelShape]


@cache
def model_shapes() -> dict[str, ModelShape]:
    """The models that Rota knows, by the last part of their name on the hub."""
    return parse_toml(_FILE.read_text(encoding="utf-8"), _Shapes, "models.toml").models


def shape_of(model: str) -> ModelShape:
    """The shape of a model, by its name with or without its owner. Raises `ConfigError` for one that is not known."""
    name = model.rpartition("/")[2].removeprefix("Meta-")
    shapes = model_shapes()
    if name not in shapes:
        raise ConfigError(f"unknown model {model!r}", hint=did_you_mean(name, list(shapes)))
    return shapes[name]
