"""Prompts that begin as earlier ones did: how often, how far, and how long ago those were."""

from bisect import bisect_left
from collections import deque
from math import sqrt

import msgspec

from rota.base.random_streams import Stream
from rota.serving.workload.arrivals import MAX_HASH_BLOCK_TOKENS, MAX_SHARED_TOKENS, MAX_TOKENS
from rota.serving.workload.distributions import Amounts, QuantileSampler, check, share_below
from rota.serving.workload.formats.prefixes import Numbers

MAX_LAG = 50_000
"""Rows that are remembered, at most: memory of a description that reaches back further would not be bounded."""
_NUM_TRIES = 16


class ReuseBand(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Reuse by prompts of up to so many tokens, and more than those of the band before."""

    up_to: int
    share: float
    """Of the prompts that begin as an earlier one did."""
    kept: Amounts
    """Which part of such a prompt is shared, from 0 to 1."""
    lag: Amounts
    """How many rows ago the earlier one came, at least 1."""
    correlation: float = 0.0
    """Of the normal scores of the two: what many begin with is met again soon, a long history later."""

    def __post_init__(self) -> None:
        check(1 <= self.up_to <= MAX_TOKENS, "up_to", "at least 1", self.up_to)
        check(0 <= self.share <= 1, "share", "from 0 to 1", self.share)
        check(self.kept.points()[-1][1] <= 1, "kept", "of shares from 0 to 1", self.kept.points()[-1][1])
        check(-1 <= self.correlation <= 1, "correlation", "from -1 to 1", self.correlation)
        check(self.lag.points()[0][1] >= 1, "lag", "of at least 1 row", self.lag.points()[0][1])


class PrefixReuse(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Reuse by bands of prompt length: long prompts are often conversations that go on. Prompts beyond the last band
    are as in it."""

    block_tokens: int
    bands: tuple[ReuseBand, ...]

    def __post_init__(self) -> None:
        is_fit = 16 <= self.block_tokens <= MAX_HASH_BLOCK_TOKENS
        check(is_fit, "block_tokens", f"from 16 to {MAX_HASH_BLOCK_TOKENS}", self.block_tokens)
        bounds = [band.up_to for band in self.bands]
        check(bool(bounds) and bounds == sorted(set(bounds)), "bands", "given by `up_to` that rises", bounds)


class ReuseSampler:
    """Gives each prompt its prefix ids. Remembers as many rows as the longest lag, each as a few ranges of ids."""

    def __init__(self, reuse: PrefixReuse, stream: Stream) -> None:
        self._block_tokens = reuse.block_tokens
        self._bounds = [band.up_to for band in reuse.bands]
        self._bands = [(band, QuantileSampler(band.kept), QuantileSampler(band.lag)) for band in reuse.bands]
        longest = max(band.lag.points()[-1][1] for band in reuse.bands)
        self._past: deque[tuple[range, ...]] = deque(maxlen=min(MAX_LAG, round(longest)))
        self._numbers = Numbers()
        self._stream = stream

    def prefix(self, num_prompt_tokens: int) -> tuple[int, ...]:
        """Ids of all blocks of the next prompt, the last of which may be partial; of its first 2**24 tokens."""
        num_blocks = -(-min(num_prompt_tokens, MAX_SHARED_TOKENS) // self._block_tokens)
        kept = self._kept(num_prompt_tokens, num_blocks)
        num_kept = sum(map(len, kept))
        own = self._numbers.take(num_blocks - num_kept)
        self._past.append((*kept, range(own[0], own[-1] + 1)) if own else kept)
        return tuple(block for part in kept for block in part) + own

    def _kept(self, num_prompt_tokens: int, num_blocks: int) -> tuple[range, ...]:
        band = min(bisect_left(self._bounds, num_prompt_tokens), len(self._bands) - 1)
        facts, kept, lag = self._bands[band]
        stream = self._stream
        if stream.random() >= facts.share or not self._past:
            return ()
        score = stream.normal()
        wanted = min(num_blocks, round(kept.value(share_below(score)) * num_prompt_tokens / self._block_tokens))
        rest = sqrt(1.0 - facts.correlation**2)
        best: tuple[range, ...] = ()
        longest = -1
        # An earlier prompt that is too short cannot be shared that far: look for one that is long enough.
        for _ in range(_NUM_TRIES):
            far = share_below(facts.correlation * score + rest * stream.normal())
            past = self._past[-min(len(self._past), max(1, round(lag.value(far))))]
            length = sum(map(len, past))
            if length > longest:
                best, longest = past, length
            if length >= wanted:
                break
        return _first(best, wanted)


def _first(parts: tuple[range, ...], count: int) -> tuple[range, ...]:
    """The first `count` numbers of the parts."""
    taken = []
    for part in parts:
        if count <= 0:
            break
        taken.append(part[:count])
        count -= len(part)
    return tuple(taken)
