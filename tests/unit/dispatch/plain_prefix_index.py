"""What the prefix index must agree with: it keeps every block by itself, which is plain to see and slow."""

from collections import OrderedDict
from collections.abc import Hashable

from rota.serving.cluster.prefix_index import PrefixIndex
from rota.serving.cluster.prefix_runs import leading
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import Request


def match(index: PrefixIndex, request: Request) -> dict[InstanceId, int]:
    """How many of a request's hashes, from the first on, each instance is thought to hold that holds any."""
    return {runs.instance_id: num_held for runs, num_held in leading(index._by_first, request.block_hashes).items()}


class PlainPrefixIndex:
    """Every block of every instance in an ordered dictionary, oldest first."""

    def __init__(self, *, max_entries: int = 1_000_000) -> None:
        self._max_entries = max_entries
        self._num_entries = 0
        # Blocks in order of last use, oldest first, with the tokens that each stands for.
        self.blocks_of: dict[InstanceId, OrderedDict[Hashable, int]] = {}
        self._num_tokens_of: dict[InstanceId, int] = {}
        self._max_tokens_of: dict[InstanceId, int] = {}
        self._block_size_of: dict[InstanceId, int] = {}

    def __len__(self) -> int:
        return self._num_entries

    def add_instance(self, instance_id: InstanceId, num_blocks: int, block_size: int = 16) -> None:
        """Start to remember for an instance that holds `num_blocks` blocks of `block_size` tokens; what was remembered
        of it is dropped."""
        self.forget_instance(instance_id)
        self.blocks_of[instance_id] = OrderedDict()
        self._num_tokens_of[instance_id] = 0
        self._max_tokens_of[instance_id] = num_blocks * block_size
        self._block_size_of[instance_id] = block_size

    def forget_instance(self, instance_id: InstanceId) -> None:
        """Drop all that is remembered of an instance, known or not: its cache is gone."""
        self._num_entries -= len(self.blocks_of.pop(instance_id, ()))
        for facts in (self._num_tokens_of, self._max_tokens_of, self._block_size_of):
            facts.pop(instance_id, None)

    def match(self, request: Request) -> dict[InstanceId, int]:
        """How many of the request's hashes, from the first on, each instance holds; instances with none left out."""
        match = {}
        for instance_id, blocks in self.blocks_of.items():
            num_held = 0
            while num_held < len(request.block_hashes) and request.block_hashes[num_held] in blocks:
                num_held += 1
            if num_held:
                match[instance_id] = num_held
        return match

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
        blocks = self.blocks_of[instance_id]
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

    def _shrink(self) -> None:
        largest = min(self.blocks_of, key=lambda instance_id: (-len(self.blocks_of[instance_id]), instance_id))
        blocks = self.blocks_of[largest]
        num_dropped = min(self._num_entries - self._max_entries, len(blocks))
        for _ in range(num_dropped):
            self._drop_oldest(largest)
        self._num_entries -= num_dropped

    def _drop_oldest(self, instance_id: InstanceId) -> None:
        _, num_tokens = self.blocks_of[instance_id].popitem(last=False)
        self._num_tokens_of[instance_id] -= num_tokens
