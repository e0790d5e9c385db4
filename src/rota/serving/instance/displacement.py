"""Which running sequences make way: for waiting ones that outrank them, and for each other. Pure: the same functions
serve every host."""

from collections.abc import Callable, Sequence

from rota.base.errors import PolicyError
from rota.serving.api import EngineView, MemoryPolicy, MemoryView, OrderPolicy, Pool, SequenceView


def choose_displaced(
    view: MemoryView,
    order: OrderPolicy,
    memory: MemoryPolicy,
    *,
    token_budget: int,
    num_blocks_to_take: Callable[[SequenceView, Sequence[SequenceView]], int],
    num_slots_aside: int = 0,
) -> list[SequenceView]:
    """The running sequences to preempt before this step, in that order; empty where none needs to go.

    Walks the waiting sequences in order, for as long as they outrank somebody. One that can start with what is left
    is passed over. For one that cannot (no slot, no blocks, or running ones would take the whole `token_budget`), the
    memory policy names victims among those it may displace until it can; if all of them together would not do, nobody
    goes and the walk ends.

    `num_blocks_to_take(w, leaving)` says how many blocks admitting `w` with all its known tokens takes once those
    leaving have gone: what `w` shares with them alone is given back and taken again. The blocks that running sequences
    grow into in this step are set aside first. `num_slots_aside` slots are taken by nobody who runs. Cost: O(waiting
    that outrank × running).
    """
    limits = view.limits
    chunk_max = min(limits.long_prefill_token_threshold or token_budget, token_budget)
    running = list(view.running)
    cursor = order.open(view, Pool.WAITING)
    waiting = cursor.next() if len(view.waiting) else None
    line = _line(view, order, running)
    # Whoever stands first outranks most, and whoever runs last is outranked by most; in most steps not even these two
    # do, and nothing needs to be counted.
    if waiting is None or not line or not order.displaces(view, waiting, line[-1]):
        return []
    num_slots = limits.max_num_seqs - len(running) - num_slots_aside
    num_tokens, num_blocks = _left_by_running(view, running, token_budget, chunk_max)
    num_taken = 0
    victims: list[SequenceView] = []
    starters: list[SequenceView] = []
    while waiting is not None and line and order.displaces(view, waiting, line[-1]):
        # Most that outrank somebody start with what is left, and nobody needs to know how many they outrank.
        candidates: list[SequenceView] | None = None
        starters.append(waiting)
        leaving = list(victims)
        num_freed = view.num_blocks_freed(leaving)
        num_taken += num_blocks_to_take(waiting, leaving)
        while num_slots < 1 or num_tokens < 1 or num_blocks + num_freed < num_taken + limits.watermark_blocks:
            if candidates is None:
                candidates = _outranked(view, order, waiting, line)
            victim = memory.victim(view, candidates, waiting) if candidates else None
            if victim is None:
                return victims
            candidates.remove(victim)
            line.remove(victim)
            leaving.append(victim)
            num_slots += 1
            num_tokens += min(victim.num_pending_tokens, chunk_max)
            num_blocks += _growth(victim, chunk_max, limits.block_size)
            num_freed = view.num_blocks_freed(leaving)
            num_taken = sum(num_blocks_to_take(sequence, leaving) for sequence in starters)
        victims = leaving
        num_slots -= 1
        # All that it would take: tokens that somebody gives up go to it first, not to those behind it.
        num_tokens -= min(waiting.num_pending_tokens, chunk_max)
        waiting = cursor.next()
    return victims


def choose_short(
    view: MemoryView, order: OrderPolicy, memory: MemoryPolicy, *, token_budget: int, decodes_first: bool
) -> list[tuple[SequenceView, SequenceView]]:
    """The running sequences to preempt before this step, each with the one that it makes way for, so that all others
    get the blocks that the pass over them takes; empty where blocks suffice.

    Walks the line as the pass will (`decodes_first` or not), and asks the memory policy whenever somebody is short,
    until nobody is or it names nobody. Cost: O(running) where blocks suffice, O(victims × running) where not.
    """
    limits = view.limits
    running = list(view.running)
    num_eligible = len(running) + len(view.waiting)
    chunk_max = limits.long_prefill_token_threshold if num_eligible > 1 else 0
    chunk_max = min(chunk_max or token_budget, token_budget)
    if _left_by_running(view, running, token_budget, chunk_max)[1] >= 0:
        return []
    line = _line(view, order, running)
    if decodes_first:
        line = [one for one in line if one.num_pending_tokens <= 1] + [
            one for one in line if one.num_pending_tokens > 1
        ]
    victims: list[tuple[SequenceView, SequenceView]] = []
    num_blocks = view.num_free_blocks
    while (needy := _first_short(line, num_blocks, token_budget, chunk_max, limits.block_size)) is not None:
        victim = memory.victim(view, list(line), needy)
        if victim is None:
            break
        if victim not in line:
            raise PolicyError(f"the memory policy chose {victim!r}, which is not among its candidates")
        line.remove(victim)
        victims.append((victim, needy))
        num_blocks = view.num_free_blocks + view.num_blocks_freed([gone for gone, _ in victims])
    return victims


def _first_short(
    line: list[SequenceView], num_blocks: int, num_tokens: int, chunk_max: int, block_size: int
) -> SequenceView | None:
    """The first of the line for which that many blocks and tokens leave too few blocks."""
    for sequence in line:
        if num_tokens < 1:
            return None
        given = min(sequence.num_pending_tokens, chunk_max, num_tokens)
        num_tokens -= given
        num_blocks -= _growth(sequence, given, block_size)
        if num_blocks < 0:
            return sequence
    return None


def _left_by_running(
    view: EngineView, running: list[SequenceView], token_budget: int, chunk_max: int
) -> tuple[int, int]:
    """The tokens and blocks of this step that those who run leave over."""
    num_tokens, num_blocks, block_size = token_budget, view.num_free_blocks, view.limits.block_size
    for sequence in running:
        computed = sequence.num_computed_tokens
        pending = sequence.num_tokens - computed
        if pending == 1:  # most decode
            num_tokens -= 1
            num_blocks -= computed % block_size == 0
        else:
            num_tokens -= min(pending, chunk_max)
            num_blocks -= _growth(sequence, chunk_max, block_size)
    return num_tokens, num_blocks


def _outranked(
    view: EngineView, order: OrderPolicy, waiting: SequenceView, line: list[SequenceView]
) -> list[SequenceView]:
    """Those of the line whom `waiting` may displace: its end, from some place on."""
    start = len(line)
    while start and order.displaces(view, waiting, line[start - 1]):
        start -= 1
    return line[start:]


def _line(view: EngineView, order: OrderPolicy, running: list[SequenceView]) -> list[SequenceView]:
    """The running sequences as the order ranks them, so that the memory policy finds the lowest at the end."""
    if order.running_order == "admission":
        return list(running)
    return list(iter(order.open(view, Pool.RUNNING).next, None))


def _growth(sequence: SequenceView, num_tokens: int, block_size: int) -> int:
    """Blocks that a running sequence takes to compute its pending tokens, as far as a budget of `num_tokens` goes."""
    computed = sequence.num_computed_tokens
    end = computed + min(sequence.num_pending_tokens, num_tokens)
    return -(-end // block_size) - -(-computed // block_size)
