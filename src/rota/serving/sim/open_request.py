"""What the world notes about a request that has not ended."""

from rota.base.instant import Instant
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import Request


class OpenRequest:
    """One request, from its arrival in the world to its end."""

    __slots__ = (
        "decode_at",
        "downtime",
        "first_token_at",
        "instance_id",
        "num_cached_tokens",
        "num_migrations",
        "num_preemptions",
        "request",
        "rests_next",
        "stopped_at",
    )

    def __init__(self, request: Request) -> None:
        self.request = request
        self.first_token_at: Instant | None = None
        self.instance_id: InstanceId | None = None
        self.num_migrations = 0
        self.num_cached_tokens = 0
        """At the instances that it has left."""
        self.num_preemptions = 0
        """At the instances that it has left."""
        self.downtime = 0
        self.stopped_at: Instant | None = None
        self.rests_next = False
        """Whether it was dispatched for its prefill, and its next token has not come."""
        self.decode_at: InstanceId | None = None
        """Where its blocks go while its prompt is computed."""
