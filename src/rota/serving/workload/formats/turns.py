"""Turns of a conversation whose file says how long they are, and not when they come."""

from rota.base.instant import Duration, seconds
from rota.base.random_streams import Stream
from rota.serving.workload.arrivals import Arrival
from rota.serving.workload.formats.prefixes import PREFIX_BLOCK_TOKENS, Numbers, PrefixChain

MEAN_THINK_SECONDS = 10.0
"""Between an answer and the next turn: the time to read it and to write. An assumption, as no file states it."""


class Turns:
    """One conversation: it begins at 0, and each later turn waits for the one before it and a think time."""

    def __init__(self, name: str, numbers: Numbers, think_time: Stream) -> None:
        self._name = name
        self._chain = PrefixChain(numbers)
        self._think_time = think_time
        self._num_turns = 0
        self._at = 0

    def turn(self, num_prompt_tokens: int, num_output_tokens: int, *, num_shared: int) -> Arrival:
        """The next turn, whose prompt begins with so many tokens of what was said before."""
        number = self._num_turns
        gap = seconds(self._think_time.exponential(MEAN_THINK_SECONDS)) if number else Duration(0)
        self._num_turns += 1
        self._at += gap
        return Arrival(
            Duration(self._at),
            num_prompt_tokens,
            num_output_tokens,
            self._chain.prompt(num_prompt_tokens, num_shared),
            PREFIX_BLOCK_TOKENS,
            session=self._name,
            program=self._name,
            id=str(number),
            after=(str(number - 1),) if number else (),
            gap=gap,
        )
