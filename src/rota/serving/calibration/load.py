"""The load that shows an engine's steps in their variety: stretches of a kind each, with idle moments between."""

import asyncio
from collections.abc import Callable
from itertools import count
from typing import Literal

import msgspec

from rota.base.instant import Duration, Instant
from rota.base.random_streams import RandomStreams, Stream
from rota.serving.bench.client import Sent, Target
from rota.serving.bench.plan import Planned
from rota.serving.bench.prompts import Prompts
from rota.serving.model.instance import InstanceLimits

Kind = Literal["alone", "steady", "ramp", "mixed"]

PAUSE_SECONDS = 0.7
"""Between two stretches nothing runs for so long, by which a reader of the facts knows them apart."""

_ROUND: tuple[tuple[Kind, float], ...] = (("alone", 0.8), ("mixed", 1.4), ("steady", 1.0), ("ramp", 1.2))
"""Kinds of a round and their weights of its time."""
_ROUND_SECONDS = 40.0
"""A round of about so long, so that a calibration of minutes has several of each kind."""
_DRAIN_SHARE = 0.35
"""Of a stretch, for what is under way when its sending ends; what then still runs is dropped."""
_NUM_IN_FLIGHT_MAX = 256
_TICK_SECONDS = 0.02
_OUTPUTS: dict[Kind, tuple[int, int]] = {"alone": (2, 24), "mixed": (2, 160), "steady": (16, 160), "ramp": (16, 160)}
"""Fewest and most output tokens of a request."""
_OUTPUT_TOKENS_MAX = max(most for _, most in _OUTPUTS.values())
_LONG_SHARE = 0.15
"""Of the requests of a steady or rising stretch, those whose prompt may be of any length."""
_PREFIX_SHARE = 0.3
"""Of the requests of a mixed stretch, those that begin like one before them, so that prefills have context."""


class Stretch(msgspec.Struct, frozen=True):
    """One kind of load for so long, drain included."""

    index: int
    kind: Kind
    seconds: float


def stretches(seconds: float) -> list[Stretch]:
    """Rounds of all kinds that fill the time; at least three, so that some can be held out."""
    num_rounds = max(3, round(seconds / _ROUND_SECONDS))
    weight = num_rounds * sum(share for _, share in _ROUND)
    kinds = [each for _ in range(num_rounds) for each in _ROUND]
    return [
        Stretch(index, kind, max(1.0, seconds * share / weight - PAUSE_SECONDS))
        for index, (kind, share) in enumerate(kinds)
    ]


class Load:
    """Sends stretches to one engine. How many requests are in flight is set, not how many come a second: so the batch
    sizes are those that were meant, however fast the engine is."""

    def __init__(
        self,
        target: Target,
        prompts: Prompts,
        limits: InstanceLimits,
        clock: Callable[[], Instant],
        streams: RandomStreams,
        stop: asyncio.Event,
    ) -> None:
        self._target = target
        self._prompts = prompts
        self._limits = limits
        self._clock = clock
        self._streams = streams
        self._stop = stop
        self._index = count()
        self._num_max = min(limits.max_num_seqs, _NUM_IN_FLIGHT_MAX)
        self._tasks: set[asyncio.Task[Sent]] = set()

    async def run(self, stretch: Stretch) -> list[Sent]:
        """Send one stretch, wait for its answers and pause; returns those that ended. Ends early on `stop`."""
        stream = self._streams.stream(f"calibration.{stretch.index}")
        began = asyncio.get_running_loop().time()
        sending = stretch.seconds * (1 - _DRAIN_SHARE)
        sent: list[Sent] = []
        wanted = self._wanted(stretch, stream)
        while not self._stop.is_set():
            share = (asyncio.get_running_loop().time() - began) / sending
            if share >= 1:
                break
            for _ in range(wanted(share) - len(self._tasks)):
                self._send(stretch, stream)
            await self._wait(_TICK_SECONDS, sent)
        deadline = began + stretch.seconds
        while self._tasks and not self._stop.is_set() and asyncio.get_running_loop().time() < deadline:
            await self._wait(_TICK_SECONDS, sent)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if not self._stop.is_set():
            await asyncio.sleep(PAUSE_SECONDS)
        return sent

    def _wanted(self, stretch: Stretch, stream: Stream) -> Callable[[float], int]:
        """How many requests are to be in flight, by the share of the sending time that has passed."""
        if stretch.kind == "alone":
            return lambda share: 1
        if stretch.kind == "steady":
            level = 1 + round((self._num_max - 1) * stream.random())
            return lambda share: level
        if stretch.kind == "ramp":
            return lambda share: 1 + round((self._num_max - 1) * share)
        # Mixed: levels that jump, so that prompts come in crowds and one by one.
        levels = [1 + round((self._num_max - 1) * stream.random() ** 2) for _ in range(8)]
        return lambda share: levels[int(share * len(levels))]

    def _send(self, stretch: Stretch, stream: Stream) -> None:
        index = next(self._index)
        planned = self._planned(index, stretch, stream)
        text = self._prompts.text(index, planned.num_prompt_tokens, planned.prefix_hashes, planned.hash_block_tokens)
        body = self._target.body(planned, text)
        task = asyncio.create_task(self._target.ask(planned, body, self._clock()))
        self._tasks.add(task)

    def _planned(self, index: int, stretch: Stretch, stream: Stream) -> Planned:
        longest = self._limits.max_model_len - _OUTPUT_TOKENS_MAX - 64
        longest = max(8, min(longest, self._limits.num_blocks * self._limits.block_size // 4))
        # Long prompts take most of an engine's time; where decodes are the subject, few are long.
        is_short = stretch.kind in ("steady", "ramp") and stream.random() >= _LONG_SHARE
        num_prompt_tokens = _log_uniform(stream, 4, max(8, longest // 12) if is_short else longest)
        num_output_tokens = _log_uniform(stream, *_OUTPUTS[stretch.kind])
        prefix: tuple[int, ...] = ()
        block = max(1, longest // 6)
        if stretch.kind == "mixed" and stream.random() < _PREFIX_SHARE:
            prefix = tuple(range(1, 1 + num_prompt_tokens // block))
        return Planned(
            index=index,
            at=Duration(0),
            class_name=stretch.kind,
            num_prompt_tokens=num_prompt_tokens,
            max_tokens=num_output_tokens,
            prefix_hashes=prefix,
            hash_block_tokens=block,
        )

    async def _wait(self, seconds: float, sent: list[Sent]) -> None:
        if not self._tasks:
            await asyncio.sleep(seconds)
            return
        done, _ = await asyncio.wait(self._tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        self._tasks -= done
        sent += [task.result() for task in done if not task.cancelled()]


def _log_uniform(stream: Stream, low: int, high: int) -> int:
    """A whole number from `low` to `high`, small ones as likely as large in their logarithm."""
    return min(high, int(low * ((high + 1) / low) ** stream.random()))
