"""What `/metrics` says of each instance, read when the page is asked for. The one label is the instance (and, for
reports, one of two sources; in a fleet with roles, its role), so the page is as long as the list of engines."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rota.base.instant import to_seconds
from rota.serving.engines.engine import StepTotals
from rota.serving.live.cluster import LiveCluster
from rota.serving.live.watch import EngineWatch
from rota.serving.model.instance import InstanceId, InstanceReport, Role

_LABEL = ("instance",)


_LOAD: tuple[tuple[str, str, Callable[[InstanceReport], float]], ...] = (
    ("num_requests_running", "Running", lambda report: report.num_running),
    ("num_requests_waiting", "Waiting", lambda report: report.num_waiting),
    ("num_free_blocks", "KV blocks that can be had", lambda report: report.num_free_blocks),
    ("num_blocks", "KV blocks in all", lambda report: report.num_blocks),
)
_STEPS: tuple[tuple[str, str, Callable[[StepTotals], float]], ...] = (
    ("steps", "Steps", lambda steps: steps.num_steps),
    ("step_seconds", "Time in steps", lambda steps: to_seconds(steps.step_time)),
    ("decision_seconds", "Time that our policies took of it", lambda steps: to_seconds(steps.decision_time)),
    ("prefill_tokens", "Prompt tokens computed", lambda steps: steps.num_prefill_tokens),
    ("decode_tokens", "Tokens decoded", lambda steps: steps.num_decode_tokens),
    ("cached_tokens", "Prompt tokens found in the prefix cache", lambda steps: steps.num_cached_tokens),
    ("preemptions", "Sequences preempted for lack of memory", lambda steps: steps.num_preempted),
    ("displacements", "Sequences that made way for others", lambda steps: steps.num_displaced),
)


class InstanceCollector(Collector):
    """State of the instances, their last reports, and what their steps added up to."""

    def __init__(self, cluster: LiveCluster, watches: Sequence[EngineWatch]) -> None:
        self._cluster = cluster
        self._watches = watches

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: what there is depends on what the engines say."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Everything, as it is now."""
        cluster, ids = self._cluster, [watch.engine.id for watch in self._watches]
        yield _gauge("num_requests_in_flight", "Dispatched and not yet ended", cluster.num_in_flight())
        ready = {name: cluster.takes_requests(name) for name in ids}
        yield _gauge("instance_ready", "1 if the instance takes requests", ready)
        if cluster.roles:
            roles = GaugeMetricFamily("rota:instance_role", "1 for what it is for", labels=("instance", "role"))
            for each in ids:
                roles.add_metric((each, cluster.roles.get(each, Role.MIXED)), 1)
            yield roles
        reports = CounterMetricFamily(
            "rota:instance_reports", "Reports of load, by where they came from", labels=("instance", "source")
        )
        for watch in self._watches:
            for source, count in watch.num_reports.items():
                reports.add_metric((watch.engine.id, source), count)
        yield reports
        last = {watch.engine.id: watch.last_report for watch in self._watches if watch.last_report is not None}
        for name, text, of_report in _LOAD:
            values = {key: of_report(report) for key, report in last.items()}
            yield _gauge(f"instance_{name}", f"{text}, as the instance last said", values)
        now = cluster.loop.now()
        ages = {key: to_seconds(now - report.observed_at) for key, report in last.items()}
        yield _gauge("instance_report_age_seconds", "How long ago that was so", ages)
        steps = {watch.engine.id: watch.steps for watch in self._watches if watch.steps is not None}
        for name, text, of_steps in _STEPS:
            family = CounterMetricFamily(f"rota:instance_{name}", f"{text}, since the engine started", labels=_LABEL)
            for key, totals in steps.items():
                family.add_metric((key,), of_steps(totals))
            yield family


def _gauge(name: str, text: str, values: Mapping[InstanceId, float]) -> Metric:
    family = GaugeMetricFamily(f"rota:{name}", text, labels=_LABEL)
    for key, value in values.items():
        family.add_metric((key,), value)
    return family
