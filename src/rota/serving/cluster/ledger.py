"""What the router knows of each instance: its own count of what is outstanding there, and the last report.

Own accounting is exact at every dispatch; a report is late by design. Policies see both, through `InstanceReading`.
"""

from collections.abc import Iterator, Sequence

from rota.base.instant import Instant
from rota.serving.api import InstanceView
from rota.serving.cluster.lifecycles import INSTANCE_LIFECYCLE, InstanceState
from rota.serving.cluster.prefix_index import PrefixIndex
from rota.serving.model.instance import InstanceId, InstanceReport, InstanceSpec, Role, SequenceReport
from rota.serving.model.request import Request, RequestId

_DRAINING = str(InstanceState.DRAINING)


class InstanceLedger:
    """One instance's state, outstanding work and last report. Written by the cluster machine alone."""

    __slots__ = (
        "_num_tokens_of",
        "_resuming",
        "_running",
        "_waiting",
        "id",
        "is_flipping",
        "max_prompt_tokens",
        "num_booked_tokens",
        "num_coming",
        "num_expected_requests",
        "num_leaving",
        "num_outstanding_tokens",
        "report",
        "restarted_at",
        "spec",
        "state",
        "view",
    )

    def __init__(self, instance_id: InstanceId, spec: InstanceSpec, prefix_index: PrefixIndex | None) -> None:
        self.id = instance_id
        self.state = str(INSTANCE_LIFECYCLE.initial)
        self.spec = spec
        self.max_prompt_tokens = max_prompt_tokens(spec)
        self.report: InstanceReport | None = None
        self.restarted_at: Instant | None = None
        self.num_outstanding_tokens = 0
        self.num_leaving = 0
        """Migrations under way from here."""
        self.num_coming = 0
        """Migrations under way to here."""
        self.num_booked_tokens = 0
        """Prompt tokens of those that are outstanding or expected."""
        self.is_flipping = False
        """Whether it drains to have another role."""
        self.num_expected_requests = 0
        """To decode here when their first token has come elsewhere."""
        self._num_tokens_of: dict[RequestId, int] = {}
        self._resuming: set[RequestId] = set()
        self._running: tuple[SequenceReport, ...] | None = ()
        self._waiting: tuple[SequenceReport, ...] | None = ()
        self.view = InstanceReading(self, prefix_index)

    @property
    def num_outstanding_requests(self) -> int:
        return len(self._num_tokens_of)

    @property
    def num_migrations(self) -> int:
        """Under way, from here or to here."""
        return self.num_leaving + self.num_coming

    @property
    def num_resuming(self) -> int:
        """Resumed here, and the next token was not seen yet."""
        return len(self._resuming)

    @property
    def running(self) -> tuple[SequenceReport, ...]:
        """Those who run by the last report and have not ended or left since, as far as the router knows. The same
        object until that changes, so that a policy can tell by it that there is nothing new to read."""
        if self._running is None:
            self._running = () if self.report is None else self._still_here(self.report.running)
        return self._running

    @property
    def waiting(self) -> tuple[SequenceReport, ...]:
        """As `running`, of those who wait."""
        if self._waiting is None:
            self._waiting = () if self.report is None else self._still_here(self.report.waiting)
        return self._waiting

    def _still_here(self, reported: tuple[SequenceReport, ...]) -> tuple[SequenceReport, ...]:
        here = [each for each in reported if each.request_id in self._num_tokens_of]
        return reported if len(here) == len(reported) else tuple(here)

    @property
    def _misses_some(self) -> bool:
        """Whether one of those that the report tells of is not shown, since it left; it might come back."""
        report = self.report
        return report is not None and (self._running is not report.running or self._waiting is not report.waiting)

    def _changed(self, request_id: RequestId) -> None:
        """A request came or went: what is shown of the report is looked up anew if that tells of this one."""
        report = self.report
        if report is None:
            return
        if self._running is not None and _tells_of(report.running, request_id):
            self._running = None
        if self._waiting is not None and _tells_of(report.waiting, request_id):
            self._waiting = None

    def num_tokens_reported(self, request_id: RequestId) -> int:
        """Known tokens of one who runs here, by the last report; 0 where that does not tell of it."""
        running = () if self.report is None else self.report.running
        return next((each.num_tokens for each in running if each.request_id == request_id), 0)

    @property
    def outstanding(self) -> Iterator[RequestId]:
        """Dispatched here and not yet ended, oldest first."""
        return iter(self._num_tokens_of)

    def move(self, event: str) -> None:
        """Take one step of the lifecycle; whatever it is, it ends a flip that was under way."""
        self.is_flipping = False
        self.state = INSTANCE_LIFECYCLE.move(self.state, event)

    def start(self, spec: InstanceSpec, now: Instant) -> None:
        """The instance is ready. If it was before, it came back with new limits and what was said of it is void."""
        if self.state != InstanceState.STARTING:
            self.restarted_at = now
        self.move("started")
        self.spec = spec
        self.max_prompt_tokens = max_prompt_tokens(spec)
        self.report = None
        self._running = self._waiting = ()

    def debit(self, request: Request, num_tokens: int, *, is_resuming: bool = False) -> None:
        """The request came here: so many tokens of it are outstanding."""
        request_id = request.id
        self._num_tokens_of[request_id] = num_tokens
        self.num_booked_tokens += request.num_prompt_tokens
        self.num_outstanding_tokens += num_tokens
        if is_resuming:
            self._resuming.add(request_id)
        if self._misses_some:
            self._changed(request_id)

    def first_token(self, request_id: RequestId) -> bool:
        """The known tokens are computed: what is left of the request is one token a step. Returns whether it was
        resumed here, and its place is free for the next one."""
        self.num_outstanding_tokens += 1 - self._num_tokens_of[request_id]
        self._num_tokens_of[request_id] = 1
        return self._resumed(request_id)

    def credit(self, request: Request) -> bool:
        """The request ended here or left, however it did. Returns whether its next token was still waited for after
        it was resumed here, so that its place is free for the next one."""
        self.num_outstanding_tokens -= self._num_tokens_of.pop(request.id)
        self.num_booked_tokens -= request.num_prompt_tokens
        self._changed(request.id)
        return self._resumed(request.id)

    def expect(self, request: Request, sign: int = 1) -> None:
        """The request is to decode here; with `sign` -1 it is not, or it has come."""
        self.num_expected_requests += sign
        self.num_booked_tokens += sign * request.num_prompt_tokens

    def _resumed(self, request_id: RequestId) -> bool:
        if request_id not in self._resuming:
            return False
        self._resuming.remove(request_id)
        return True

    def take_report(self, report: InstanceReport) -> None:
        """Keep a report if it is news: taken after the last one kept, and after the last restart."""
        if self.restarted_at is not None and report.observed_at < self.restarted_at:
            return
        if self.report is None or report.observed_at > self.report.observed_at:
            self.report = report
            self._running = self._waiting = None


def _tells_of(reported: tuple[SequenceReport, ...], request_id: RequestId) -> bool:
    return any(each.request_id == request_id for each in reported)


class InstanceReading:
    """The `InstanceView` of one ledger. One object for the life of the instance, always current, never written to."""

    __slots__ = ("_ledger", "_prefix_index", "id")

    def __init__(self, ledger: InstanceLedger, prefix_index: PrefixIndex | None) -> None:
        self.id: InstanceId = ledger.id
        self._ledger = ledger
        self._prefix_index = prefix_index

    @property
    def role(self) -> Role:
        return self._ledger.spec.role

    @property
    def observed_at(self) -> Instant | None:
        report = self._ledger.report
        return None if report is None else report.observed_at

    @property
    def num_running(self) -> int:
        report = self._ledger.report
        return 0 if report is None else report.num_running

    @property
    def num_waiting(self) -> int:
        report = self._ledger.report
        return 0 if report is None else report.num_waiting

    @property
    def num_free_blocks(self) -> int | None:
        report = self._ledger.report
        return None if report is None else report.num_free_blocks

    @property
    def num_blocks(self) -> int:
        return self._ledger.spec.limits.num_blocks

    @property
    def block_size(self) -> int:
        return self._ledger.spec.limits.block_size

    @property
    def running(self) -> Sequence[SequenceReport]:
        running = self._ledger._running  # Asked of each instance in each round: mostly it is there.
        return self._ledger.running if running is None else running

    @property
    def waiting(self) -> Sequence[SequenceReport]:
        waiting = self._ledger._waiting
        return self._ledger.waiting if waiting is None else waiting

    @property
    def max_num_seqs(self) -> int:
        return self._ledger.spec.limits.max_num_seqs

    @property
    def max_model_len(self) -> int:
        return self._ledger.spec.limits.max_model_len

    @property
    def max_num_batched_tokens(self) -> int:
        return self._ledger.spec.limits.max_num_batched_tokens

    @property
    def is_draining(self) -> bool:
        return self._ledger.state == _DRAINING

    @property
    def num_migrations(self) -> int:
        return self._ledger.num_migrations

    @property
    def num_outstanding_requests(self) -> int:
        return len(self._ledger._num_tokens_of)

    @property
    def num_outstanding_tokens(self) -> int:
        return self._ledger.num_outstanding_tokens

    @property
    def num_expected_requests(self) -> int:
        return self._ledger.num_expected_requests

    @property
    def num_booked_tokens(self) -> int:
        return self._ledger.num_booked_tokens

    def num_prefix_tokens(self, request: Request) -> int:
        return 0 if self._prefix_index is None else self._prefix_index.num_tokens(request, self.id)


class ClusterReading:
    """The `ClusterView` of one decision."""

    __slots__ = ("_instances", "_now")

    def __init__(self, now: Instant, instances: Sequence[InstanceView]) -> None:
        self._now = now
        self._instances = instances

    @property
    def now(self) -> Instant:
        return self._now

    @property
    def instances(self) -> Sequence[InstanceView]:
        return self._instances

    def __iter__(self) -> Iterator[InstanceView]:
        return iter(self._instances)


def max_prompt_tokens(spec: InstanceSpec) -> int:
    """The longest prompt that an instance takes: one more token must fit beside it."""
    limits = spec.limits
    return min(limits.max_model_len, limits.num_blocks * limits.block_size) - 1
