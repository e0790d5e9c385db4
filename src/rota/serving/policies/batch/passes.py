"""The one pass that every batch shape runs: vLLM's own pass, with its knobs."""

from rota.serving.api import (
    BatchDraft,
    BatchShape,
    Cursor,
    OnRefusal,
    OrderPolicy,
    Pool,
    Refusal,
    SequenceView,
    admit_waiting,
)


def fill(draft: BatchDraft, order: OrderPolicy, shape: BatchShape) -> None:
    """Compose a step as `shape` says.

    vLLM 0.32's rule (`Scheduler.schedule`): running sequences first, each as far as the budget goes; whoever lacks
    blocks takes them from the end of the line; then waiting ones, but only in a step that had to preempt nobody."""
    if shape.token_budget is not None:
        draft.limit_tokens(shape.token_budget)
    if order.displacing:
        draft.displace(order)
    if not shape.admit_before_running:
        draft.make_room(order, decodes_first=shape.decodes_first)
    cursor = order.open(draft.view, Pool.RUNNING)
    if not shape.decodes_first and not shape.admit_before_running and order.running_order == "admission":
        _grant_running(draft, cursor)
        admit_waiting(draft, order)
        return
    line = _drain(cursor)
    prefills = [sequence for sequence in line if sequence.num_pending_tokens > 1]
    decodes = [sequence for sequence in line if sequence.num_pending_tokens <= 1]
    if shape.admit_before_running:
        # Not prefills ahead of decodes: a sequence would fall back when its prefill ends, and two could then preempt
        # each other for ever.
        draft.line_up(line)
        granted = _grant_each(draft, cursor, prefills)
        granted += admit_waiting(draft, order)
        if granted == 0:
            _grant_each(draft, cursor, decodes)
        return
    if shape.decodes_first:
        line = decodes + prefills
    draft.line_up(line)
    _grant_each(draft, cursor, line)
    admit_waiting(draft, order)


def _drain(cursor: Cursor) -> list[SequenceView]:
    sequences = []
    while (sequence := cursor.next()) is not None:
        sequences.append(sequence)
    return sequences


def _grant_running(draft: BatchDraft, cursor: Cursor) -> None:
    """Grant along the cursor, without a list in between: the hot path of a step that only decodes."""
    grant, take, granted = draft.grant, cursor.next, cursor.granted
    while (sequence := take()) is not None:
        result = grant(sequence, sequence.num_pending_tokens)
        if isinstance(result, Refusal):
            if _stops(cursor, sequence, result):
                return
        else:
            granted(sequence, result)


def _grant_each(draft: BatchDraft, cursor: Cursor, sequences: list[SequenceView]) -> int:
    num_granted = 0
    for sequence in sequences:
        result = draft.grant(sequence, sequence.num_pending_tokens)
        if isinstance(result, Refusal):
            if _stops(cursor, sequence, result):
                break
        else:
            cursor.granted(sequence, result)
            num_granted += 1
    return num_granted


def _stops(cursor: Cursor, sequence: SequenceView, why: Refusal) -> bool:
    # A victim of this very pass is not a refusal that the order has a say in.
    return why is not Refusal.NOT_PENDING and cursor.refused(sequence, why) is OnRefusal.STOP
