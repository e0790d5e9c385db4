"""Bounded queues and tokens per minute, for each tenant and in all."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from rota.base.errors import ConfigError
from rota.base.instant import Duration, Instant, after, seconds, to_seconds
from rota.serving.api import NOTHING, Admission, ClusterView, EngineCapabilities, Request, RequestId, TenantId
from rota.serving.policies.admission.drain_rate import DrainRate
from rota.serving.policies.admission.fitting import why_never
from rota.serving.policies.admission.token_bucket import TokenBucket

OnLimit = Literal["refuse", "queue"]
_NUM_TENANTS_MAX = 4096
"""Tenants that are kept apart at once. Beyond it those who are new share one queue and one bucket until others are
idle."""
_LOOK_EVERY = seconds(1)


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one tenant may have."""

    max_unfinished: int = 1024
    tokens_per_minute: int | None = None
    on_limit: OnLimit = "refuse"


class TenantLimits:
    """Admit within bounds on what is unfinished, in all and of each tenant, and on the tokens of each tenant in a
    minute.

    Rule, in this order. What fits at no instance, however long it waits, is refused with 400. With `max_unfinished`
    requests unfinished in all, 503. With `max_unfinished_per_tenant` of the tenant's own, 429. A tenant with
    `tokens_per_minute` has a bucket that holds a minute's worth: a request takes its prompt and its `max_tokens` from
    it on arrival, and what it did not use is given back at its end. What comes too early is refused with 429, or, with
    `on_limit = "queue"`, let in and dispatched when the bucket has enough, in the order of arrival within the tenant; a
    wait of more than `max_wait_seconds` is refused.

    Retry-After is predicted: for a full queue when the place of whoever is turned away comes free at the rate of the
    last window (the tenant's own, or that of all), each in a row a place later; for tokens when the bucket has enough.

    Good where tenants are known by key. Without keys a tenant is a name that anybody may invent, and limits of one are
    no limits of a client. Starves nobody inside; a tenant beyond its limits waits for itself alone. `tenants` says what
    differs for whom; what is left out there is as for everybody.
    """

    requires: EngineCapabilities = NOTHING

    def __init__(
        self,
        *,
        max_unfinished: int = 4096,
        max_unfinished_per_tenant: int = 1024,
        tokens_per_minute: int | None = None,
        on_limit: OnLimit = "refuse",
        max_wait_seconds: float = 60.0,
        window_seconds: float = 10.0,
        fit_slack: float = 0.25,
        tenants: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """`fit_slack` is the share by which an estimated length may be too long. Raises `ConfigError` naming what is
        out of bounds."""
        for name, value in (("max_wait_seconds", max_wait_seconds), ("window_seconds", window_seconds)):
            if not 0 < value < float("inf"):
                raise ConfigError(f"tenant_limits: {name} must be above 0, not {value}")
        if not 0 <= fit_slack < float("inf"):
            raise ConfigError(f"tenant_limits: fit_slack must be at least 0, not {fit_slack}")
        if max_unfinished < 1:
            raise ConfigError(f"tenant_limits: max_unfinished must be at least 1 request, not {max_unfinished}")
        self._max_unfinished = max_unfinished
        self._everybody = Limits(max_unfinished_per_tenant, tokens_per_minute, on_limit)
        _check("", self._everybody)
        self._limits = {
            TenantId(name): _limits(name, self._everybody, terms) for name, terms in (tenants or {}).items()
        }
        self._max_wait = seconds(max_wait_seconds)
        self._window = seconds(window_seconds)
        self._fit_slack = fit_slack
        self._drain = DrainRate(self._window)
        self._tenants: dict[TenantId, _Tenant] = {}
        self._others: _Tenant | None = None
        self._looked_at: Instant | None = None
        self._inside: dict[RequestId, tuple[_Tenant, int]] = {}
        """Whose each unfinished request is, and the tokens that it took."""

    def admit(self, request: Request, cluster: ClusterView, num_unfinished: int) -> Admission:
        now = cluster.now
        never = why_never(request, cluster, self._fit_slack)
        if never is not None:
            return Admission(False, never, 400)
        if num_unfinished >= self._max_unfinished:
            delay = self._drain.turned_away(now)
            why = (
                f"the server is overloaded: {num_unfinished} requests are unfinished and {self._max_unfinished} may be"
            )
            return _refused(why, 503, delay)
        tenant = self._tenant(request.tenant, now)
        limits = tenant.limits
        if tenant.num_unfinished >= limits.max_unfinished:
            delay = tenant.drain.turned_away(now)
            why = f"tenant {request.tenant!r} has {tenant.num_unfinished} requests unfinished and may have"
            return _refused(f"{why} {limits.max_unfinished}", 429, delay)
        return self._within_rate(request, tenant, now)

    def request_ended(self, request: Request, num_output_tokens: int | None) -> None:
        tenant, num_taken = self._inside.pop(request.id, (None, 0))
        if tenant is None:
            return
        tenant.num_unfinished -= 1
        tenant.drain.ended()
        self._drain.ended()
        if tenant.bucket is not None and num_output_tokens is not None:
            num_used = request.num_prompt_tokens + num_output_tokens
            tenant.bucket.give_back(max(0, num_taken - num_used))

    def _within_rate(self, request: Request, tenant: "_Tenant", now: Instant) -> Admission:
        num_tokens = request.num_prompt_tokens + request.max_tokens
        bucket, not_before = tenant.bucket, None
        reason = f"tenant {request.tenant!r} has {tenant.num_unfinished} requests unfinished"
        if bucket is not None:
            may = f"tenant {request.tenant!r} may have {bucket.rate} tokens per minute"
            if num_tokens > bucket.rate:
                return Admission(False, f"{may}, and this request alone asks for {num_tokens}", 429)
            wait = bucket.wait(num_tokens, now)
            bound = self._max_wait if tenant.limits.on_limit == "queue" else Duration(0)
            if wait > bound:
                return _refused(f"{may}, and has had them", 429, to_seconds(Duration(wait - bound)))
            bucket.take(num_tokens)
            if wait:
                not_before = after(now, wait)
                reason = f"{may}, and waits for {num_tokens} of them"
        tenant.num_unfinished += 1
        tenant.drain.let_in(now)
        self._drain.let_in(now)
        self._inside[request.id] = tenant, num_tokens
        return Admission(True, reason, not_before=not_before)

    def _tenant(self, name: TenantId, now: Instant) -> "_Tenant":
        tenant = self._tenants.get(name)
        if tenant is not None:
            return tenant
        if len(self._tenants) >= _NUM_TENANTS_MAX:
            self._forget_the_idle(now)
            if len(self._tenants) >= _NUM_TENANTS_MAX and name not in self._limits:
                if self._others is None:
                    self._others = _Tenant(self._everybody, self._window, now)
                return self._others
        tenant = self._tenants[name] = _Tenant(self._limits.get(name, self._everybody), self._window, now)
        return tenant

    def _forget_the_idle(self, now: Instant) -> None:
        """Those of whom nothing is unfinished and whose bucket is full are as if they had never come."""
        if self._looked_at is not None and now - self._looked_at < _LOOK_EVERY:
            return
        self._looked_at = now
        self._tenants = {name: each for name, each in self._tenants.items() if not each.is_idle(now)}


class _Tenant:
    """What is known of one tenant that has something unfinished, or had lately."""

    __slots__ = ("bucket", "drain", "limits", "num_unfinished")

    def __init__(self, limits: Limits, window: Duration, now: Instant) -> None:
        self.limits = limits
        self.num_unfinished = 0
        self.drain = DrainRate(window)
        self.bucket = None if limits.tokens_per_minute is None else TokenBucket(limits.tokens_per_minute, now)

    def is_idle(self, now: Instant) -> bool:
        return not self.num_unfinished and (self.bucket is None or self.bucket.is_full(now))


def _refused(why: str, status: int, delay: float) -> Admission:
    return Admission(False, f"{why}; try again in {delay:.3g} s", status, delay)


def _limits(name: str, everybody: Limits, terms: Mapping[str, Any]) -> Limits:
    try:
        limits = msgspec.convert({**msgspec.structs.asdict(everybody), **terms}, Limits)
    except msgspec.ValidationError as error:
        raise ConfigError(f"tenant_limits: tenants.{name}: {error}") from None
    _check(f"tenants.{name}.", limits)
    return limits


def _check(spot: str, limits: Limits) -> None:
    if limits.max_unfinished < 1:
        raise ConfigError(
            f"tenant_limits: {spot}max_unfinished must be at least 1 request, not {limits.max_unfinished}"
        )
    if limits.tokens_per_minute is not None and limits.tokens_per_minute < 1:
        raise ConfigError(f"tenant_limits: {spot}tokens_per_minute must be at least 1, not {limits.tokens_per_minute}")
    if limits.on_limit not in ("refuse", "queue"):
        raise ConfigError(f"tenant_limits: {spot}on_limit must be refuse or queue, not {limits.on_limit!r}")
