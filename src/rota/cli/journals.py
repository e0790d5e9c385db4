"""Journals on disk, and the machines that made them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from rota.base.errors import DataError
from rota.base.journal import JournalFile, Row, read_journal
from rota.base.machine import Machine
from rota.serving.assemble import ROW_TYPES, SystemConfig, build, build_instance, instance_name
from rota.serving.model.events import InstanceStarted
from rota.serving.stack import StackConfig, engine_policies

_ENGINE = "instance"
"""The one machine in a journal that an engine wrote about itself."""


def open_journal(path: Path) -> JournalFile:
    """A journal of a system, or of one engine. Raises `DataError` if it is none."""
    return read_journal(path, {**ROW_TYPES, _ENGINE: ROW_TYPES["instance/"]})


class FreshMachines:
    """The machines of a journal, built anew from the configuration in its header."""

    def __init__(self, journal: JournalFile) -> None:
        """Raises `DataError` if the header does not say how to build them, and what building them raises."""
        self._journal = journal
        self._config = SystemConfig()
        config = journal.header.config
        if isinstance(config, dict) and "planning" in config:
            self.by_name: dict[str, Machine[Any, Any]] = {_ENGINE: self._engine_machine(journal)}
        else:
            self._config = self._system_config(config)
            self.by_name = build(self._config).by_name()
        self._specs = {spec.id: spec for spec in self._config.instances}

    def _engine_machine(self, journal: JournalFile) -> Machine[Any, Any]:
        """The machine that stands for one vLLM instance with our plug-in."""
        from rota.base.config import parse_toml
        from rota.serving.engines.vllm.hosting import VLLM_CAPABILITIES
        from rota.serving.engines.vllm.replay import fresh_machine, stack_of

        stack = parse_toml(stack_of(journal.header), StackConfig, f"{journal.path}:1: stack")
        return fresh_machine(journal.header, engine_policies(stack, VLLM_CAPABILITIES, "vLLM 0.32"))

    def _system_config(self, config: object) -> SystemConfig:
        try:
            return msgspec.convert(config, SystemConfig)
        except msgspec.ValidationError as error:
            raise DataError(
                f"{self._journal.path}:1: the header's config does not say what machines to build: {error}",
                hint=f"it was written by rota {self._journal.header.rota_version}",
            ) from None

    def rows(self) -> Iterator[Row]:
        """The journal's rows. An instance that came later, or came back, gets a fresh machine when its first row
        comes."""
        for row in self._journal:
            if isinstance(row.event, InstanceStarted):
                self._specs[row.event.spec.id] = row.event.spec
            if row.machine not in self.by_name:
                self._restart(row.machine)
            yield row

    def _restart(self, machine: str) -> None:
        for spec in self._specs.values():
            incarnation = machine.removeprefix(f"{instance_name(spec.id)}#")
            is_later = incarnation.isdecimal() and machine == instance_name(spec.id, int(incarnation))
            if is_later or machine == instance_name(spec.id):
                self.by_name[machine] = build_instance(self._config.stack, spec)
