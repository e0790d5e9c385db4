"""Go where the fewest tokens are outstanding."""

from rota.serving.api import NOTHING, ClusterView, EngineCapabilities, Pick, Request
from rota.serving.policies.dispatch.scoring import least_loaded, load_scores


class LeastOutstandingTokens:
    """The instance with the fewest outstanding tokens: prompts that wait for their first token, plus one for each
    decode.

    Rule: join the shortest queue, with the queue measured in prefill work rather than in requests. It reads the
    router's own accounting, which is exact at every dispatch, and no late report, so that a burst does not herd onto
    the instance that looked idle at the last scrape. Good under mixed prompt lengths. Starves nobody, but spreads a
    shared prefix over all instances, and at low load keeps to the first by id.
    """

    requires: EngineCapabilities = NOTHING

    def pick(self, request: Request, cluster: ClusterView) -> Pick:
        instances = cluster.instances
        chosen = least_loaded(instances)
        reason = f"fewest outstanding tokens ({chosen.num_outstanding_tokens}) of {len(instances)}"
        return Pick(chosen.id, reason, load_scores(instances))
