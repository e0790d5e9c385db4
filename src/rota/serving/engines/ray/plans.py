"""What an engine on a Ray cluster is made of, told so that it can be started on any of its nodes."""

import sys
from pathlib import Path
from typing import Any, Protocol

import msgspec

from rota.serving.engines.model_package import MODEL_NAME, prepare_model
from rota.serving.engines.process import ProcessSpec
from rota.serving.engines.vllm.server import VllmServer


class EnginePlan(Protocol):
    """One engine before it has a node. Plans that are equal make engines that are."""

    @property
    def instance_id(self) -> str: ...

    def process(self, host: str, port: int) -> ProcessSpec:
        """How to run it on this node, listening there. Called on the node; files that it needs are made here."""
        ...


class SimulatedPlan(msgspec.Struct, frozen=True):
    """A simulated engine as a server of its own."""

    instance_id: str
    run_dir: str
    """Where its log goes, on whichever node it runs."""
    profile: str
    seed: int = 0
    stack_text: str | None = None
    """The stack file's content: the file itself is elsewhere."""

    def process(self, host: str, port: int) -> ProcessSpec:
        arguments = ["--host", host, "--port", str(port), "--name", self.instance_id, "--profile", self.profile]
        arguments += ["--seed", str(self.seed)]
        stack = _write_stack(self.run_dir, self.instance_id, self.stack_text)
        if stack is not None:
            arguments += ["--stack", str(stack)]
        command = (sys.executable, "-m", "rota.serving.frontdoor.simulated_server", *arguments)
        return ProcessSpec(self.instance_id, command, str(Path(self.run_dir) / f"{self.instance_id}.log"))


class VllmPlan(msgspec.Struct, frozen=True):
    """A vLLM server, with our scheduler inside or without."""

    instance_id: str
    run_dir: str
    model: str | None = None
    """A folder that is there on every node; None is the small packaged model."""
    plugin: bool = True
    scheduling_policy: str = "fcfs"
    cores: str | None = None
    options: dict[str, Any] = {}
    """Other fields of `VllmServer`."""
    stack_text: str | None = None

    def process(self, host: str, port: int) -> ProcessSpec:
        folder = prepare_model() if self.model is None else Path(self.model)
        server = VllmServer(
            model=folder,
            host=host,
            port=port,
            served_model_name=MODEL_NAME if self.model is None else folder.name,
            plugin=self.plugin,
            stack=_write_stack(self.run_dir, self.instance_id, self.stack_text) if self.plugin else None,
            scheduling_policy="priority" if self.scheduling_policy == "priority" else "fcfs",
            cores=self.cores,
            **self.options,
        )
        log_path = str(Path(self.run_dir) / f"{self.instance_id}.log")
        return ProcessSpec(self.instance_id, tuple(server.command()), log_path, dict(server.environment()))


def _write_stack(run_dir: str, instance_id: str, text: str | None) -> Path | None:
    if text is None:
        return None
    path = Path(run_dir) / f"{instance_id}.stack.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
