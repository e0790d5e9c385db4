"""Profiles: one model on one kind of accelerator, as a step-time predictor, an overhead between steps and limits."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from rota.base.config import load_toml, parse_toml
from rota.base.errors import ConfigError
from rota.base.instant import Duration, milliseconds
from rota.base.nearest import did_you_mean
from rota.serving.api import InstanceLimits, StepTimePredictor
from rota.serving.predictors.step_time import STEP_TIMES

DEFAULT_PROFILE = "llama-3.1-8b-a100"

SHIPPED = files("rota") / "data" / "profiles"


class StepTimeChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which predictor, and its parameters."""

    name: str
    parameters: dict[str, Any] = {}


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The engine's limits as a file states them; the defaults are vLLM's."""

    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 131_072

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model on one kind of accelerator. `source` says where the numbers are from."""

    model: str
    accelerator: str
    source: str
    step_time: StepTimeChoice
    limits: Limits
    step_overhead_ms: float = 0.0
    """What the engine spends between two forward passes."""
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.step_overhead_ms < 1e6:
            raise ValueError(f"step_overhead_ms must be at least 0, got {self.step_overhead_ms}")

    def predictor(self) -> StepTimePredictor:
        """A new predictor of this profile's step times. Raises `ConfigError` or `DataError` if it cannot be built."""
        predictor: StepTimePredictor = STEP_TIMES.create(self.step_time.name, self.step_time.parameters)
        return predictor

    def step_overhead(self) -> Duration:
        """Between two forward passes of the engine."""
        return milliseconds(self.step_overhead_ms)

    def instance_limits(self) -> InstanceLimits:
        """The limits as instances take them."""
        return InstanceLimits(**msgspec.structs.asdict(self.limits))


def profile_names() -> list[str]:
    """Names of the profiles that come with Rota."""
    return sorted(entry.name.removesuffix(".toml") for entry in SHIPPED.iterdir() if entry.name.endswith(".toml"))


def load_profile(name: str = DEFAULT_PROFILE) -> Profile:
    """A profile: a path if `name` ends in `.toml`, else one that is shipped.

    A table that a file names by a relative path is looked for beside the file. Raises `ConfigError` naming the spot.
    """
    if not name.endswith(".toml"):
        if name not in profile_names():
            raise ConfigError(f"unknown profile {name!r}", hint=did_you_mean(name, profile_names()))
        return parse_toml((SHIPPED / f"{name}.toml").read_text(encoding="utf-8"), Profile, f"{name}.toml")
    profile = load_toml(name, Profile)
    table = profile.step_time.parameters.get("table")
    if isinstance(table, str) and table.endswith(".csv"):
        parameters = {**profile.step_time.parameters, "table": str(Path(name).parent / table)}
        choice = msgspec.structs.replace(profile.step_time, parameters=parameters)
        profile = msgspec.structs.replace(profile, step_time=choice)
    return profile
