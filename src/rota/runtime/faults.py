"""What goes wrong, decided beforehand from a seed: the same seed breaks the same things at the same instants.

Kinds and targets are words that only the world understands.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rota.base.errors import ConfigError
from rota.base.instant import Duration, Instant
from rota.base.random_streams import Stream


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong."""

    kind: str
    target: str
    at: Instant
    duration: Duration = Duration(0)
    """0 for what does not pass by itself, or takes no time."""
    magnitude: float = 1.0
    """How bad; what it measures is the kind's business (a slowdown factor, a share of losses)."""


@dataclass(frozen=True, slots=True)
class FaultKind:
    """What a kind of fault may look like: each number is drawn evenly between its two bounds."""

    name: str
    duration: tuple[Duration, Duration] = (Duration(0), Duration(0))
    magnitude: tuple[float, float] = (1.0, 1.0)


class FaultPlan:
    """Faults in the order in which they strike."""

    def __init__(self, faults: Sequence[Fault] = ()) -> None:
        self.faults = tuple(sorted(faults, key=lambda fault: (fault.at, fault.target, fault.kind)))

    def __iter__(self) -> Iterator[Fault]:
        return iter(self.faults)

    def __len__(self) -> int:
        return len(self.faults)

    def active(self, kind: str, target: str, now: Instant) -> Fault | None:
        """The latest fault of this kind that holds at the target now: from `at` until `at + duration`."""
        held = None
        for fault in self.faults:
            if fault.at > now:
                break
            if (fault.kind, fault.target) == (kind, target) and now < fault.at + fault.duration:
                held = fault
        return held


def random_plan(
    stream: Stream,
    kinds: Sequence[FaultKind],
    targets: Sequence[str],
    horizon: Duration,
    num_faults: int,
    start: Instant = Instant(0),
) -> FaultPlan:
    """`num_faults` faults, each of a random kind at a random target, evenly over `[start, start + horizon)`."""
    if num_faults and not (kinds and targets and horizon > 0):
        raise ConfigError("a fault plan needs at least one kind, one target and a positive horizon")
    faults = []
    for _ in range(num_faults):
        kind = stream.choice(kinds)
        shortest, longest = kind.duration
        faults.append(
            Fault(
                kind=kind.name,
                target=stream.choice(targets),
                at=Instant(start + stream.integers(0, horizon)),
                duration=Duration(stream.integers(shortest, longest + 1)),
                magnitude=stream.uniform(*kind.magnitude),
            )
        )
    return FaultPlan(faults)


class FailNth:
    """Says which command fails: the `nth` of its kind, counted from 1.

    A loop over `nth` until `has_struck` stays false has failed every command that a run ever gives, one run each.
    """

    def __init__(self, kind: str, nth: int) -> None:
        self.kind = kind
        self.nth = nth
        self.num_seen = 0

    @property
    def has_struck(self) -> bool:
        """Whether the run came as far as the command that was to fail."""
        return self.num_seen >= self.nth

    def fails(self, command: object) -> bool:
        """Whether to fail this command. Counts it if the name of its type is the kind."""
        if type(command).__name__ != self.kind:
            return False
        self.num_seen += 1
        return self.num_seen == self.nth
