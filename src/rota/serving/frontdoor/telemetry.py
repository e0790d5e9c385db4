"""What the router says of itself on `/metrics`. Labels are bounded: no model or client string is ever one, and
no tenant but those that have keys (`tenant_metrics.py`)."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rota.base.instant import to_seconds
from rota.serving.live.moves import Outcome

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Telemetry:
    """Counters and histograms of one front door. Times count from the arrival of the whole request."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("rota:requests", "Answered requests", ["endpoint", "status"], registry=self.registry)
        self._requests_of: dict[tuple[str, int], Counter] = {}
        self.rejections = Counter(
            "rota:rejections", "Requests that a policy or a full queue refused", ["status"], registry=self.registry
        )
        self.refusals_held = Counter(
            "rota:refusals_held", "Refusals that were kept back, or never sent, since they were too many",
            registry=self.registry,
        )  # fmt: skip
        self.retries = Counter("rota:retries", "Attempts beyond the first", registry=self.registry)
        self.clients_left = Counter(
            "rota:clients_left", "Clients that left before their answer was complete", registry=self.registry
        )
        self.engine_failures = Counter(
            "rota:engine_failures", "Requests that ended in an error of an engine", registry=self.registry
        )
        self.output_tokens = Counter(
            "rota:generation_tokens", "Output tokens, where the engine said how many", registry=self.registry
        )
        self.prompt_tokens = Counter("rota:prompt_tokens", "Prompt tokens, as estimated", registry=self.registry)
        self.ttft = Histogram(
            "rota:time_to_first_token_seconds",
            "Arrival to the first bytes of a stream",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.e2e = Histogram(
            "rota:e2e_request_latency_seconds",
            "Arrival to the end of a good answer",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.resumption_gap = Histogram(
            "rota:resumption_gap_seconds",
            "From asking another engine to go on with a stream to its first token",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._migrations = Counter(
            "rota:migrations",
            "Moves of running requests that are over",
            ["way", "outcome"],
            registry=self.registry,
        )
        self._migration_downtime = Histogram(
            "rota:migration_downtime_seconds",
            "From the end at the source to the first token of the destination, of moves that were committed",
            ["way"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._migration_bytes = Counter(
            "rota:migration_bytes",
            "Bytes of the blocks that destinations were offered; what they had cached they did not pull",
            ["way"],
            registry=self.registry,
        )
        self.key_file_broken = Gauge(
            "rota:key_file_broken", "1 while older keys count, since their file cannot be used", registry=self.registry
        )
        self.unfinished = Gauge("rota:num_requests_unfinished", "Entered and not yet ended", registry=self.registry)

    def answered(self, endpoint: str, status: int) -> None:
        """Count an answer to a known endpoint (or `other`)."""
        child = self._requests_of.get((endpoint, status))
        if child is None:
            child = self._requests_of[(endpoint, status)] = self._requests.labels(endpoint, str(status))
        child.inc()

    def migrated(self, outcome: Outcome) -> None:
        """Count a migration that is over."""
        way = outcome.move.way
        self._migrations.labels(way, "committed" if outcome.is_committed else "aborted").inc()
        if outcome.is_committed:
            self._migration_downtime.labels(way).observe(to_seconds(outcome.downtime))
            self._migration_bytes.labels(way).inc(outcome.num_bytes)

    def page(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)
