"""How the router holds requests back."""

import msgspec


class QueueRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What bounds the router's queue. By default it holds only what no instance can take."""

    max_outstanding_per_instance: int = 0
    """An instance is given so many requests at once; the others wait at the router, in the order of the stack's order
    policy. 0: it is given all."""
    max_held: int = 1024
    """So many arrivals are held, further ones refused."""
    timeout_seconds: float = 60.0
    """Whoever is held for so long is refused."""

    def __post_init__(self) -> None:
        for name in ("max_outstanding_per_instance", "max_held"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if not 0 < self.timeout_seconds < float("inf"):
            raise ValueError(f"timeout_seconds must be above 0, and finite, not {self.timeout_seconds}")
