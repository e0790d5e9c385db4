"""Replays the journal of a live vLLM instance: would our machine have ordered the same steps?"""

from collections.abc import Sequence
from typing import Any

import msgspec

from rota.base.errors import DataError, LawBroken
from rota.base.instant import Instant
from rota.base.journal import Header, RowTypes
from rota.serving.engines.vllm.recorder import MACHINE, PLANNING
from rota.serving.instance.machine import InstanceMachine
from rota.serving.model.commands import InstanceCommand
from rota.serving.model.events import InstanceEvent
from rota.serving.model.instance import InstanceLimits

ROW_TYPES: RowTypes = {MACHINE: (InstanceEvent, InstanceCommand)}


class LoopMachine(InstanceMachine):
    """An `InstanceMachine` that plans when its host's loop comes round, not as soon as something happens: what several
    requests do that reach an idle vLLM together. The host calls `expire` for each step."""

    _is_due = False

    def expire(self, now: Instant) -> Sequence[InstanceCommand]:
        """Plan the next step, if there is work."""
        if now < self.now:
            raise LawBroken(f"law 5: an instance was told of {now} after {self.now}")
        self.now = now
        self._is_due = True
        try:
            # vLLM's own loop decides without saying why.
            return [msgspec.structs.replace(command, reasons=()) for command in self._plan()]
        finally:
            self._is_due = False

    def _plan(self) -> Sequence[InstanceCommand]:
        return super()._plan() if self._is_due else ()


def stack_of(header: Header) -> str:
    """The text of the stack file that the instance ran with; empty for the default stack."""
    return str(_config(header)["stack"])


def fresh_machine(header: Header, policies: Any, *, steady: bool = True) -> LoopMachine:
    """The machine that stands for the instance of a journal, at its start. `policies` has `order`, `batch`, `memory`,
    built anew from `stack_of(header)`. `steady` False has the batch policy asked for every step, as one that counts
    must be."""
    limits = msgspec.convert(_config(header)["limits"], InstanceLimits)
    return LoopMachine(limits, order=policies.order, batch=policies.batch, memory=policies.memory, steady=steady)


def _config(header: Header) -> dict[str, Any]:
    config = header.config
    if not isinstance(config, dict) or config.get("planning") != PLANNING:
        raise DataError("this journal is not of a live vLLM instance", hint="replay it with the configuration it names")
    return config
