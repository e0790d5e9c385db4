"""What each tenant had, on `/metrics`, where tenants are known by key: at most `NUM_TENANTS_MAX` names, and `other`."""

from prometheus_client import CollectorRegistry, Counter

from rota.serving.model.request import TenantId

NUM_TENANTS_MAX = 100
OTHER = "other"


class TenantCounts:
    """The counters of one label."""

    __slots__ = ("_outcomes", "generation_tokens", "prompt_tokens")

    def __init__(self, outcomes: dict[str, Counter], prompt_tokens: Counter, generation_tokens: Counter) -> None:
        self._outcomes = outcomes
        self.prompt_tokens = prompt_tokens
        self.generation_tokens = generation_tokens

    def ended(self, outcome: str) -> None:
        """Count a request: `served`, `refused`, `failed` or `left`."""
        self._outcomes[outcome].inc()


class TenantMetrics:
    """Counters by tenant. A tenant has a label of its own if it is among the first `NUM_TENANTS_MAX` that ask; it keeps
    it, since a counter may not fall. Tenants that are called `other` share that label with the rest."""

    OUTCOMES = ("served", "refused", "failed", "left")

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "rota:tenant_requests", "Requests that ended", ["tenant", "outcome"], registry=registry
        )
        self._prompt = Counter(
            "rota:tenant_prompt_tokens", "Prompt tokens, as estimated", ["tenant"], registry=registry
        )
        self._generation = Counter(
            "rota:tenant_generation_tokens",
            "Output tokens, where the engine said how many",
            ["tenant"],
            registry=registry,
        )
        self._counts: dict[str, TenantCounts] = {}

    def of(self, tenant: TenantId) -> TenantCounts:
        """The counters of a tenant."""
        counts = self._counts.get(tenant)
        if counts is None:
            label = tenant if len(self._counts) < NUM_TENANTS_MAX else OTHER
            counts = self._counts.get(label)
            if counts is None:
                outcomes = {each: self._requests.labels(label, each) for each in self.OUTCOMES}
                counts = TenantCounts(outcomes, self._prompt.labels(label), self._generation.labels(label))
                self._counts[label] = counts
        return counts
