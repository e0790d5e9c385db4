"""Virtual usage and freeness: how many more steps an instance's batch can grow. Dispatch and migration share it.

Llumnix (OSDI 2024) reads load, queueing, classes and draining off one number. Each request has a virtual usage, in
tokens:

* one that runs: the KV that it holds; of the high class, a share of the headroom on top, `headroom / num_high`, so that
  an instance with anybody of the high class seems fuller by the headroom in all;
* the head of the queue: all that it demands, though it holds nothing yet; others who wait: nothing;
* one that was dispatched and that the last report cannot know: all of its prompt, as far as the router can tell;
* on an instance that drains: infinite.

Freeness is (capacity - virtual usage) / requests, in decode steps, since each request grows by a token a step. There is
one sign for it: more freeness is better, and what is below zero is owed. The published code counts it in blocks, and
in places with the opposite sign.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from rota.base.errors import ConfigError
from rota.base.instant import Instant
from rota.serving.api import InstanceId, InstanceView, SequenceReport

HIGH_LOAD_TARGET = 1600 / 13_616
"""Share of an instance that may be loaded beside the high class: 1,600 of 13,616 tokens, LLaMA-7B on an A10. The paper
states it for that one setting, and the public code has no headroom at all."""


@dataclass(frozen=True, slots=True)
class Load:
    """An instance's virtual usage, in tokens, and what follows from it."""

    num_tokens_max: int
    """Its capacity."""
    num_tokens: int
    """Virtual usage, without headroom."""
    num_requests: int
    """Those whose usage counts."""
    num_high: int = 0
    """Of the high class, running."""
    headroom: int = 0
    """Tokens kept free wherever the high class runs."""
    is_draining: bool = False
    freeness: float = field(init=False, repr=False, compare=False)
    """Steps that the batch can grow; -inf where the instance drains. Kept, since a round asks it of each instance."""

    def __post_init__(self) -> None:
        kept = self.headroom if self.num_high else 0
        steps = (self.num_tokens_max - self.num_tokens - kept) / (self.num_requests or 1)
        object.__setattr__(self, "freeness", -math.inf if self.is_draining else steps)

    @property
    def num_free_tokens(self) -> int:
        """Capacity that nobody uses or waits for, headroom included; below zero if more is wanted than there is."""
        return self.num_tokens_max - self.num_tokens

    def with_request(self, num_tokens: int, *, is_high: bool) -> "Load":
        """The load with one more request of that usage."""
        return self._changed(num_tokens, 1, is_high)

    def without_request(self, num_tokens: int, *, is_high: bool) -> "Load":
        """The load with one request of that usage less."""
        return self._changed(-num_tokens, -1, -is_high)

    def _changed(self, num_tokens: int, num_requests: int, num_high: int) -> "Load":
        return Load(
            self.num_tokens_max,
            self.num_tokens + num_tokens,
            self.num_requests + num_requests,
            self.num_high + num_high,
            self.headroom,
            self.is_draining,
        )


@dataclass(slots=True)
class _Told:
    """What the sequences of an instance come to."""

    running: Sequence[SequenceReport]
    waiting: Sequence[SequenceReport]
    block_size: int
    num_blocks: int = 0
    """That those who run hold."""
    num_held: int = 0
    """Tokens of capacity that those who run use."""
    num_high: int = 0
    num_in_prefill: int = 0
    """Tokens of those who run and whose prompt is being computed."""
    num_waiting: int = 0
    """Tokens that those who wait demand."""
    num_head: int = 0
    """Tokens of capacity that the first of them demands."""


_Known = tuple[Instant | None, int, Sequence[SequenceReport], Sequence[SequenceReport], int, bool]
_Read = tuple[_Known, Load, _Told | None]


class Freeness:
    """Reads loads off views. Looking at every sequence for every decision costs more than a decision may, so it
    remembers what they come to until others run or wait, and each load until anything it was read from changes."""

    def __init__(self, *, high_priority_max: int, high_load_target: float, whole_queue: bool = False) -> None:
        """Requests of `priority` up to `high_priority_max` are the high class. Beside them, `high_load_target` of the
        capacity may be loaded, in [0, 1]; the rest is headroom. `whole_queue` counts all who wait, not just the
        head."""
        if not 0.0 <= high_load_target <= 1.0:
            raise ConfigError(f"high_load_target must be a share in [0, 1], not {high_load_target}")
        self._high_priority_max = high_priority_max
        self._headroom_share = 1.0 - high_load_target
        self._whole_queue = whole_queue
        self._known: dict[InstanceId, _Read] = {}

    def is_high(self, sequence: SequenceReport) -> bool:
        """Whether a request is of the high class."""
        return sequence.priority <= self._high_priority_max

    def of(self, view: InstanceView) -> float:
        """The freeness of an instance, in steps."""
        read = self._known.get(view.id)
        if read is None or read[0][0] != view.observed_at or read[0][1] != view.num_outstanding_tokens:
            read = self._read(view, _known(view))
        return read[1].freeness

    def load(self, view: InstanceView) -> Load:
        """The load of an instance."""
        known = _known(view)
        read = self._known.get(view.id)
        if read is None or read[0] != known:
            read = self._read(view, known)
        return read[1]

    def num_blocks_held(self, view: InstanceView) -> int:
        """Blocks that those hold who run at an instance whose load was read in this round."""
        told = self._known[view.id][2]
        return 0 if told is None else told.num_blocks

    def forget_others(self, instances: Sequence[InstanceView]) -> None:
        """Forget the instances that are not shown any more, once they are many."""
        if len(self._known) > 2 * len(instances):
            self._known = {view.id: self._known[view.id] for view in instances if view.id in self._known}

    def _read(self, view: InstanceView, known: _Known) -> _Read:
        before = self._known.get(view.id)
        told = None if before is None else before[2]
        running, waiting = known[2], known[3]
        if not running and not waiting:
            told = None
        elif (
            told is None
            or told.running is not running
            or told.waiting is not waiting
            or told.block_size != view.block_size
        ):
            told = self._count(running, waiting, view.block_size)
        load = self._measure(view, told)
        read = self._known[view.id] = (known, load, told)
        return read

    def _count(self, running: Sequence[SequenceReport], waiting: Sequence[SequenceReport], block_size: int) -> _Told:
        """Look at each sequence."""
        told = _Told(running, waiting, block_size)
        num_tokens = 0
        high_priority_max = self._high_priority_max
        for sequence in running:
            num_held, num_computed = sequence.num_blocks * block_size, sequence.num_tokens - 1
            if num_held < num_computed:
                num_held = blocks_for(num_computed, block_size) * block_size
                told.num_in_prefill += num_computed
            num_tokens += num_held
            if sequence.priority <= high_priority_max:
                told.num_high += 1
        told.num_held = num_tokens
        told.num_blocks = sum([sequence.num_blocks for sequence in running])
        if waiting:
            told.num_waiting = sum([sequence.num_tokens for sequence in waiting])
            told.num_head = blocks_for(waiting[0].num_tokens, block_size) * block_size
        return told

    def _measure(self, view: InstanceView, told: _Told | None) -> Load:
        num_tokens_max = view.num_blocks * view.block_size
        headroom = int(num_tokens_max * self._headroom_share)
        if told is None:
            return Load(num_tokens_max, *_untold(view), headroom=headroom, is_draining=view.is_draining)
        num_tokens, num_requests, num_waiting = told.num_held, len(told.running), len(told.waiting)
        num_untold = max(0, view.num_waiting - num_waiting)
        num_demanded = told.num_waiting + (num_untold * told.num_waiting // num_waiting if num_waiting else 0)
        num_unknown = view.num_outstanding_requests - num_requests - num_waiting - num_untold
        if num_unknown > 0:
            num_unseen = view.num_outstanding_tokens - num_requests - told.num_in_prefill - num_demanded
            num_tokens += max(num_unknown, num_unseen)
            num_requests += num_unknown
        if self._whole_queue:
            num_tokens += num_demanded
            num_requests += num_waiting + num_untold
        elif num_waiting:
            num_tokens += told.num_head
            num_requests += 1
        return Load(num_tokens_max, num_tokens, num_requests, told.num_high, headroom, view.is_draining)


def _known(view: InstanceView) -> _Known:
    """What a load is read from and may change: equal if nothing did."""
    return (
        view.observed_at,
        view.num_outstanding_tokens,
        view.running,
        view.waiting,
        view.num_outstanding_requests,
        view.is_draining,
    )


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that so many tokens need."""
    return -(-num_tokens // block_size)


def room_of(sequence: SequenceReport, block_size: int) -> int:
    """Tokens of capacity that a running request uses: the blocks that it holds, or during its prefill those that it
    will. An engine that computes a prompt at once gives it all of them on admission; one that chunks gives them bit by
    bit, and looks free meanwhile."""
    return max(sequence.num_blocks, blocks_for(sequence.num_tokens - 1, block_size)) * block_size


def _untold(view: InstanceView) -> tuple[int, int]:
    """Usage and requests of an instance that does not tell of its sequences: its blocks that are not free, by the last
    report, and the prompts that are outstanding there, which may overlap with those blocks. No class is seen."""
    num_requests = view.num_outstanding_requests
    if not num_requests:
        return 0, 0
    num_free = view.num_free_blocks
    num_held = 0 if num_free is None or not view.num_running else (view.num_blocks - num_free) * view.block_size
    return num_held + view.num_outstanding_tokens, num_requests
