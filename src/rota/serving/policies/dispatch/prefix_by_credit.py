"""Go where the prefix is cached, for as long as the tenant has credit there."""

from collections import OrderedDict
from collections.abc import Sequence

from rota.serving.api import (
    NOTHING,
    ClusterView,
    EngineCapabilities,
    InstanceId,
    InstanceView,
    Pick,
    Request,
    RequestId,
    TenantId,
)
from rota.serving.policies.dispatch.scoring import SCORES_MAX, least_loaded
from rota.serving.policies.parameters import above_zero, at_least_one

_NUM_TENANTS_MAX = 4096
"""Tenants whose credits are kept; beyond it the one that has sent nothing for longest is forgotten."""
_SHARE_OF_NEWEST = 0.2


class PrefixByCredit:
    """Of the instances with the longest cached prefix that the tenant has credit at, the one with the fewest
    outstanding tokens; if it has credit at none of these, so of all instances that it has credit at.

    Rule: the router half of deficit longest prefix match (D²LPM, Cao et al., 2025), with a credit for each tenant and
    instance. A dispatch costs the tenant, at that instance, `prompt_weight` for each prompt token that is not thought
    to be cached there, and `output_weight` for each output token that is expected; when the request ends, what was
    expected is replaced by what came. A request that is sent elsewhere is given back first. When a tenant has credit
    nowhere, it gets `quantum_tokens` everywhere, as often as it takes. Expected is the moving average of the tenant's
    answers, and `expected_output_tokens` before the first. Debited at dispatch, since by the time that an engine admits
    a request the router has sent it a hundred more.

    So what a tenant has sent to two instances differs by at most quantum_tokens + the cost of one request + what was
    expected wrongly of those under way. A small quantum spreads each tenant over all instances, an endless one leaves
    the longest prefix alone. Tenants are made equals inside the engines: with `order = "fair_prefix"` there, the
    services of two who wait at every one of N instances differ by at most the sum of the bounds of each. Nothing bounds
    them while one of the two waits at some of the instances only: where others are faster it could have asked for more.

    Good where tenants have documents or sessions. Starves nobody: it only says where. It knows no tenant's load but by
    its own credits, and among equals goes by outstanding tokens.
    """

    requires: EngineCapabilities = NOTHING

    def __init__(
        self,
        *,
        quantum_tokens: float = 32768.0,
        prompt_weight: float = 1.0,
        output_weight: float = 1.0,
        expected_output_tokens: float = 256.0,
    ) -> None:
        """Raises `ConfigError` for a number that is not above 0, or a quantum below 1."""
        above_zero(
            "prefix_by_credit",
            quantum_tokens=quantum_tokens,
            prompt_weight=prompt_weight,
            output_weight=output_weight,
            expected_output_tokens=expected_output_tokens,
        )
        at_least_one("prefix_by_credit", quantum_tokens=quantum_tokens)
        self._quantum = quantum_tokens
        self._per_prompt_token = prompt_weight
        self._per_output_token = output_weight
        self._expected = expected_output_tokens
        self._tenants: OrderedDict[TenantId, _Tenant] = OrderedDict()
        self._flying: dict[RequestId, tuple[_Tenant, InstanceId, float, float]] = {}
        """Where each was sent that has not ended: whose it is, what its prompt cost, and its expected output."""

    def pick(self, request: Request, cluster: ClusterView) -> Pick:
        instances = cluster.instances
        tenant = self._tenant_of(request.tenant, instances)
        self._give_back(request.id)
        credits_ = tenant.credits
        most = max([credits_[instance.id] for instance in instances])
        if most <= 0:
            given = self._quantum * (-most // self._quantum + 1)
            for instance in instances:
                credits_[instance.id] += given
        cached = [instance.num_prefix_tokens(request) for instance in instances]
        able = [each for each in zip(cached, instances, strict=True) if credits_[each[1].id] > 0]
        longest = max(cached)
        matching = [instance for num_cached, instance in able if num_cached == longest]
        chosen = least_loaded(matching or [instance for _, instance in able])
        num_cached = cached[instances.index(chosen)]
        prompt_cost = self._per_prompt_token * (request.num_prompt_tokens - num_cached)
        num_expected = min(tenant.num_expected, float(request.max_tokens))
        credits_[chosen.id] -= prompt_cost + self._per_output_token * num_expected
        self._flying[request.id] = (tenant, chosen.id, prompt_cost, num_expected)
        reason = f"{num_cached} of {request.num_prompt_tokens} prompt tokens cached, "
        reason += "the most" if matching else f"{longest} where the tenant has no credit"
        scores = tuple(
            [(instance.id, num / request.num_prompt_tokens) for num, instance in zip(cached, instances, strict=True)]
        )
        return Pick(chosen.id, reason, scores if len(instances) <= SCORES_MAX else ())

    def request_ended(self, request: Request, num_output_tokens: int | None) -> None:
        """Its tenant has paid for what came, and not for what was expected."""
        flown = self._flying.pop(request.id, None)
        if flown is None or num_output_tokens is None:
            return
        tenant, instance_id, _, num_expected = flown
        if instance_id in tenant.credits:
            tenant.credits[instance_id] += self._per_output_token * (num_expected - num_output_tokens)
        tenant.num_expected += _SHARE_OF_NEWEST * (num_output_tokens - tenant.num_expected)

    def credit(self, tenant: TenantId, instance_id: InstanceId) -> float:
        """What a tenant has left at an instance: below 0 if it owes."""
        known = self._tenants.get(tenant)
        return 0.0 if known is None else known.credits.get(instance_id, 0.0)

    def _give_back(self, request_id: RequestId) -> None:
        flown = self._flying.pop(request_id, None)
        if flown is not None:
            tenant, instance_id, prompt_cost, num_expected = flown
            if instance_id in tenant.credits:
                tenant.credits[instance_id] += prompt_cost + self._per_output_token * num_expected

    def _tenant_of(self, name: TenantId, instances: Sequence[InstanceView]) -> "_Tenant":
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(self._expected)
            if len(self._tenants) > _NUM_TENANTS_MAX:
                self._tenants.popitem(last=False)
        else:
            self._tenants.move_to_end(name)
        credits_ = tenant.credits
        for instance in instances:
            if instance.id not in credits_:
                credits_[instance.id] = 0.0
        if len(credits_) > 2 * len(instances) + 8:
            tenant.credits = {instance.id: credits_[instance.id] for instance in instances}
        return tenant


class _Tenant:
    """What a tenant has left at each instance, and how long its answers are."""

    __slots__ = ("credits", "num_expected")

    def __init__(self, num_expected: float) -> None:
        self.credits: dict[InstanceId, float] = {}
        self.num_expected = num_expected
