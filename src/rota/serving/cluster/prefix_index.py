"""Which leading blocks were sent to which instance: a guess at what each instance's prefix cache holds.

A guess, because the router sees dispatches and not evictions. It keeps the blocks of an instance in order of last use,
no more than the instance's own cache holds, and evicts as such a cache does: the end of a prefix before its beginning.
So the blocks of a request that are known at an instance are always a leading run. They are not kept one by one, but as
slices of prompts (`rota.serving.cluster.prefix_runs`), so that a prompt of 2,000 blocks costs little more than a short
one.
"""

from rota.base.errors import LawBroken
from rota.serving.cluster.prefix_runs import PrefixRuns, RunsByFirst, leading
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import Request


class PrefixIndex:
    """A bounded memory of dispatched blocks.

    `max_entries` bounds the (block, instance) pairs in all; beyond it, the instance that holds the most gives up its
    oldest, the first by id among equals. No more than two hashes are kept for an entry. Unrelated prompts of a single
    block, which are the worst, take some 410 bytes an entry, those of five blocks 120, long ones 45.
    """

    def __init__(self, *, max_entries: int = 1_000_000) -> None:
        self._max_entries = max_entries
        self._num_entries = 0
        self._by_first: RunsByFirst = {}
        self._runs_of: dict[InstanceId, PrefixRuns] = {}
        # The answer for the request asked about last: a policy asks once for each instance.
        self._matched: Request | None = None
        self._num_tokens: dict[InstanceId, int] = {}

    def __len__(self) -> int:
        return self._num_entries

    def add_instance(self, instance_id: InstanceId, num_blocks: int, block_size: int = 16) -> None:
        """Start to remember for an instance that holds `num_blocks` blocks of `block_size` tokens; what was remembered
        of it is dropped."""
        self.forget_instance(instance_id)
        self._runs_of[instance_id] = PrefixRuns(instance_id, num_blocks * block_size, block_size, self._by_first)

    def forget_instance(self, instance_id: InstanceId) -> None:
        """Drop all that is remembered of an instance, known or not: its cache is gone."""
        runs = self._runs_of.pop(instance_id, None)
        if runs is not None:
            self._num_entries -= runs.num_blocks
            runs.evict(runs.num_blocks)
        self._matched = None

    def num_tokens(self, request: Request, instance_id: InstanceId) -> int:
        """Leading tokens of the prompt that an instance is thought to hold. Looked up once for all instances,
        O(instances × log blocks) where prompts part at few places, and kept until another request is asked about, or
        something is recorded or forgotten."""
        if request is not self._matched:
            self._find(request)
        return self._num_tokens.get(instance_id, 0)

    def num_tokens_anywhere(self, request: Request) -> int:
        """Leading tokens of the prompt that some instance is thought to hold: of all instances, the most."""
        if request is not self._matched:
            self._find(request)
        return max(self._num_tokens.values(), default=0)

    def record(self, request: Request, instance_id: InstanceId) -> None:
        """The request was sent to an instance that was added before. O(log blocks) where prompts part at few places;
        what is evicted is paid for by those who were recorded."""
        hashes = request.block_hashes
        if not hashes:
            return
        runs = self._runs_of[instance_id]
        num_before = runs.num_blocks
        runs.record(hashes, request.hash_block_tokens or runs.block_size)
        self._num_entries += runs.num_blocks - num_before
        while self._num_entries > self._max_entries:
            self._shrink()
        self._matched = None

    def check(self) -> None:
        """Law 12: the memory is bounded, and its size is known."""
        num_entries = 0
        for instance_id, runs in self._runs_of.items():
            num_blocks, num_tokens, num_kept = runs.recount()
            num_entries += num_blocks
            if (num_blocks, num_tokens) != (runs.num_blocks, runs.num_tokens) or num_tokens > runs.max_tokens:
                raise LawBroken(
                    f"law 12: the prefix index holds {num_blocks} blocks of {num_tokens} tokens of {instance_id}, "
                    f"counts {runs.num_blocks} of {runs.num_tokens}, and may hold {runs.max_tokens} tokens"
                )
            if num_kept > 2 * num_blocks:
                raise LawBroken(f"law 12: the prefix index keeps {num_kept} hashes for {num_blocks} blocks")
        if num_entries != self._num_entries or num_entries > self._max_entries:
            raise LawBroken(
                f"law 12: the prefix index holds {num_entries} entries, counts {self._num_entries}, "
                f"and may hold {self._max_entries}"
            )

    def _find(self, request: Request) -> None:
        per_hash, most = request.hash_block_tokens, request.num_prompt_tokens
        num_tokens = {}
        for runs, num_held in leading(self._by_first, request.block_hashes).items():
            found = num_held * (per_hash or runs.block_size)
            num_tokens[runs.instance_id] = found if found < most else most
        self._matched, self._num_tokens = request, num_tokens

    def _shrink(self) -> None:
        most = max([runs.num_blocks for runs in self._runs_of.values()])
        largest = min([instance_id for instance_id, runs in self._runs_of.items() if runs.num_blocks == most])
        runs = self._runs_of[largest]
        num_before = runs.num_blocks
        runs.evict(self._num_entries - self._max_entries)
        self._num_entries -= num_before - runs.num_blocks
