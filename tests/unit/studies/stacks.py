"""Policies that stack files of the tests name as `module:Class`."""

from rota.base.random_streams import Stream
from rota.serving.policies.dispatch.power_of_two import PowerOfTwo


class OtherDraws(PowerOfTwo):
    """The same rule, from another point of the same stream of draws: other choices, no better and no worse."""

    def __init__(self, *, stream: Stream) -> None:
        for _ in range(7):
            stream.random()
        super().__init__(stream=stream)
