"""A stack: one policy object per hook, from a TOML file, the same in every host.

```toml
order = "strict_priority"
batch = "stall_free_chunks"

[parameters.order]
ageing_seconds = 30.0

[parameters.batch]
chunk_size = 256
```
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from rota.base.config import load_toml
from rota.base.errors import CapabilityError, ConfigError
from rota.base.random_streams import RandomStreams
from rota.base.registry import Registry
from rota.serving.api import (
    AdmissionPolicy,
    BatchPolicy,
    Capability,
    DispatchPolicy,
    EngineCapabilities,
    FleetRules,
    LengthPredictor,
    MemoryPolicy,
    MigrationPolicy,
    OrderPolicy,
    QueueRules,
    Request,
    ScalingPolicy,
)
from rota.serving.model.swapping import SwapRules
from rota.serving.policies.admission import ADMISSION
from rota.serving.policies.batch import BATCH
from rota.serving.policies.dispatch import DISPATCH
from rota.serving.policies.memory import MEMORY
from rota.serving.policies.migration import MIGRATION
from rota.serving.policies.order import ORDER
from rota.serving.policies.scaling import SCALING
from rota.serving.predictors.demand import DEMAND
from rota.serving.predictors.length import LENGTH
from rota.serving.predictors.step_time.profiles import DEFAULT_PROFILE, load_profile

REGISTRIES: Mapping[str, Registry] = {
    "order": ORDER,
    "batch": BATCH,
    "memory": MEMORY,
    "dispatch": DISPATCH,
    "admission": ADMISSION,
    "migration": MIGRATION,
    "scaling": SCALING,
}
"""The kinds of policy, in the order in which docs and command line list them."""


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A table of parameters for each kind of policy; the names are those of the policy's constructor."""

    order: dict[str, Any] = {}
    batch: dict[str, Any] = {}
    memory: dict[str, Any] = {}
    dispatch: dict[str, Any] = {}
    admission: dict[str, Any] = {}
    migration: dict[str, Any] = {}
    scaling: dict[str, Any] = {}
    demand: dict[str, Any] = {}
    length: dict[str, Any] = {}
    quick_length: dict[str, Any] = {}
    profile: str = DEFAULT_PROFILE
    """Of the engines, where a policy of the router predicts their steps."""


class StackConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stack file says. The defaults are vLLM's own scheduling, behind a router that balances by work."""

    order: str = "fcfs"
    batch: str = "vllm_default"
    memory: str = "recompute_lowest"
    dispatch: str = "prefix_then_load"
    admission: str = "bounded_queue"
    migration: str = "none"
    scaling: str = "none"
    fleet: FleetRules = FleetRules()
    """Bounds of whatever scales."""
    queue: QueueRules = QueueRules()
    """How much an instance is given at once, and how the rest waits at the router: in the order of `order`."""
    demand: str = "holt_winters"
    """What a scaling policy that forecasts is given to forecast with."""
    swap: SwapRules | msgspec.UnsetType = msgspec.UNSET
    """Host memory that preempted requests are swapped to; unless said, they are computed again."""
    length: str | msgspec.UnsetType = msgspec.UNSET
    """What an order that goes by output length is given to predict it with; `history` unless said."""
    quick_length: str | msgspec.UnsetType = msgspec.UNSET
    """What an order that predicts twice is given for its first, cheap guess; `declared` unless said."""
    parameters: Parameters = Parameters()


@dataclass(frozen=True, slots=True)
class EnginePolicies:
    """The policies that decide an engine's next step. One engine, one set: a policy may keep state."""

    order: OrderPolicy
    batch: BatchPolicy
    memory: MemoryPolicy


@dataclass(frozen=True, slots=True)
class LengthServices:
    """What the host of an engine brings to its predictors of output length; a live one brings nothing."""

    truth: Callable[[Request], int] | None = None
    """The true output length of a request that is here: known in a simulation, and given to the oracle alone."""
    watched: Callable[[str, LengthPredictor], LengthPredictor] = lambda name, predictor: predictor
    """Each predictor, by name, as its policy shall see it: a simulation keeps books of what it says."""


LIVE = LengthServices()


@dataclass(frozen=True, slots=True)
class ClusterPolicies:
    """The policies that decide at the router."""

    dispatch: DispatchPolicy
    admission: AdmissionPolicy
    migration: MigrationPolicy
    scaling: ScalingPolicy
    order: OrderPolicy | None
    """Of the router's queue; None where it holds only what no instance can take."""


def load_stack(path: str | Path | None) -> StackConfig:
    """Read a stack file; no file is the default stack. Raises `ConfigError` naming file, line and key."""
    return StackConfig() if path is None else load_toml(path, StackConfig)


def engine_policies(
    config: StackConfig, capabilities: EngineCapabilities, engine: str, lengths: LengthServices = LIVE
) -> EnginePolicies:
    """Build the policies for one engine. An order that names `lengths` or `quick_lengths` in its constructor gets
    predictors of its own. Raises `ConfigError` for a name or parameter that is unknown, and `CapabilityError` if
    `engine` cannot do what a policy needs."""
    policies = EnginePolicies(
        order=_create("order", config, _length_predictors(config, lengths)),
        batch=_create("batch", config, {}),
        memory=_create("memory", config, {}),
    )
    if config.swap and Capability.SWAP not in capabilities:
        raise CapabilityError(
            f"the stack swaps to host memory, which {engine} cannot be told",
            hint="leave [swap] out; only simulated engines of kind model have it",
        )
    for kind, policy in (("order", policies.order), ("batch", policies.batch), ("memory", policies.memory)):
        refuse_missing(kind, getattr(config, kind), policy.requires, capabilities, engine)
    return policies


def cluster_policies(config: StackConfig, streams: RandomStreams) -> ClusterPolicies:
    """Build the policies for the router. A policy that names `stream` in its constructor gets one of its own."""
    return ClusterPolicies(
        dispatch=_create("dispatch", config, {"stream": streams.stream("dispatch")}),
        admission=_create("admission", config, _step_times_of(config)),
        migration=_create("migration", config, {}),
        scaling=_create("scaling", config, _predictor_of(config)),
        order=_create("order", config, _length_predictors(config, LIVE))
        if config.queue.max_outstanding_per_instance
        else None,
    )


def _predictor_of(config: StackConfig) -> Mapping[str, object]:
    """A scaling policy that names `predictor` in its constructor gets one; others need not have it installed."""
    if "predictor" not in inspect.signature(SCALING.load(config.scaling, where="stack: scaling")).parameters:
        return {}
    return {"predictor": DEMAND.create(config.demand, config.parameters.demand, where="stack: demand")}


def _length_predictors(config: StackConfig, host: LengthServices) -> Mapping[str, object]:
    """The predictors that the order names in its constructor; others need not have theirs installed."""
    takes = inspect.signature(ORDER.load(config.order, where="stack: order")).parameters
    given: dict[str, object] = {}
    for service, kind, name in (
        ("lengths", "length", config.length or "history"),
        ("quick_lengths", "quick_length", config.quick_length or "declared"),
    ):
        if service not in takes:
            continue
        where = f"stack: {kind}"
        services: dict[str, object] = {}
        if "truth" in inspect.signature(LENGTH.load(name, where=where)).parameters:
            if host.truth is None:
                raise ConfigError(
                    f"{where}: {name!r} asks for true output lengths, which only `rota simulate` and studies know",
                    hint="leave it out, or name another predictor, such as history",
                )
            services["truth"] = host.truth
        parameters = getattr(config.parameters, kind)
        given[service] = host.watched(name, LENGTH.create(name, parameters, services=services, where=where))
    return given


def _step_times_of(config: StackConfig) -> Mapping[str, object]:
    """An admission policy that names `step_time` in its constructor gets the predictor of a profile."""
    if "step_time" not in inspect.signature(ADMISSION.load(config.admission, where="stack: admission")).parameters:
        return {}
    profile = load_profile(config.parameters.profile)
    return {"step_time": profile.predictor(), "step_overhead": profile.step_overhead()}


def refuse_missing(
    kind: str, name: str, requires: EngineCapabilities, capabilities: EngineCapabilities, engine: str
) -> None:
    """Raise `CapabilityError` if the engine lacks something that the policy requires."""
    missing = sorted(requires - capabilities)
    if missing:
        able = [
            other
            for other in REGISTRIES[kind].names()
            if isinstance(needs := getattr(REGISTRIES[kind].load(other), "requires", None), frozenset)
            and needs <= capabilities
        ]
        raise CapabilityError(
            f"{kind} policy {name!r} needs {', '.join(missing)}, which {engine} cannot be told",
            hint=f"{kind} policies that {engine} can host: {', '.join(able)}",
        )


def _create(kind: str, config: StackConfig, services: Mapping[str, object]) -> Any:
    return REGISTRIES[kind].create(
        getattr(config, kind), getattr(config.parameters, kind), services=services, where=f"stack: {kind}"
    )
