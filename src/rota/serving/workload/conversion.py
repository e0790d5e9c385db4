"""From one format to another: what the other can hold goes over as it is, the rest is refused or, if so asked, lost.

What is lost is counted by kind. What changes its shape and not its meaning is not a loss: a prompt without prefix ids
gets ids that nobody shares where a format wants one for every block.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from rota.base.instant import NANOSECONDS_PER_MILLISECOND, Duration
from rota.serving.workload.arrivals import Arrival, Fact, facts_of
from rota.serving.workload.formats.mooncake import HASH_BLOCK_TOKENS
from rota.serving.workload.formats.prefixes import Numbers
from rota.serving.workload.sorting import in_order

_DROPPED: dict[Fact, dict[str, Any]] = {
    "prefixes": {"prefix_hashes": (), "hash_block_tokens": HASH_BLOCK_TOKENS},
    "sessions": {"session": None},
    "tenants": {"tenant": "default"},
    "priorities": {"priority": 0},
    "programs": {"program": None},
    "waits": {"after": (), "gap": Duration(0), "id": None},
}
_FIRST_OWN_ID = 2**52
"""Ids from here on are given out here; those of a trace are below, or get others."""
COUNTS_FROM_FIRST = ("azure", "burstgpt")
"""Formats whose readers take the first row as the start of the trace."""


class Conversion:
    """Makes arrivals fit for a format, and counts what that loses."""

    def __init__(self, format_name: str, holds: frozenset[Fact], *, is_lossy: bool) -> None:
        self.losses: Counter[str] = Counter()
        """Rows that lost something, by what."""
        self._name = format_name
        self._holds = holds
        self._is_lossy = is_lossy

    def fitted(self, arrivals: Iterable[Arrival]) -> Iterator[Arrival]:
        """The arrivals as the format can hold them. Unless losses are allowed, what it cannot hold is left to its
        writer to refuse."""
        rows: Iterator[Arrival] = iter(arrivals)
        if self._is_lossy:
            rows = (self._without_more(arrival) for arrival in rows)
            if "waits" not in self._holds:
                rows = in_order(rows)  # rows that waited come at instants of their own now
            if self._name in COUNTS_FROM_FIRST:
                rows = self._from_first(rows)
        return self._as_mooncake(rows) if self._name == "mooncake" else rows

    def _without_more(self, arrival: Arrival) -> Arrival:
        changes: dict[str, Any] = {}
        for fact in facts_of(arrival) - self._holds:
            self.losses["waits, for which a row now comes at its earliest instant" if fact == "waits" else fact] += 1
            changes |= _DROPPED[fact]
        if "waits" not in self._holds:
            changes["id"] = None
        if not arrival.prefix_hashes:
            changes["hash_block_tokens"] = HASH_BLOCK_TOKENS  # of blocks that there are none of
        return msgspec.structs.replace(arrival, **changes) if changes else arrival

    def _from_first(self, rows: Iterator[Arrival]) -> Iterator[Arrival]:
        start: int | None = None
        for arrival in rows:
            if start is None:
                start = arrival.at
                self.losses["the time before the first row"] += start > 0
            yield msgspec.structs.replace(arrival, at=Duration(arrival.at - start)) if start else arrival

    def _as_mooncake(self, rows: Iterator[Arrival]) -> Iterator[Arrival]:
        regroup = _Regrouped()
        for arrival in rows:
            changes: dict[str, Any] = {}
            if self._is_lossy and arrival.at % NANOSECONDS_PER_MILLISECOND:
                self.losses["time below a millisecond"] += 1
                changes["at"] = Duration(arrival.at // NANOSECONDS_PER_MILLISECOND * NANOSECONDS_PER_MILLISECOND)
            num_blocks = -(-arrival.num_prompt_tokens // HASH_BLOCK_TOKENS)
            is_fit = arrival.hash_block_tokens == HASH_BLOCK_TOKENS and len(arrival.prefix_hashes) == num_blocks
            if not is_fit or max(arrival.prefix_hashes) >= _FIRST_OWN_ID:
                if arrival.prefix_hashes and not self._is_lossy:
                    yield arrival  # its writer says why not
                    continue
                hashes, is_whole = regroup.blocks(arrival, num_blocks)
                self.losses["prefixes within blocks of 512 tokens"] += not is_whole
                changes |= {"prefix_hashes": hashes, "hash_block_tokens": HASH_BLOCK_TOKENS}
            yield msgspec.structs.replace(arrival, **changes) if changes else arrival


class _Regrouped:
    """Prefixes in blocks of another size, as blocks of 512 tokens: two prompts share one where they share all of it."""

    def __init__(self) -> None:
        self._numbers = Numbers(_FIRST_OWN_ID)
        self._known: dict[tuple[int, int], int] = {}

    def blocks(self, arrival: Arrival, num_blocks: int) -> tuple[tuple[int, ...], bool]:
        """Ids of all blocks of the prompt, and whether they say as much as its own ids do."""
        size = arrival.hash_block_tokens
        ids = []
        for index in range(num_blocks):
            # An id stands for everything before it too, so that the last block inside tells the whole.
            ends = (index + 1) * HASH_BLOCK_TOKENS
            last = ends // size - 1
            if ends % size or last >= len(arrival.prefix_hashes):
                break
            key = (size, arrival.prefix_hashes[last])
            if key not in self._known:
                self._known[key] = self._numbers.take(1)[0]
            ids.append(self._known[key])
        is_whole = len(ids) * HASH_BLOCK_TOKENS == len(arrival.prefix_hashes) * size
        return tuple(ids) + self._numbers.take(num_blocks - len(ids)), is_whole
