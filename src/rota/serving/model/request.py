"""What the world tells us about a piece of work. Frozen facts: nothing here changes after arrival.

What a live scheduler cannot know, the true output length above all, has no field here (law 9, oracle boundary).
"""

from collections.abc import Hashable
from typing import Any, NewType

import msgspec

from rota.base.instant import Duration, Instant

RequestId = NewType("RequestId", str)
TenantId = NewType("TenantId", str)
ProgramId = NewType("ProgramId", str)

DEFAULT_TENANT = TenantId("default")


class SLO(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was promised to the client. A target that is None is not promised."""

    ttft: Duration | None = None
    """Arrival at the front door to first token."""
    tpot: Duration | None = None
    """Mean time per output token after the first."""
    e2e: Duration | None = None
    """Arrival to last token."""


class Tenant(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who owns requests."""

    id: TenantId
    weight: float = 1.0


class Program(msgspec.Struct, frozen=True, omit_defaults=True):
    """A set of requests with one purpose (an agent run, a chain of calls)."""

    id: ProgramId
    tenant: TenantId = DEFAULT_TENANT
    deadline_at: Instant | None = None


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request as it arrived at the front door."""

    id: RequestId
    arrived_at: Instant
    num_prompt_tokens: int
    """At least 1. The router, which has no tokenizer, estimates it from the bytes of the prompt."""
    max_tokens: int
    """Cap on output tokens, at least 1; the only thing known about the output's length."""
    priority: int = 0
    """Class; lower runs first, as in vLLM. Negative is allowed."""
    tenant: TenantId = DEFAULT_TENANT
    program: ProgramId | None = None
    session: str | None = None
    slo: SLO = SLO()
    block_hashes: tuple[Any, ...] = ()
    """Chained hashes of the prompt's leading blocks, first block first: two requests share a prefix as far as these
    agree. Any hashable values. May be shorter than the prompt (the rest is private to the request), or empty."""
    hash_block_tokens: int | None = None
    """Tokens that each of `block_hashes` stands for; of the last, as many as the prompt has. None: a full block of the
    engine each."""
    declares_max_tokens: bool = True
    """Whether the client said `max_tokens`; otherwise it is a guess, and the engine goes on for as long as it can."""
    movable: bool = True
    """Whether it can go on at another instance once it has begun. False where something of it does not travel, such as
    the state of a seeded draw."""
    text_counts: tuple[int, ...] = ()
    """What was counted of the prompt's text, as `TEXT_COUNTS` names it; empty unless that was asked for."""


def shared_prefix_blocks(first: tuple[Hashable, ...], second: tuple[Hashable, ...]) -> int:
    """Number of leading blocks on which two requests agree."""
    count = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        count += 1
    return count
