"""The truth, in the simulator only."""

from collections.abc import Callable

from rota.base.errors import ConfigError
from rota.base.instant import Duration, microseconds
from rota.serving.api import Request


class Oracle:
    """An answer has as many tokens as it will truly have: the world is asked, which only a simulation has.

    The yardstick of every other predictor: what an order would be worth if lengths were known. Whatever it touched is
    marked (`"is_oracle": true`).
    """

    is_oracle = True

    def __init__(self, *, truth: Callable[[Request], int], cost_us: float = 0.0) -> None:
        """`cost_us` is what each answer takes of the engine's time, in microseconds: nothing, unless one asks what an
        order is worth whose predictions cost something."""
        if not cost_us >= 0:
            raise ConfigError(f"oracle: cost_us must not be negative, and it is {cost_us}")
        self.cost: Duration = microseconds(cost_us)
        self._truth = truth

    def predict(self, request: Request) -> float:
        return float(self._truth(request))

    def request_ended(self, request: Request, num_output_tokens: int | None) -> None:
        pass
