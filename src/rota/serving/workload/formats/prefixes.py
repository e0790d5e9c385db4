"""Prefix ids for formats that say how much of a prompt is shared with the one before, and not which text it is."""

from rota.serving.workload.arrivals import MAX_SHARED_TOKENS

PREFIX_BLOCK_TOKENS = 16
"""Granularity of shared prefixes: vLLM's block size, so that no sharing is lost to rounding."""


class PrefixChain:
    """The prompts of one conversation: each keeps the beginning of the one before, and goes on with blocks of its own.

    Ids are drawn from a `Numbers` that all conversations of a trace share, so that they never meet.
    """

    def __init__(self, numbers: "Numbers") -> None:
        self._numbers = numbers
        self._ids: tuple[int, ...] = ()

    def prompt(self, num_tokens: int, num_shared_tokens: int) -> tuple[int, ...]:
        """Ids of the full blocks of the next prompt, which shares so many leading tokens with the one before; of its
        first 2**24 tokens, that is."""
        num_blocks = min(num_tokens, MAX_SHARED_TOKENS) // PREFIX_BLOCK_TOKENS
        kept = self._ids[: min(num_shared_tokens // PREFIX_BLOCK_TOKENS, num_blocks)]
        self._ids = kept + self._numbers.take(num_blocks - len(kept))
        return self._ids


class Numbers:
    """Numbers that nobody else has, from `first` on."""

    def __init__(self, first: int = 0) -> None:
        self._next = first

    def take(self, count: int) -> tuple[int, ...]:
        """The next `count` numbers."""
        first = self._next
        self._next += count
        return tuple(range(first, self._next))
