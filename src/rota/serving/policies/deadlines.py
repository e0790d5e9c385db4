"""When what was promised of a request falls due."""

from rota.base.instant import Instant
from rota.serving.api import SequenceView

NEVER = Instant(1 << 62)
"""Of a request of which nothing is promised: it comes after every one with a promise."""


def first_token_due(sequence: SequenceView) -> Instant:
    """By when its first token was promised: `slo.ttft` after its arrival."""
    ttft = sequence.request.slo.ttft
    return NEVER if ttft is None else Instant(sequence.arrived_at + ttft)


def next_token_due(sequence: SequenceView) -> Instant:
    """By when its next token must come if `slo.ttft` and `slo.tpot` are to be kept.

    After the first, token n is due (n - 1) × `slo.tpot` after the first was due; where no first token was promised,
    counted from arrival."""
    num_output_tokens = sequence.num_output_tokens
    slo = sequence.request.slo
    if num_output_tokens == 0:
        return first_token_due(sequence)
    if slo.tpot is None:
        return NEVER
    return Instant(sequence.arrived_at + (slo.ttft or 0) + num_output_tokens * slo.tpot)


def end_due(sequence: SequenceView) -> Instant:
    """By when its last token was promised: `slo.e2e` after its arrival."""
    e2e = sequence.request.slo.e2e
    return NEVER if e2e is None else Instant(sequence.arrived_at + e2e)
