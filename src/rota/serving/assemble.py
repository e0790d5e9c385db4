"""The one place where a system is put together: command line, simulator, live host, replay and tests all call
`build`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from rota.base.errors import ConfigError, DataError
from rota.base.journal import Header, RowTypes, header_for
from rota.base.machine import Machine
from rota.base.random_streams import RandomStreams
from rota.serving.cluster.machine import ClusterMachine
from rota.serving.cluster.prefix_index import PrefixIndex
from rota.serving.instance.host_memory import HostMemory
from rota.serving.instance.machine import InstanceMachine
from rota.serving.model.commands import ClusterCommand, InstanceCommand
from rota.serving.model.events import ClusterEvent, InstanceEvent
from rota.serving.model.instance import InstanceId, InstanceSpec, Role
from rota.serving.stack import LIVE, REGISTRIES, LengthServices, StackConfig, cluster_policies, engine_policies

CLUSTER = "cluster"
"""Name of the router's machine in a journal."""


class SystemConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that decides what the machines of a run are; a journal's header carries it, so that the run can be
    replayed."""

    stack: StackConfig = StackConfig()
    instances: tuple[InstanceSpec, ...] = ()
    """Engines whose steps our machines decide. The router learns of instances from events, these and others alike."""
    seed: int = 0

    @property
    def roles(self) -> dict[InstanceId, Role]:
        """Of the instances that are not for both phases."""
        return {spec.id: spec.role for spec in self.instances if spec.role is not Role.MIXED}


ROW_TYPES: RowTypes = {CLUSTER: (ClusterEvent, ClusterCommand), "instance/": (InstanceEvent, InstanceCommand)}
"""Event and command types of the machines in a journal, by name or prefix."""


@dataclass(frozen=True, slots=True)
class System:
    """The machines of a run, fresh."""

    cluster: ClusterMachine
    instances: dict[InstanceId, InstanceMachine]

    def by_name(self) -> dict[str, Machine[Any, Any]]:
        """The machines under the names that a journal gives them."""
        named: dict[str, Machine[Any, Any]] = {CLUSTER: self.cluster}
        named.update({instance_name(instance_id): machine for instance_id, machine in self.instances.items()})
        return named


def header_of(config: SystemConfig) -> Header:
    """The journal header of a run; equal configurations have equal hashes, in every process."""
    return header_for(msgspec.to_builtins(config, order="deterministic"), config.seed)


def config_of(header: Header) -> SystemConfig:
    """The configuration that a journal's header carries. Raises `DataError` if it holds none that this version
    knows."""
    try:
        return msgspec.convert(header.config, SystemConfig)
    except msgspec.ValidationError as error:
        raise DataError(
            f"the journal's configuration cannot be used: {error}",
            hint=f"it was written by version {header.rota_version}",
        ) from None


def instance_name(instance_id: InstanceId, incarnation: int = 0) -> str:
    """Name of an instance's machine in a journal; after a restart it is another machine, with the next incarnation."""
    return f"instance/{instance_id}" if incarnation == 0 else f"instance/{instance_id}#{incarnation}"


def build(config: SystemConfig, lengths: LengthServices = LIVE) -> System:
    """Put the machines of a run together. Raises `ConfigError` or `CapabilityError` for a stack that cannot be."""
    refuse_roles(config.stack, config.roles)
    ids = [spec.id for spec in config.instances]
    if len(set(ids)) != len(ids):
        raise ConfigError(f"two instances have the same id, in {', '.join(sorted(ids))}")
    return System(
        cluster=build_cluster(config.stack, config.seed),
        instances={spec.id: build_instance(config.stack, spec, lengths) for spec in config.instances},
    )


def refuse_roles(stack: StackConfig, roles: Mapping[InstanceId, Role]) -> None:
    """Raise `ConfigError` where instances have roles that the stack's dispatch policy does not look at, or that its
    scaling policy could not tell apart; or where requests would leave an engine that swaps."""
    if stack.swap:
        refuse_moves(stack, roles, "an engine that swaps")
    instance_id, role = next(iter(roles.items()), (None, None))
    if role is not None and stack.scaling != "none":
        raise ConfigError(
            f"instance {instance_id} is for {role} only, and scaling policy {stack.scaling!r} starts mixed ones",
            hint='leave scaling = "none" where instances have roles',
        )
    registry = REGISTRIES["dispatch"]
    if role is None or getattr(registry.load(stack.dispatch), "reads_roles", False):
        return
    able = [name for name in registry.names() if getattr(registry.load(name), "reads_roles", False)]
    raise ConfigError(
        f"instance {instance_id} is for {role} only, and dispatch policy {stack.dispatch!r} does not look at roles",
        hint=f"dispatch policies that do: {', '.join(able)}",
    )


def refuse_moves(stack: StackConfig, roles: Mapping[InstanceId, Role], engine: str) -> None:
    """Raise `ConfigError` where requests would have to leave an engine that cannot let them go."""
    if roles or stack.migration != "none":
        policy = f"dispatch policy {stack.dispatch!r}" if roles else f"migration policy {stack.migration!r}"
        raise ConfigError(
            f"{engine} cannot let requests go, as {policy} would",
            hint="simulate roles and migrations with the model engine, without [swap]",
        )


def build_cluster(stack: StackConfig, seed: int) -> ClusterMachine:
    """The router's machine with the stack's policies."""
    policies = cluster_policies(stack, RandomStreams(seed))
    return ClusterMachine(
        policies.dispatch,
        policies.admission,
        prefix_index=PrefixIndex(),
        migration=policies.migration,
        scaling=policies.scaling,
        fleet=stack.fleet,
        queue=stack.queue,
        order=policies.order,
    )


def build_instance(stack: StackConfig, spec: InstanceSpec, lengths: LengthServices = LIVE) -> InstanceMachine:
    """One engine's machine with policies of its own. `lengths` is what its host knows of output lengths."""
    policies = engine_policies(stack, spec.capabilities, f"instance {spec.id}", lengths)
    host = HostMemory(stack.swap.host_blocks, reuse=stack.swap.reuse) if stack.swap else None
    return InstanceMachine(spec.limits, order=policies.order, batch=policies.batch, memory=policies.memory, host=host)
