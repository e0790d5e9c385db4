"""Take turns."""

from rota.serving.api import NOTHING, ClusterView, EngineCapabilities, InstanceId, Pick, Request


class RoundRobin:
    """Each request goes to the next instance by id after the one picked last, and from the last to the first again.

    Rule: the default of most load balancers. Good when requests are alike and instances equal, and as the control that
    every other policy is measured against. Starves the requests behind a long one: it looks at no load, so one instance
    may queue while another idles. The state is one id, so instances may come and go without losing the turn.
    """

    requires: EngineCapabilities = NOTHING

    def __init__(self) -> None:
        self._last: InstanceId | None = None

    def pick(self, request: Request, cluster: ClusterView) -> Pick:
        instances = cluster.instances
        chosen = instances[0].id
        last = self._last
        if last is not None:
            for instance in instances:
                if instance.id > last:
                    chosen = instance.id
                    break
        self._last = chosen
        return Pick(chosen, f"next in turn of {len(instances)}" if last is None else f"next in turn after {last}")
