"""The heads of queues that do not fit, and what would have to leave for them."""

from collections.abc import Sequence
from dataclasses import dataclass

from rota.serving.api import InstanceView, SequenceReport
from rota.serving.policies.freeness import blocks_for
from rota.serving.policies.migration.rounds import Round


@dataclass(frozen=True, slots=True)
class BlockedHead:
    """One who heads a queue and cannot start."""

    request: SequenceReport
    source: InstanceView
    num_blocks_lacking: int
    """At most 0 if only a slot lacks."""


def blocked_heads(planned: Round) -> list[BlockedHead]:
    """Those whom a move could help: the highest class first, then those who lack least.

    Left out are instances that drain, and those with moves under way, which may make the room."""
    found = []
    for instance_id, load in planned.loads.items():
        view = planned.views[instance_id]
        # The load counts the head's demand and slot: where it leaves room, nobody is blocked, and nobody is looked at.
        if load.num_tokens <= load.num_tokens_max and load.num_requests <= view.max_num_seqs:
            continue
        if not view.num_waiting or load.is_draining or view.num_migrations or planned.num_left(instance_id) <= 0:
            continue
        running, waiting = view.running, view.waiting
        if not waiting or not running:
            continue
        num_blocks_lacking = blocks_for(waiting[0].num_tokens, view.block_size) - planned.num_free_blocks(view)
        if num_blocks_lacking > 0 or len(running) >= view.max_num_seqs:
            found.append(BlockedHead(waiting[0], view, num_blocks_lacking))
    return sorted(found, key=lambda head: (head.request.priority, head.num_blocks_lacking, head.source.id))


def fewest_tokens(head: BlockedHead, candidates: Sequence[SequenceReport], max_moves: int) -> list[SequenceReport]:
    """Few of `candidates`, sorted by length, whose leaving makes the head fit: the shortest ones and one more, such
    that the fewest tokens move. Exact if one will do; with more it may miss the best. Empty if `max_moves` will not
    do."""
    best: list[SequenceReport] = []
    fewest, num_freed, num_moved = None, 0, 0
    for num_shortest in range(min(max_moves, len(candidates))):
        for last in candidates[num_shortest:]:
            if fewest is not None and num_moved + last.num_tokens >= fewest:
                break
            if num_freed + last.num_blocks >= head.num_blocks_lacking:
                best = [*candidates[:num_shortest], last]
                fewest = num_moved + last.num_tokens
                break
        num_freed += candidates[num_shortest].num_blocks
        num_moved += candidates[num_shortest].num_tokens
    return best
