"""A live instance's journal: what an `InstanceMachine` would have been told and would have ordered, from vLLM
itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from rota.base.instant import Instant
from rota.base.journal import Journal, header_for
from rota.serving.model.commands import Grant, RunStep
from rota.serving.model.events import SequenceAborted, SequenceArrived, StepFinished
from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import Request, RequestId

MACHINE = "instance"
PLANNING = "on_deadline"
MAX_BYTES = 256 * 1024 * 1024


class StepJournal:
    """Writes the rows of one instance. vLLM plans when its loop comes round, not when something happens; so events
    give no commands, and each step stands in a row of kind `deadline`.

    The header's config holds `limits` and the text of the stack file, which is all that fresh machines are built from.
    """

    def __init__(self, path: str | Path, limits: InstanceLimits, stack: str | None) -> None:
        text = Path(stack).read_text() if stack is not None else ""
        config = {"limits": msgspec.to_builtins(limits), "stack": text, "planning": PLANNING}
        self._journal = Journal(header_for(config, None), path=path, max_bytes=MAX_BYTES)
        self._preempted: list[str] = []

    def arrived(self, fact: Request, now: int) -> None:
        self._journal.append(MACHINE, Instant(now), "event", SequenceArrived(fact), ())

    def aborted(self, request_id: str, now: int) -> None:
        self._journal.append(MACHINE, Instant(now), "event", SequenceAborted(RequestId(request_id)), ())

    def finished(self, step_id: int, finished: Sequence[str], now: int) -> None:
        event = StepFinished(step_id, tuple(RequestId(request_id) for request_id in finished))
        self._journal.append(MACHINE, Instant(now), "event", event, ())

    def step(
        self, step_id: int, grants: Mapping[str, int], preempted: Sequence[str], num_free_blocks: int, now: int
    ) -> None:
        """A step was scheduled. One that only preempts is told with the next that runs."""
        self._preempted += preempted
        if not grants:
            return
        command = RunStep(
            step_id=step_id,
            grants=tuple(Grant(RequestId(request_id), num_tokens) for request_id, num_tokens in grants.items()),
            preempted=tuple(RequestId(request_id) for request_id in self._preempted),
            num_free_blocks=num_free_blocks,
        )
        self._preempted = []
        self._journal.append(MACHINE, Instant(now), "deadline", None, (command,))

    def flush(self) -> None:
        self._journal.flush()

    def close(self) -> None:
        self._journal.close()
