"""What goes on now, for people to look at: instances, tenants, classes and the last refusals, from the rows alone.

A live router shows its rows to a board as they come, and a journal does the same to one later; both show the same
picture. What is kept grows with the requests under way, and with nothing else.
"""

import math
from collections import deque
from collections.abc import Iterable

from rota.base.instant import Duration, Instant, to_milliseconds, to_seconds
from rota.base.journal import Row
from rota.serving.board.instances import ShownInstance
from rota.serving.board.picture import ClassNow, Picture, RefusalNow, TenantNow
from rota.serving.model.commands import Fail, Reject
from rota.serving.model.events import (
    ClientLeft,
    FirstTokenSeen,
    InstanceDraining,
    InstanceLost,
    InstanceReported,
    InstanceStarted,
    InstanceStopped,
    RequestArrived,
    RequestFinished,
)
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import Request, RequestId, TenantId
from rota.serving.timelines import ROUTER_MACHINE, instance_of

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
"""What a token counts as service: the defaults of `fair_tokens`."""
RATE_SECONDS = 10.0
"""Rates look back about so far."""
NUM_LATENCIES = 512
"""Per class, the last so many first tokens are looked at."""
NUM_REFUSALS = 20
NUM_TENANTS, NUM_CLASSES, NUM_GONE = 1000, 32, 64
"""Of more tenants than this, those who were idle longest are forgotten; further classes count as the last."""
OTHERS = TenantId("(others)")


class Board:
    """An observer of a run (`rota.runtime.observers`), or what a journal is poured into. `picture` may be asked at any
    time."""

    def __init__(self) -> None:
        self._began_at: Instant | None = None
        self._now = Instant(0)
        self._instances: dict[InstanceId, ShownInstance] = {}
        self._tenants: dict[TenantId, _Tenant] = {}
        self._classes: dict[int, _Class] = {}
        self._under_way: dict[RequestId, _UnderWay] = {}
        self._refusals: deque[tuple[Instant, Request, Reject | Fail]] = deque(maxlen=NUM_REFUSALS)
        self._finished = _Rate()
        self._num_finished = self._num_refused = self._num_failed = 0
        self._fair_share = 0.0
        """Weighted tokens that each tenant with something under way would have had by now from a fair server."""
        self._num_active = 0

    # --- rows --------------------------------------------------------------------------------------------------------

    def on_row(self, row: Row) -> None:
        """One machine was told something and has answered."""
        if self._began_at is None:
            self._began_at = row.at
        self._now = row.at
        if row.machine == ROUTER_MACHINE:
            self._router(row)
        else:
            self._instance(instance_of(row.machine)).tell(row)

    def pour(self, rows: Iterable[Row]) -> "Board":
        """Take many rows; returns itself."""
        for row in rows:
            self.on_row(row)
        return self

    def steps_were(
        self, instance_id: InstanceId, num_steps: int, step_time: Duration, num_prefill: int, num_decode: int
    ) -> None:
        """What the steps of an instance added up to so far, where its rows do not say."""
        self._instance(instance_id).steps_were(num_steps, to_seconds(step_time), num_prefill, num_decode)

    def _router(self, row: Row) -> None:
        match row.event:
            case InstanceReported(report):
                self._instance(report.instance_id).report = report
                for running in report.running:
                    if (known := self._under_way.get(running.request_id)) is not None and known.first_token_at:
                        self._serve_output(known, running.num_tokens - known.request.num_prompt_tokens)
            case RequestArrived(request):
                self._arrived(request)
            case FirstTokenSeen(request_id):
                self._first_token(request_id, row.at)
            case RequestFinished():
                self._has_ended(row.event.request_id, row.event.num_output_tokens)
            case ClientLeft(request_id):
                self._forget(request_id)
            case InstanceStarted(spec):
                self._instance(spec.id).started(spec.limits.num_blocks, spec.role)
            case InstanceLost(instance_id):
                self._instance(instance_id).state = "lost"
            case InstanceDraining(instance_id):
                self._instance(instance_id).state = "draining"
            case InstanceStopped(instance_id):
                self._stopped(instance_id)
        for command in row.commands:
            if isinstance(command, Reject | Fail):
                self._refused(command, row.at)

    def _arrived(self, request: Request) -> None:
        tenant = self._tenant(request.tenant)
        if not tenant.num_unfinished:
            tenant.fair_share_from, tenant.service_from = self._fair_share, tenant.service
            self._num_active += 1
        tenant.num_unfinished += 1
        class_ = self._class(request.priority)
        class_.waiting[request.id] = request.arrived_at
        class_.num_unfinished += 1
        self._under_way[request.id] = _UnderWay(request, tenant, class_)

    def _first_token(self, request_id: RequestId, at: Instant) -> None:
        known = self._under_way.get(request_id)
        if known is None or known.first_token_at:
            return
        known.first_token_at = at
        known.class_.waiting.pop(request_id, None)
        known.class_.first_token(known.request, Duration(at - known.request.arrived_at))
        self._serve(known.tenant, PROMPT_WEIGHT * known.request.num_prompt_tokens)
        self._serve_output(known, 1)

    def _serve_output(self, known: "_UnderWay", num_output_tokens: int) -> None:
        if num_output_tokens > known.num_output_tokens:
            self._serve(known.tenant, OUTPUT_WEIGHT * (num_output_tokens - known.num_output_tokens))
            known.num_output_tokens = num_output_tokens

    def _serve(self, tenant: "_Tenant", service: float) -> None:
        tenant.service += service
        tenant.rate.add(service, self._now)
        self._fair_share += service / max(self._num_active, 1)

    def _has_ended(self, request_id: RequestId, num_output_tokens: int | None) -> None:
        known = self._under_way.get(request_id)
        if known is None:
            return
        self._first_token(request_id, self._now)
        self._serve_output(known, num_output_tokens or 0)
        known.tenant.num_finished += 1
        known.class_.num_finished += 1
        self._num_finished += 1
        self._finished.add(1.0, self._now)
        self._forget(request_id)

    def _refused(self, command: Reject | Fail, at: Instant) -> None:
        known = self._under_way.get(command.request_id)
        if known is None:
            return
        self._refusals.appendleft((at, known.request, command))
        if isinstance(command, Reject):
            self._num_refused += 1
            known.tenant.num_refused += 1
        else:
            self._num_failed += 1
        self._forget(command.request_id)

    def _forget(self, request_id: RequestId) -> None:
        known = self._under_way.pop(request_id, None)
        if known is None:
            return
        known.class_.waiting.pop(request_id, None)
        known.class_.num_unfinished -= 1
        known.tenant.num_unfinished -= 1
        if not known.tenant.num_unfinished:
            self._num_active -= 1

    def _stopped(self, instance_id: InstanceId) -> None:
        self._instance(instance_id).state = "stopped"
        gone = [each for each, instance in self._instances.items() if instance.state == "stopped"]
        for each in gone[:-NUM_GONE]:
            del self._instances[each]

    # --- what is kept ------------------------------------------------------------------------------------------------

    def _instance(self, instance_id: InstanceId) -> ShownInstance:
        instance = self._instances.get(instance_id)
        if instance is None:
            instance = self._instances[instance_id] = ShownInstance(instance_id)
        return instance

    def _tenant(self, name: TenantId) -> "_Tenant":
        tenant = self._tenants.pop(name, None)
        if tenant is None:
            if len(self._tenants) >= NUM_TENANTS:
                idle = next((each for each, known in self._tenants.items() if not known.num_unfinished), None)
                if idle is None:
                    return self._tenants.setdefault(OTHERS, _Tenant(OTHERS))
                del self._tenants[idle]
            tenant = _Tenant(name)
        self._tenants[name] = tenant  # At the end: those at the front were idle longest.
        return tenant

    def _class(self, priority: int) -> "_Class":
        class_ = self._classes.get(priority)
        if class_ is None:
            if len(self._classes) >= NUM_CLASSES:
                return self._classes[max(self._classes)]
            class_ = self._classes[priority] = _Class(priority)
        return class_

    # --- the picture -------------------------------------------------------------------------------------------------

    def picture(self, now: Instant | None = None, num_tenants: int = 50) -> Picture:
        """Everything at `now`, or at the last row; of the tenants, so many."""
        now = max(self._now, now or self._now)
        tenants = sorted(self._tenants.values(), key=lambda each: (-each.num_unfinished, -each.service, each.id))
        return Picture(
            seconds=to_seconds(now - self._began_at) if self._began_at is not None else 0.0,
            num_unfinished=len(self._under_way),
            num_finished=self._num_finished,
            num_refused=self._num_refused,
            num_failed=self._num_failed,
            finished_per_second=self._finished.at(now),
            instances=tuple(self._instances[each].now(now) for each in sorted(self._instances)),
            tenants=tuple(each.now(now, self._fair_share) for each in tenants[:num_tenants]),
            classes=tuple(self._classes[each].now(now) for each in sorted(self._classes)),
            refusals=tuple(_refusal(now, *each) for each in self._refusals),
        )


# --- inside ----------------------------------------------------------------------------------------------------------


class _Rate:
    """So much a second, looking back about `RATE_SECONDS`."""

    __slots__ = ("_at", "_per_second")

    def __init__(self) -> None:
        self._per_second = 0.0
        self._at = Instant(0)

    def add(self, amount: float, now: Instant) -> None:
        self._per_second = self.at(now) + amount / RATE_SECONDS
        self._at = now

    def at(self, now: Instant) -> float:
        return self._per_second * math.exp(-to_seconds(now - self._at) / RATE_SECONDS)


class _UnderWay:
    """A request that has not ended."""

    __slots__ = ("class_", "first_token_at", "num_output_tokens", "request", "tenant")

    def __init__(self, request: Request, tenant: "_Tenant", class_: "_Class") -> None:
        self.request = request
        self.tenant = tenant
        self.class_ = class_
        self.first_token_at: Instant | None = None
        self.num_output_tokens = 0


class _Tenant:
    def __init__(self, name: TenantId) -> None:
        self.id = name
        self.num_unfinished = self.num_finished = self.num_refused = 0
        self.service = self.service_from = self.fair_share_from = 0.0
        """The last two: when it last had nothing under way."""
        self.rate = _Rate()

    def now(self, now: Instant, fair_share: float) -> TenantNow:
        lag = 0.0
        if self.num_unfinished:
            lag = (fair_share - self.fair_share_from) - (self.service - self.service_from)
        return TenantNow(
            self.id,
            self.num_unfinished,
            self.num_finished,
            self.num_refused,
            self.service,
            self.rate.at(now),
            lag,
        )


class _Class:
    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.num_unfinished = self.num_finished = 0
        self.waiting: dict[RequestId, Instant] = {}
        """Without a token yet, the oldest first: when they arrived."""
        self._ttfts: deque[tuple[Duration, Duration | None]] = deque(maxlen=NUM_LATENCIES)
        """With what was promised."""

    def first_token(self, request: Request, after: Duration) -> None:
        self._ttfts.append((after, request.slo.ttft))

    def now(self, now: Instant) -> ClassNow:
        ttfts = sorted(after for after, _ in self._ttfts)
        promised = [(after, slo) for after, slo in self._ttfts if slo is not None]
        oldest = next(iter(self.waiting.values()), None)
        return ClassNow(
            priority=self.priority,
            num_unfinished=self.num_unfinished,
            num_waiting=len(self.waiting),
            oldest_seconds=None if oldest is None else to_seconds(now - oldest),
            num_finished=self.num_finished,
            ttft_p50_ms=_quantile_ms(ttfts, 0.50),
            ttft_p99_ms=_quantile_ms(ttfts, 0.99),
            slo_ms=to_milliseconds(min(slo for _, slo in promised)) if promised else None,
            slo_attainment=sum(after <= slo for after, slo in promised) / len(promised) if promised else None,
        )


def _refusal(now: Instant, at: Instant, request: Request, command: Reject | Fail) -> RefusalNow:
    status, retry_after = (command.status, command.retry_after) if isinstance(command, Reject) else (502, None)
    return RefusalNow(
        ago_seconds=to_seconds(now - at),
        request_id=request.id,
        tenant=request.tenant,
        priority=request.priority,
        status=status,
        reason=command.reason,
        retry_after_seconds=None if retry_after is None else to_seconds(retry_after),
    )


def _quantile_ms(sorted_values: list[Duration], share: float) -> float | None:
    if not sorted_values:
        return None
    return to_milliseconds(sorted_values[min(int(share * len(sorted_values)), len(sorted_values) - 1)])
