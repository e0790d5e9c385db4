"""How many requests a tenant may send in a minute, refused before a body is parsed or priced."""

import math

from rota.base.instant import Instant, to_seconds
from rota.serving.frontdoor.keys import KeyHolder
from rota.serving.frontdoor.problems import Problem
from rota.serving.model.request import TenantId
from rota.serving.policies.admission.token_bucket import TokenBucket


class RequestRate:
    """Holds each tenant whose terms say so to its `requests_per_minute`, by a bucket that holds a minute's worth and is
    full at first. In any minute at most two buckets go. Requests that are refused take nothing from it.

    Memory: a bucket for each such tenant that has asked."""

    def __init__(self) -> None:
        self._buckets: dict[TenantId, TokenBucket] = {}

    def check(self, holder: KeyHolder, now: Instant) -> None:
        """Take one request from the tenant's bucket. Raises `Problem` (429) with when to come back if it is empty."""
        rate = holder.terms.requests_per_minute
        if rate is None:
            return
        bucket = self._buckets.get(holder.tenant)
        if bucket is None or bucket.rate != rate:  # The keys may have changed.
            bucket = self._buckets[holder.tenant] = TokenBucket(rate, now)
        wait = to_seconds(bucket.wait(1, now))
        if wait:
            raise Problem(
                429,
                f"tenant {holder.tenant!r} may have {rate} requests per minute, and has had them; "
                f"try again in {wait:.3g} s",
                code="rejected",
                retry_after_seconds=math.ceil(wait),
            )
        bucket.take(1)

    def keep(self, tenants: set[TenantId]) -> None:
        """Forget all others."""
        self._buckets = {name: bucket for name, bucket in self._buckets.items() if name in tenants}
