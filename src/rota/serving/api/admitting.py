"""The walk over the waiting sequences with which every pass ends."""

from rota.serving.api.decisions import OnRefusal, Pool, Refusal
from rota.serving.api.policies import BatchDraft, OrderPolicy


def admit_waiting(draft: BatchDraft, order: OrderPolicy) -> int:
    """Grant along the order's walk over the waiting sequences for as long as budget is left, unless this step had to
    preempt somebody. Returns how many were admitted."""
    if draft.num_preempted or not draft.token_budget or not len(draft.view.waiting):
        return 0
    num_granted = 0
    cursor = order.open(draft.view, Pool.WAITING)
    while draft.token_budget > 0 and (sequence := cursor.next()) is not None:
        result = draft.grant(sequence, sequence.num_pending_tokens)
        if isinstance(result, Refusal):
            if cursor.refused(sequence, result) is OnRefusal.STOP:
                break
        else:
            cursor.granted(sequence, result)
            num_granted += 1
    return num_granted
