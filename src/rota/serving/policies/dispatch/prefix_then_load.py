"""Go where the prefix is cached, unless that instance is overloaded."""

from bisect import bisect_right
from collections.abc import Sequence

from rota.base.errors import ConfigError
from rota.serving.api import (
    NOTHING,
    ClusterView,
    EngineCapabilities,
    InstanceId,
    InstanceView,
    Pick,
    Request,
)
from rota.serving.policies.dispatch.scoring import equally_least_loaded, least_loaded, load_scores
from rota.serving.policies.parameters import at_least_one


class PrefixThenLoad:
    """The longest cached prefix among instances that are not overloaded; where none is long enough, the least load.

    Rule: SGLang router's `cache_aware`, per instance. Filter: an instance is overloaded when its outstanding requests
    exceed the fewest of any instance by more than `balance_absolute` and by more than a factor of `balance_relative`.
    Score: the share of the prompt whose blocks are thought to be cached there. Pick: the highest share, if it is at
    least `match_min`; else the fewest outstanding tokens. Among equal shares the fewest outstanding tokens decide, then
    the id.

    The defaults are those that SGLang's router was published with (`cache_threshold` 0.5, `balance_abs_threshold` 32
    requests, `balance_rel_threshold` 1.0001); later releases start it with 0.3, 64 and 1.5. Two things differ. There,
    one overloaded instance switches the affinity off for all; here it only leaves the choice itself, so that one hot
    prefix does not cost the others their cache. And there, a request without a match goes to the smallest tree; here,
    to the least load, in turns among equals: by id alone, an idle cluster would send every new prefix to its first
    instance, whose cache then thrashes while the others stay empty.

    Good for shared system prompts, documents and sessions. Starves nobody, but lets up to `balance_absolute` requests
    of one hot prefix herd on one instance while others idle; lower it where requests are long.
    """

    requires: EngineCapabilities = NOTHING

    def __init__(self, *, match_min: float = 0.5, balance_absolute: int = 32, balance_relative: float = 1.0001) -> None:
        """`match_min` is a share of the prompt in [0, 1]; `balance_absolute` counts requests, at least 0;
        `balance_relative` is a factor of at least 1. Raises `ConfigError` outside of that."""
        if not 0.0 <= match_min <= 1.0:
            raise ConfigError(f"prefix_then_load: match_min must be a share in [0, 1], not {match_min}")
        if balance_absolute < 0:
            raise ConfigError(f"prefix_then_load: balance_absolute must be at least 0 requests, not {balance_absolute}")
        at_least_one("prefix_then_load", balance_relative=balance_relative)
        self._match_min = match_min
        self._balance_absolute = balance_absolute
        self._balance_relative = balance_relative
        self._last_unmatched: InstanceId | None = None

    def pick(self, request: Request, cluster: ClusterView) -> Pick:
        instances = cluster.instances
        if request.block_hashes:
            fewest = min([instance.num_outstanding_requests for instance in instances])
            limit = max(fewest + self._balance_absolute, fewest * self._balance_relative)
            candidates = [instance for instance in instances if instance.num_outstanding_requests <= limit]
            num_prompt_tokens = request.num_prompt_tokens
            shares = [instance.num_prefix_tokens(request) / num_prompt_tokens for instance in candidates]
            longest = max(shares)
            if longest > 0.0 and longest >= self._match_min:
                chosen = least_loaded(
                    [instance for instance, share in zip(candidates, shares, strict=True) if share == longest]
                )
                reason = f"prefix cached: {longest:.0%} of {num_prompt_tokens} prompt tokens"
                scores = [(instance.id, share) for instance, share in zip(candidates, shares, strict=True)]
                return Pick(chosen.id, reason, tuple(scores))
            instances = candidates
        chosen = self._next_least_loaded(instances)
        reason = f"no prefix long enough; fewest outstanding tokens ({chosen.num_outstanding_tokens})"
        return Pick(chosen.id, reason, load_scores(instances))

    def _next_least_loaded(self, instances: Sequence[InstanceView]) -> InstanceView:
        """One with the fewest outstanding tokens; among equals, the next in turn."""
        equals = equally_least_loaded(instances)
        last = self._last_unmatched
        place = 0 if last is None else bisect_right(equals, last, key=lambda each: each.id)
        chosen = equals[place % len(equals)]
        self._last_unmatched = chosen.id
        return chosen
