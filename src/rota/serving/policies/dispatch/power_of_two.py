"""Draw two instances, take the less loaded one."""

from rota.base.random_streams import Stream
from rota.serving.api import NOTHING, ClusterView, EngineCapabilities, Pick, Request
from rota.serving.policies.dispatch.scoring import load_scores


class PowerOfTwo:
    """Two different instances drawn at random; of these, the one with fewer outstanding tokens, the first by id if
    equal.

    Rule: the power of two choices (Mitzenmacher, 2001): with n instances the fullest of them stays near log log n above
    the mean, against log n / log log n for one random choice. Good when several routers decide on their own, or when
    load is known late, since they cannot all herd onto the one instance that looked idle. Starves nobody; with exact
    load and one router, `least_outstanding_tokens` balances better.
    """

    requires: EngineCapabilities = NOTHING

    def __init__(self, *, stream: Stream) -> None:
        """`stream` is the source of the draws: two for each pick among at least two instances."""
        self._stream = stream

    def pick(self, request: Request, cluster: ClusterView) -> Pick:
        instances = cluster.instances
        num_instances = len(instances)
        if num_instances == 1:
            return Pick(instances[0].id, "the only instance", load_scores(instances))
        first = self._stream.integers(0, num_instances)
        second = self._stream.integers(0, num_instances - 1)
        if second >= first:
            second += 1
        drawn = (instances[min(first, second)], instances[max(first, second)])
        chosen, other = drawn
        if other.num_outstanding_tokens < chosen.num_outstanding_tokens:
            chosen, other = other, chosen
        reason = (
            f"{chosen.num_outstanding_tokens} outstanding tokens against {other.num_outstanding_tokens} "
            f"on {other.id}, two drawn of {num_instances}"
        )
        return Pick(chosen.id, reason, load_scores(drawn))
