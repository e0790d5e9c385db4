"""One instance on a board, from the rows of its own machine where there are such, else from its reports."""

from rota.base.instant import Instant, to_milliseconds, to_seconds
from rota.base.journal import Row
from rota.serving.board.picture import InstanceNow
from rota.serving.model.commands import RunStep
from rota.serving.model.instance import InstanceId, InstanceReport, Role
from rota.serving.timelines import Residents

STEPS_SHOWN = 20
"""The make-up of a step is a mean over about so many."""


class ShownInstance:
    def __init__(self, instance_id: InstanceId) -> None:
        self.id = instance_id
        self.state = "ready"
        self.report: InstanceReport | None = None
        self._residents: Residents | None = None
        self._role = Role.MIXED
        self._num_blocks = 0
        self._num_free_blocks: int | None = None
        self._num_preemptions = 0
        self._prefill: float | None = None
        self._decode: float | None = None
        self._step_ms: float | None = None
        self._totals = (0, 0.0, 0, 0)

    def started(self, num_blocks: int, role: Role) -> None:
        """It came, or came back with nothing."""
        self._role = role
        self.state, self.report, self._residents = "ready", None, None
        self._num_blocks, self._num_free_blocks = num_blocks, None
        self._totals = (0, 0.0, 0, 0)

    def tell(self, row: Row) -> None:
        """Take a row of the instance's own machine."""
        if self._residents is None:
            self._residents = Residents()
        if self._residents.step is not None:
            under_way, began_at = self._residents.step, self._residents.step_began_at
        else:
            under_way, began_at = None, row.at
        self._residents.tell(row)
        if under_way is not None and self._residents.step is not under_way:
            self._step_ms = _blend(self._step_ms, to_milliseconds(row.at - began_at))
        for command in row.commands:
            if isinstance(command, RunStep):
                self._num_free_blocks = command.num_free_blocks
                self._num_preemptions += len(command.preempted)
                # Who gets one token decodes; a prompt's last chunk of one token is the rare exception.
                decode = sum(grant.num_tokens == 1 for grant in command.grants)
                self._decode = _blend(self._decode, decode)
                self._prefill = _blend(self._prefill, sum(grant.num_tokens for grant in command.grants) - decode)

    def steps_were(self, num_steps: int, seconds: float, num_prefill: int, num_decode: int) -> None:
        before = self._totals
        if num_steps < before[0]:  # It was started anew.
            before = (0, 0.0, 0, 0)
        count = num_steps - before[0]
        if count:
            self._step_ms = 1e3 * (seconds - before[1]) / count
            self._prefill, self._decode = (num_prefill - before[2]) / count, (num_decode - before[3]) / count
        self._totals = (num_steps, seconds, num_prefill, num_decode)

    def now(self, now: Instant) -> InstanceNow:
        running = waiting = age = None
        free, num_blocks = self._num_free_blocks, self._num_blocks
        preemptions = self._num_preemptions
        if self._residents is not None:
            running, waiting, age = len(self._residents.running), self._residents.num_waiting, 0.0
            if not self._residents.requests:
                free = num_blocks
        elif self.report is not None:
            running, waiting = self.report.num_running, self.report.num_waiting
            free, num_blocks = self.report.num_free_blocks, self.report.num_blocks
            preemptions = self.report.num_preemptions
            age = max(to_seconds(now - self.report.observed_at), 0.0)
        return InstanceNow(
            id=self.id,
            state=self.state,
            num_running=running,
            num_waiting=waiting,
            kv_use=None if free is None or not num_blocks else 1.0 - free / num_blocks,
            num_preemptions=preemptions,
            prefill_tokens_per_step=self._prefill,
            decode_tokens_per_step=self._decode,
            step_ms=self._step_ms,
            report_age_seconds=age,
            role=self._role,
        )


def _blend(mean: float | None, value: float) -> float:
    return value if mean is None else mean + (value - mean) / STEPS_SHOWN
