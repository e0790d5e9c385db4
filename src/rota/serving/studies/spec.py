"""What a sweep varies: a file, its points, and the run that each point stands for.

```toml
[base]                          # what all runs have in common, as rota simulate takes it
trace = "workload.toml"         # paths are looked for beside this file
slo = "ttft=500ms,tpot=50ms"

[vary]                          # every name in PARAMETERS; all combinations are run
instances = [1, 2, 4]
rate = {from = 2.0, to = 16.0, steps = 4, scale = "log"}
"stack.parameters.batch.chunk_size" = [128, 256]

[sample]                        # optional: so many combinations drawn at random in place of all
num_runs = 40
seed = 0
```
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from rota import __version__
from rota.base.config import config_hash, load_toml
from rota.base.errors import CapabilityError, ConfigError, DataError
from rota.base.nearest import did_you_mean
from rota.base.random_streams import RandomStreams, Stream
from rota.serving.assemble import build
from rota.serving.model.request import SLO
from rota.serving.predictors.step_time.profiles import load_profile
from rota.serving.sim.predictions import IN_A_SIMULATION
from rota.serving.sim.run import SimulationConfig, system_config
from rota.serving.stack import StackConfig, load_stack
from rota.serving.workload.formats import recognise
from rota.serving.workload.generator import SyntheticWorkload

Value = bool | int | float | str
Point = dict[str, Value]
"""A value for everything that is varied."""

PARAMETERS = {
    "trace": "trace file",
    "rate": "requests a second, Poisson",
    "speedup": "the trace's own arrivals, so many times as fast",
    "num_requests": "the first so many",
    "seed": "of every random draw",
    "slo": "targets, such as ttft=500ms",
    "instances": "engines behind the router",
    "profile": "model and accelerator",
    "limits.": "a limit of the engine, such as limits.max_num_seqs",
    "stack": "stack file",
    "stack.": "a key of a stack file, such as stack.order or stack.parameters.batch.chunk_size",
    "workload.": "a key of a synthetic trace, such as workload.arrivals.cv",
}
"""What can be set and varied; a name that ends with a dot takes a key behind it."""

NUM_POINTS_MAX = 100_000


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Numbers from one to another, both among them; a sample draws anywhere in between."""

    from_: float = msgspec.field(name="from")
    to: float
    steps: int = 5
    scale: Literal["linear", "log"] = "linear"

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, got {self.steps}")
        if self.scale == "log" and min(self.from_, self.to) <= 0:
            raise ValueError("a log scale needs numbers above 0")

    def values(self) -> list[Value]:
        return [self._at(step / (self.steps - 1)) for step in range(self.steps)]

    def draw(self, stream: Stream) -> Value:
        return self._at(stream.random())

    def _at(self, share: float) -> float:
        if self.scale == "log":
            return float(f"{math.exp(math.log(self.from_) * (1 - share) + math.log(self.to) * share):.12g}")
        return float(f"{self.from_ * (1 - share) + self.to * share:.12g}")


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A random sample in place of the grid."""

    num_runs: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_runs < 1:
            raise ValueError(f"num_runs must be at least 1, got {self.num_runs}")


class SweepSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a sweep file says."""

    base: dict[str, Any]
    vary: dict[str, list[Value] | Range]
    sample: Sample | None = None


def load_spec(path: Path) -> SweepSpec:
    """Read a sweep file. Raises `ConfigError` naming file, line and key."""
    return load_toml(path, SweepSpec)


def points(spec: SweepSpec) -> list[Point]:
    """All combinations, the last name varying fastest; or the sample. Raises `ConfigError` for none or too many."""
    if not spec.vary:
        raise ConfigError("vary: nothing is varied", hint="such as instances = [1, 2, 4]")
    for name, values in spec.vary.items():
        if not isinstance(values, Range) and not values:
            raise ConfigError(f"vary.{name}: has no values")
    if spec.sample is not None:
        stream = RandomStreams(spec.sample.seed).stream("sweep")
        return [
            {name: v.draw(stream) if isinstance(v, Range) else stream.choice(v) for name, v in spec.vary.items()}
            for _ in range(spec.sample.num_runs)
        ]
    axes = [values.values() if isinstance(values, Range) else values for values in spec.vary.values()]
    if math.prod(map(len, axes)) > NUM_POINTS_MAX:
        raise ConfigError(
            f"vary: {math.prod(map(len, axes)):,} combinations are more than {NUM_POINTS_MAX:,}", hint="use [sample]"
        )
    return [dict(zip(spec.vary, values, strict=True)) for values in itertools.product(*axes)]


class Runs:
    """Every run of a sweep: its point and its configuration, checked before the first one starts."""

    def __init__(self, spec: SweepSpec, folder: Path, slo_of: Callable[[str, str], SLO]) -> None:
        """`folder` is where relative paths begin, `slo_of(spot, text)` reads targets. Raises `ConfigError` naming the
        spot of a parameter that cannot be set."""
        self._folder = folder.absolute()
        self._slo_of = slo_of
        self._stacks: dict[str, StackConfig] = {}
        self._workloads: dict[str, dict[str, Any]] = {}
        self._checked: set[str] = set()
        self.files: dict[str, Path] = {}
        for where, names in (("base", spec.base), ("vary", spec.vary)):
            for name in names:
                _known(where, name)
        self.spec = spec
        self.points = points(spec)
        self.configs = [self._config({**spec.base, **point}) for point in self.points]

    def fingerprint(self) -> str:
        """Equal for sweeps whose results may be mixed: the same file, the same contents of the files that it names, the
        same version."""
        contents = {name: _digest(path) for name, path in self.files.items()}
        return config_hash([self.document(), contents, __version__])

    def document(self) -> dict[str, Any]:
        """The sweep as data."""
        document: dict[str, Any] = msgspec.to_builtins(self.spec)
        return document

    def _config(self, values: Mapping[str, Any]) -> SimulationConfig:
        if "trace" not in values:
            raise ConfigError("base.trace: is missing", hint='such as trace = "workload.toml"')
        profile = self._profile(_as(str, "profile", values.get("profile", "llama-3.1-8b-a100")))
        trace = self._path(_as(str, "trace", values["trace"]))
        slo = values.get("slo")
        config = SimulationConfig(
            trace=trace,
            num_instances=_at_least_1("instances", values.get("instances", 1)),
            profile=profile,
            stack=self._stack(values),
            seed=_as(int, "seed", values.get("seed", 0)),
            num_requests=None if "num_requests" not in values else _at_least_1("num_requests", values["num_requests"]),
            rate=None if "rate" not in values else _positive("rate", values["rate"]),
            slo=SLO() if slo is None else self._slo_of("slo", _as(str, "slo", slo)),
            speedup=_positive("speedup", values.get("speedup", 1.0)),
            workload=self._workload(trace, values),
            limits=_limits(profile, values),
        )
        self._check(config)
        return config

    def _check(self, config: SimulationConfig) -> None:
        one = system_config(dataclasses.replace(config, num_instances=1))
        key = config_hash([msgspec.to_builtins(one.stack), msgspec.to_builtins(one.instances[0])])
        if key not in self._checked:
            self._checked.add(key)
            try:
                build(one, IN_A_SIMULATION)
            except CapabilityError as error:
                raise ConfigError(error.message, hint=error.hint) from None

    def _path(self, text: str) -> Path:
        # Absolute, since other machines have other current folders; told apart by name, since a folder may be moved.
        self.files[text] = self._folder / text
        return self.files[text]

    def _profile(self, name: str) -> str:
        return str(self._path(name)) if name.endswith(".toml") else name

    def _stack(self, values: Mapping[str, Any]) -> StackConfig:
        name = values.get("stack")
        key = "" if name is None else _as(str, "stack", name)
        if key not in self._stacks:
            self._stacks[key] = load_stack(self._path(key) if key else None)
        document: dict[str, Any] = msgspec.to_builtins(self._stacks[key])
        return _overridden("stack", document, values, StackConfig) or self._stacks[key]

    def _workload(self, trace: Path, values: Mapping[str, Any]) -> SyntheticWorkload | None:
        if not any(name.startswith("workload.") for name in values):
            return None
        if recognise(trace).name != "synthetic":
            raise ConfigError(f"workload: {trace} is recorded; only a synthetic trace has keys to vary")
        if str(trace) not in self._workloads:
            self._workloads[str(trace)] = msgspec.to_builtins(load_toml(trace, SyntheticWorkload))
        return _overridden("workload", self._workloads[str(trace)], values, SyntheticWorkload)


def _limits(profile: str, values: Mapping[str, Any]) -> Any:
    limits = load_profile(profile).instance_limits()
    for name in values:
        key = name.removeprefix("limits.")
        if key != name and key not in limits.__struct_fields__:
            raise ConfigError(f"{name}: unknown limit", hint=did_you_mean(key, limits.__struct_fields__))
    return _overridden("limits", msgspec.to_builtins(limits), values, type(limits))


def _overridden(root: str, document: Mapping[str, Any], values: Mapping[str, Any], type: type[Any]) -> Any:
    """The document with the values whose names begin with `root.` set in it, as `type`; None if there are none."""
    changes = {name: value for name, value in values.items() if name.startswith(f"{root}.")}
    if not changes:
        return None
    changed: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(document))
    for name, value in changes.items():
        table = changed
        *path, last = name.split(".")[1:]
        for step in path:
            table = table.setdefault(step, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{name}: {step} is not a table")
        table[last] = value
    try:
        return msgspec.convert(changed, type, str_keys=True)
    except msgspec.ValidationError as error:
        names = ", ".join(changes)
        known = [field.encode_name for field in msgspec.structs.fields(type)]
        raise ConfigError(
            f"{names}: {str(error)[:1].lower()}{str(error)[1:]}", hint=f"keys are {', '.join(known)}"
        ) from None


def _known(where: str, name: str) -> None:
    roots = [root for root in PARAMETERS if root.endswith(".")]
    if name not in PARAMETERS and not any(name.startswith(root) and name != root for root in roots):
        raise ConfigError(f"{where}.{name}: unknown parameter", hint=did_you_mean(name, PARAMETERS))


def _as(type: type[Any], name: str, value: object) -> Any:
    if not isinstance(value, type) or isinstance(value, bool):
        raise ConfigError(f"{name}: expected {'text' if type is str else 'a whole number'}, got {value!r}")
    return value


def _at_least_1(name: str, value: object) -> int:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value != int(value) or value < 1:
        raise ConfigError(f"{name}: expected a whole number of at least 1, got {value!r}")
    return int(value)


def _positive(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"{name}: expected a number above 0, got {value!r}")
    return float(value)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
