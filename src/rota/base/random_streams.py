"""Chance as an argument: every random draw comes from a named stream of one seed.

This is the only file that touches a random number generator. A stream depends on the seed and on its own name, not
on which other streams exist or in which order they were made: adding a draw in one place changes nothing elsewhere.
"""

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Stream:
    """One reproducible sequence of draws. Each draw moves the stream on."""

    __slots__ = ("_random", "name", "random")

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        self.name = name
        self._random = random.Random(int.from_bytes(digest, "big"))
        self.random = self._random.random
        """A float in [0, 1)."""

    def integers(self, low: int, high: int) -> int:
        """An integer in [low, high), all equally likely."""
        return self._random.randrange(low, high)

    def uniform(self, low: float, high: float) -> float:
        """A float between `low` and `high`."""
        return self._random.uniform(low, high)

    def choice(self, options: Sequence[T]) -> T:
        """One of `options`, which must not be empty."""
        return self._random.choice(options)

    def sample(self, options: Sequence[T], num_chosen: int) -> list[T]:
        """`num_chosen` different positions of `options`, in random order."""
        return self._random.sample(options, num_chosen)

    def shuffle(self, items: list[T]) -> None:
        """Permute `items` in place."""
        self._random.shuffle(items)

    def exponential(self, mean: float) -> float:
        """A draw from the exponential distribution with this mean."""
        return self._random.expovariate(1.0 / mean)

    def gamma(self, shape: float, scale: float) -> float:
        """A draw from the gamma distribution, whose mean is `shape * scale`."""
        return self._random.gammavariate(shape, scale)

    def normal(self, mean: float = 0.0, deviation: float = 1.0) -> float:
        """A draw from the normal distribution."""
        return self._random.gauss(mean, deviation)


class RandomStreams:
    """All the streams of one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._streams: dict[str, Stream] = {}

    def stream(self, name: str) -> Stream:
        """The stream of this name. Asking again gives the same object, so that no draw is ever made twice."""
        stream = self._streams.get(name)
        if stream is None:
            stream = self._streams[name] = Stream(self.seed, name)
        return stream
