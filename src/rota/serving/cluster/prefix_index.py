"""Which leading blocks were sent to which instance: a guess at what each instance's prefix cache holds.

A guess, because the router sees dispatches and not evictions. It keeps one least-recently-used list of blocks an
instance, no longer than the instance's own cache, and evicts as such a cache does: the end of a prefix before its
beginning. So the blocks of a request that are known at an instance are always a leading run, and a binary search finds
where it ends.
"""

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from types import MappingProxyType

from rota.base.errors import LawBroken
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import Request

NO_MATCH: Mapping[InstanceId, int] = MappingProxyType({})


class PrefixIndex:
    """A bounded memory of dispatched blocks.

    `max_entries` bounds the (block, instance) pairs in all; beyond it, the instance that holds the most gives up its
    oldest, the first by id among equals. An entry takes some 100 bytes.
    """

    def __init__(self, *, max_entries: int = 1_000_000) -> None:
        self._max_entries = max_entries
        self._num_entries = 0
        # Blocks in order of last use, oldest first, with the tokens that each stands for.
        self._blocks_of: dict[InstanceId, OrderedDict[Hashable, int]] = {}
        self._num_tokens_of: dict[InstanceId, int] = {}
        self._max_tokens_of: dict[InstanceId, int] = {}
        self._block_size_of: dict[InstanceId, int] = {}
        # The answer for the request asked about last: a policy asks once for each instance.
        self._matched: Request | None = None
        self._match: Mapping[InstanceId, int] = NO_MATCH

    def __len__(self) -> int:
        return self._num_entries

    def add_instance(self, instance_id: InstanceId, num_blocks: int, block_size: int = 16) -> None:
        """Start to remember for an instance that holds `num_blocks` blocks of `block_size` tokens; what was remembered
        of it is dropped."""
        self.forget_instance(instance_id)
        self._blocks_of[instance_id] = OrderedDict()
        self._num_tokens_of[instance_id] = 0
        self._max_tokens_of[instance_id] = num_blocks * block_size
        self._block_size_of[instance_id] = block_size

    def forget_instance(self, instance_id: InstanceId) -> None:
        """Drop all that is remembered of an instance, known or not: its cache is gone."""
        self._num_entries -= len(self._blocks_of.pop(instance_id, ()))
        for facts in (self._num_tokens_of, self._max_tokens_of, self._block_size_of):
            facts.pop(instance_id, None)
        self._matched = None

    def match(self, request: Request) -> Mapping[InstanceId, int]:
        """How many of the request's hashes, from the first on, each instance is thought to hold; instances with none
        are left out.

        Computed once for a request, O(instances × log blocks), and kept until something is recorded or forgotten.
        """
        if request is self._matched:
            return self._match
        hashes = request.block_hashes
        match: dict[InstanceId, int] = {}
        if hashes:
            for instance_id, blocks in self._blocks_of.items():
                if hashes[0] in blocks:
                    match[instance_id] = _leading_run(hashes, blocks)
        self._matched, self._match = request, MappingProxyType(match)
        return self._match

    def num_tokens(self, request: Request, instance_id: InstanceId) -> int:
        """Leading tokens of the prompt that an instance is thought to hold."""
        num_hashes = self.match(request).get(instance_id, 0)
        if not num_hashes:
            return 0
        per_hash = request.hash_block_tokens or self._block_size_of[instance_id]
        return min(num_hashes * per_hash, request.num_prompt_tokens)

    def num_tokens_anywhere(self, request: Request) -> int:
        """Leading tokens of the prompt that some instance is thought to hold: of all instances, the most."""
        return max((self.num_tokens(request, instance_id) for instance_id in self.match(request)), default=0)

    def record(self, request: Request, instance_id: InstanceId) -> None:
        """The request was sent to an instance that was added before. O(blocks of the request)."""
        hashes = request.block_hashes
        if not hashes:
            return
        blocks = self._blocks_of[instance_id]
        num_before = len(blocks)
        per_hash = request.hash_block_tokens or self._block_size_of[instance_id]
        most = self._max_tokens_of[instance_id]
        # Last block first, so that the beginning of a prefix is always younger than its end and outlives it.
        for block in reversed(hashes[: most // per_hash]):
            blocks[block] = per_hash
            blocks.move_to_end(block)
        self._num_tokens_of[instance_id] += per_hash * (len(blocks) - num_before)
        while self._num_tokens_of[instance_id] > most:
            self._drop_oldest(instance_id)
        self._num_entries += len(blocks) - num_before
        while self._num_entries > self._max_entries:
            self._shrink()
        self._matched = None

    def check(self) -> None:
        """Law 12: the memory is bounded, and its size is known."""
        recount = sum(map(len, self._blocks_of.values()))
        if recount != self._num_entries or recount > self._max_entries:
            raise LawBroken(
                f"law 12: the prefix index holds {recount} entries, counts {self._num_entries}, "
                f"and may hold {self._max_entries}"
            )

    def _shrink(self) -> None:
        largest = min(self._blocks_of, key=lambda instance_id: (-len(self._blocks_of[instance_id]), instance_id))
        blocks = self._blocks_of[largest]
        num_dropped = min(self._num_entries - self._max_entries, len(blocks))
        for _ in range(num_dropped):
            self._drop_oldest(largest)
        self._num_entries -= num_dropped

    def _drop_oldest(self, instance_id: InstanceId) -> None:
        _, num_tokens = self._blocks_of[instance_id].popitem(last=False)
        self._num_tokens_of[instance_id] -= num_tokens


def _leading_run(hashes: tuple[Hashable, ...], blocks: Mapping[Hashable, int]) -> int:
    """How many of `hashes` are in `blocks`, knowing that they are the first ones and that the very first is."""
    if hashes[-1] in blocks:
        return len(hashes)
    present, absent = 0, len(hashes) - 1
    while absent - present > 1:
        middle = (present + absent) // 2
        if hashes[middle] in blocks:
            present = middle
        else:
            absent = middle
    return absent
