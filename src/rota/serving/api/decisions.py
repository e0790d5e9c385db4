"""What policies answer with. Every choice carries a reason, so that `rota explain` can say why."""

from dataclasses import dataclass, field
from enum import StrEnum

from rota.base.instant import Instant
from rota.serving.model.instance import InstanceId, Role
from rota.serving.model.request import RequestId


class Refusal(StrEnum):
    """Why a draft did not grant what it was asked for."""

    NO_BUDGET = "no_budget"
    """The step's token budget is spent."""
    NO_SLOT = "no_slot"
    """As many sequences run as may."""
    NO_MEMORY = "no_memory"
    """The blocks cannot be had, and no victim may be taken."""
    NOT_PENDING = "not_pending"
    """The sequence has nothing to compute, or was preempted in this pass."""


class OnRefusal(StrEnum):
    """What a cursor wants after a refusal. This is part of the policy: first come, first served must stop."""

    SKIP = "skip"
    STOP = "stop"


class Pool(StrEnum):
    """Which sequences a cursor walks over."""

    RUNNING = "running"
    WAITING = "waiting"


@dataclass(frozen=True, slots=True)
class Pick:
    """Which instance a request goes to, and why."""

    instance_id: InstanceId
    reason: str
    scores: tuple[tuple[InstanceId, float], ...] = field(default=())
    prefill_only: bool = False
    """Whether it should decode elsewhere. Where is `decode_at`, or asked of the policy (`pick_decode`) once the first
    token has come."""
    decode_at: InstanceId | None = None
    """Where it should decode, if that is chosen now: its blocks can go there while the prompt is computed. None, or the
    instance itself, unless one of those that were offered."""


@dataclass(frozen=True, slots=True)
class Admission:
    """Whether a request may enter. `retry_after_seconds` is set only on a refusal that may pass later."""

    admitted: bool
    reason: str
    status: int = 503
    retry_after_seconds: float | None = None
    not_before: Instant | None = None
    """When one that is let in may be dispatched, if not at once: later than now."""
    instance_ids: tuple[InstanceId, ...] = ()
    """Where one that is let in may go, if not anywhere. It holds for the first attempt, while one of them is ready."""


@dataclass(frozen=True, slots=True)
class Flip:
    """An instance that should have another role, once it has nothing left, and why."""

    instance_id: InstanceId
    role: Role
    reason: str


@dataclass(frozen=True, slots=True)
class Move:
    """A running request that should go on elsewhere, and why."""

    request_id: RequestId
    source: InstanceId
    destination: InstanceId
    reason: str


@dataclass(frozen=True, slots=True)
class Start:
    """One more instance should be there, and why. One that drains is taken back first."""

    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """An instance should be drained and then stopped, and why."""

    instance_id: InstanceId
    reason: str
