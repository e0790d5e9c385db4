"""How long a refusal is kept back, so that whoever is refused again and again costs the router little."""

from collections import deque

NUM_A_SECOND = 200.0
"""At about 0.1 ms each a fiftieth of a core."""
NUM_AT_ONCE = 200
NUM_HELD_MAX = 2048
"""A quarter of the connections that a router takes by default; the last of them waits for ten seconds."""


class RefusalPace:
    """Says of each refusal of one tenant, or of strangers together, for how long it is kept back.

    The first `num_at_once` come at once, and so does whatever stays below `num_a_second`: a client that comes back when
    Retry-After says feels nothing. Beyond it refusals leave one after the other, `num_a_second` of them, so whoever
    awaits its answers is refused that often at most, on however many connections, old ones or new ones, and never many
    at one instant. With `num_held_max` held, further ones are not answered, and their connections are cut.

    Memory: the instants at which those that are held leave.
    """

    def __init__(
        self, num_a_second: float = NUM_A_SECOND, num_at_once: int = NUM_AT_ONCE, num_held_max: int = NUM_HELD_MAX
    ) -> None:
        self._interval = 1.0 / num_a_second
        self._slack = num_at_once * self._interval + 1e-6  # and what floats lose
        self._num_held_max = num_held_max
        self._paid_until = float("-inf")
        """When refusals that were spread evenly would have got this far."""
        self._leave_at: deque[float] = deque()

    def hold(self, now: float) -> float | None:
        """For how many seconds from `now` the next refusal is held; None if it is not answered."""
        while self._leave_at and self._leave_at[0] <= now:
            self._leave_at.popleft()
        paid_until = max(self._paid_until, now) + self._interval
        held = paid_until - now - self._slack
        if held <= 0:
            self._paid_until = paid_until
            return 0.0
        if len(self._leave_at) >= self._num_held_max:
            return None
        self._paid_until = paid_until
        self._leave_at.append(now + held)
        return held
