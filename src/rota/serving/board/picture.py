"""What a board shows at one instant. Plain values: the page, the terminal and `--json` all show these."""

import msgspec

from rota.serving.model.instance import InstanceId, Role
from rota.serving.model.request import RequestId, TenantId


class InstanceNow(msgspec.Struct, frozen=True):
    """One instance. What it does not tell is None."""

    id: InstanceId
    state: str
    """ready, draining, lost or stopped."""
    num_running: int | None
    num_waiting: int | None
    kv_use: float | None
    """Share of the blocks that requests hold, 0 to 1."""
    num_preemptions: int
    prefill_tokens_per_step: float | None
    decode_tokens_per_step: float | None
    step_ms: float | None
    report_age_seconds: float | None
    """How old that is."""
    role: Role = Role.MIXED


class TenantNow(msgspec.Struct, frozen=True):
    """One tenant."""

    id: TenantId
    num_unfinished: int
    num_finished: int
    num_refused: int
    service: float
    """Weighted tokens served since the board began: prompt tokens once, output tokens twice."""
    service_per_second: float
    lag: float
    """Weighted tokens that an ideally fair server of equal weights would have given it more since it last had nothing
    under way. Negative: it had more than that."""


class ClassNow(msgspec.Struct, frozen=True):
    """One class of priority, over its last first tokens."""

    priority: int
    num_unfinished: int
    num_waiting: int
    """Of those, how many have no token yet."""
    oldest_seconds: float | None
    """How long the oldest of these has waited."""
    num_finished: int
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    slo_ms: float | None
    """The tightest of the promised times to first token."""
    slo_attainment: float | None
    """Share of those with a promise whose first token kept it."""


class RefusalNow(msgspec.Struct, frozen=True):
    """A request that was refused, or failed."""

    ago_seconds: float
    request_id: RequestId
    tenant: TenantId
    priority: int
    status: int
    """HTTP status."""
    reason: str
    retry_after_seconds: float | None


class Picture(msgspec.Struct, frozen=True):
    """Everything, at one instant."""

    seconds: float
    """Since the first row."""
    num_unfinished: int
    num_finished: int
    num_refused: int
    num_failed: int
    finished_per_second: float
    instances: tuple[InstanceNow, ...]
    tenants: tuple[TenantNow, ...]
    """By unfinished requests and service, the busiest first."""
    classes: tuple[ClassNow, ...]
    refusals: tuple[RefusalNow, ...]
    """The latest first."""
