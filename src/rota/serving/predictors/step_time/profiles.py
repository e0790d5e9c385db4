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
from rota.serving.predictors.step_time.fitted import Calibration
from rota.serving.predictors.step_time.layer_tables import read_layer_tables
from rota.serving.predictors.step_time.memory import capacity_of

DEFAULT_PROFILE = "llama-3.1-8b-a100"

SHIPPED = files("rota") / "data" / "profiles"

_MAY_BE_ZERO = ("watermark_blocks", "long_prefill_token_threshold")


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
    enable_prefix_caching: bool = True
    watermark_blocks: int = 0
    long_prefill_token_threshold: int = 0
    reserve_full_prompt: bool = True

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            least = 0 if isinstance(value, bool) or name in _MAY_BE_ZERO else 1
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model on one kind of accelerator. `source` says where the numbers are from."""

    model: str
    accelerator: str
    source: str
    step_time: StepTimeChoice
    limits: Limits
    step_overhead_ms: float = 0.0
    """What the engine spends between two forward passes."""
    front_end_ms: float = 0.0
    """What lies between a client and the engine's steps, both ways together: part of every TTFT and E2E."""
    tensor_parallel: int = 1
    calibration: Calibration | None = None
    """Where the step times were fitted to a live engine."""

    def __post_init__(self) -> None:
        for name in ("step_overhead_ms", "front_end_ms"):
            if not 0 <= getattr(self, name) < 1e6:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    def predictor(self) -> StepTimePredictor:
        """A new predictor of this profile's step times. Raises `ConfigError` or `DataError` if it cannot be built."""
        predictor: StepTimePredictor = STEP_TIMES.create(self.step_time.name, self.step_time.parameters)
        return predictor

    def step_overhead(self) -> Duration:
        """Between two forward passes of the engine."""
        return milliseconds(self.step_overhead_ms)

    def front_end(self) -> Duration:
        """Between a client and the engine's steps, both ways together."""
        return milliseconds(self.front_end_ms)

    def instance_limits(self) -> InstanceLimits:
        """The limits as instances take them."""
        return InstanceLimits(**msgspec.structs.asdict(self.limits))

    def capacity_differences(self, limits: InstanceLimits | None = None) -> list[str]:
        """Where `limits` (those of the profile if None) differ from those of the engine whose steps were timed: wrong
        capacity is the commonest cause of wrong simulations. One line each; none where all agree.

        A profile that was not calibrated is held against its own limits.
        """
        used = self.instance_limits() if limits is None else limits
        known, whose = self.instance_limits(), "the profile says"
        if self.calibration is not None and self.calibration.limits is not None:
            known, whose = self.calibration.limits, f"the engine that was calibrated ({self.calibration.engine}) has"
        return [
            f"{name} is {getattr(used, name)} here, and {whose} {getattr(known, name)}"
            for name in known.__struct_fields__
            if getattr(used, name) != getattr(known, name)
        ]


def profile_names() -> list[str]:
    """Names of the profiles that come with Rota."""
    return sorted(entry.name.removesuffix(".toml") for entry in SHIPPED.iterdir() if entry.name.endswith(".toml"))


def load_profile(name: str = DEFAULT_PROFILE) -> Profile:
    """A profile: a TOML file if `name` ends in `.toml`, one that is shipped, or a folder of layer tables.

    Tables that a file names by a relative path are looked for beside the file. A folder of tables says nothing of
    memory: its blocks are derived (`capacity_of`), and `source` shows how. Raises `ConfigError` or `DataError` naming
    the spot.
    """
    if name.endswith(".toml"):
        return _beside(load_toml(name, Profile), Path(name).parent)
    if name in profile_names():
        return parse_toml((SHIPPED / f"{name}.toml").read_text(encoding="utf-8"), Profile, f"{name}.toml")
    if Path(name).is_dir():
        return _profile_of_tables(name)
    raise ConfigError(f"unknown profile {name!r}", hint=did_you_mean(name, profile_names()))


def _beside(profile: Profile, folder: Path) -> Profile:
    parameters = dict(profile.step_time.parameters)
    for key, value in parameters.items():
        if isinstance(value, str) and (key == "tables" or (key == "table" and value.endswith(".csv"))):
            parameters[key] = str(folder / value)
    return msgspec.structs.replace(profile, step_time=StepTimeChoice(profile.step_time.name, parameters))


def _profile_of_tables(folder: str) -> Profile:
    read = read_layer_tables(folder)
    capacity = capacity_of(read.model, read.gpu)
    return Profile(
        model=read.model,
        accelerator=read.gpu,
        source=f"layer times of {read.engine}; blocks: {capacity}",
        step_time=StepTimeChoice("layerwise", {"tables": folder}),
        limits=Limits(
            num_blocks=capacity.num_blocks,
            max_num_seqs=read.max_num_seqs or 256,
            max_num_batched_tokens=read.max_num_batched_tokens or 2048,
        ),
    )
