"""Engines of `rota serve --on ray`: the flags that are about them, and what they become."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rota.base.errors import ConfigError
from rota.cli.flags import at_least_zero

if TYPE_CHECKING:
    from rota.serving.engines.ray.cluster import Needs, RayCluster
    from rota.serving.engines.ray.engine import RayEngine
    from rota.serving.engines.ray.fleet import RayFleet
    from rota.serving.engines.ray.plans import EnginePlan
    from rota.serving.model.instance import InstanceId

LOCAL, RAY = "local", "ray"


class RayChoice:
    """A Ray cluster, chosen by flags and joined when the first engine is to be placed on it."""

    def __init__(self, address: str | None, needs: "Needs", *, await_nodes: bool) -> None:
        self._address = address
        self._needs = needs
        self._await_nodes = await_nodes
        self._cluster: RayCluster | None = None

    def engines(
        self, plan: "Callable[[str, int], EnginePlan]", num_instances: int
    ) -> "tuple[list[RayEngine], RayFleet]":
        """So many engines, `ray-0` and so on, and the fleet that more come from. Raises `ConfigError` where the cluster
        cannot be joined or has no node for one."""
        from rota.serving.engines.ray.cluster import RayCluster

        cluster = self._cluster = RayCluster(self._address, self._needs, await_nodes=self._await_nodes)
        from rota.serving.engines.ray.engine import RayEngine  # needs Ray, which is there by now
        from rota.serving.engines.ray.fleet import RayFleet

        def one_more(instance_id: "InstanceId") -> RayEngine:
            number = int(instance_id.rpartition("-")[2])
            return RayEngine(plan(instance_id, num_instances + number - 1), cluster)

        return [RayEngine(plan(f"ray-{index}", index), cluster) for index in range(num_instances)], RayFleet(
            one_more, cluster
        )

    def plans(
        self,
        kind: str,
        run_dir: Path,
        stack_path: Path | None,
        model: Path | None,
        stock: str | None,
        options: dict[str, Any],
        profile: str,
        seed: int,
    ) -> "Callable[[str, int], EnginePlan]":
        """What makes the plan of an engine from its name and number. Files are looked for on its node, but for the
        stack's, which is read here."""
        from rota.serving.engines.ray.plans import EnginePlan, SimulatedPlan, VllmPlan
        from rota.serving.predictors.step_time.profiles import load_profile

        stack_text = None if stack_path is None else stack_path.read_text(encoding="utf-8")
        folder = str(run_dir.absolute())

        def simulated(name: str, index: int) -> EnginePlan:
            return SimulatedPlan(name, folder, profile, seed=seed + index, stack_text=stack_text)

        def vllm(name: str, index: int) -> EnginePlan:
            return VllmPlan(
                name,
                folder,
                model=None if model is None else str(model.absolute()),
                plugin=stock is None,
                scheduling_policy=stock or "fcfs",
                # Ray counts cores and binds none; instances that share all cores of a machine stall each other.
                cores=None if self._needs.num_gpus else str(index % (os.cpu_count() or 1)),
                options=options,
                stack_text=stack_text,
            )

        if kind != "simulated":
            return vllm
        load_profile(profile)  # an error here is clearer than one on each node
        return simulated

    def leave(self) -> None:
        """Leave the cluster, if it was joined."""
        if self._cluster is not None:
            self._cluster.close()


def ray_choice(
    on: str, cpus: float | None, gpus: float | None, resources: Sequence[str] | None, *, await_nodes: bool
) -> RayChoice | None:
    """What the flags choose; None is this machine. Raises `ConfigError` naming the flag."""
    word, equals, address = on.partition("=")
    if word not in (LOCAL, RAY) or (equals and (word == LOCAL or not address)):
        raise ConfigError(f"--on: must be local, ray or ray=ADDRESS, not {on!r}")
    if word == LOCAL:
        given = {"--cpus-per-instance": cpus, "--gpus-per-instance": gpus, "--resource": resources}
        given["--await-nodes"] = await_nodes or None
        for flag, value in given.items():
            if value is not None:
                raise ConfigError(f"{flag}: is about engines on a Ray cluster", hint="add --on ray")
        return None
    needs = needs_of(1.0 if cpus is None else cpus, gpus or 0.0, resources or ())
    return RayChoice(address or None, needs, await_nodes=await_nodes)


def needs_of(cpus: float, gpus: float, resources: Sequence[str]) -> "Needs":
    """What one engine takes of its node. Raises `ConfigError` naming the flag."""
    from rota.serving.engines.ray.cluster import Needs

    num_cpus = at_least_zero("--cpus-per-instance", cpus)
    num_gpus = at_least_zero("--gpus-per-instance", gpus)
    if num_gpus > 1 and num_gpus != int(num_gpus):
        raise ConfigError(f"--gpus-per-instance: Ray gives a part of one GPU or whole ones, not {num_gpus:g}")
    return Needs(num_cpus, num_gpus, dict(map(_resource, resources)))


def _resource(word: str) -> tuple[str, float]:
    name, _, amount = word.partition("=")
    try:
        number = float(amount)
    except ValueError:
        number = 0.0
    if not name or not 0 < number < 1e6 or name in ("CPU", "GPU"):
        raise ConfigError(
            f"--resource: {word!r} is not of the form NAME=AMOUNT",
            hint="such as --resource accelerator_type:A100=0.001; CPUs and GPUs have flags of their own",
        )
    return name, number
