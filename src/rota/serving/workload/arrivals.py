"""One request of a trace, and the one place where what it will really do is parted from what a client declares."""

from typing import Literal

import msgspec

from rota.base.errors import ConfigError, DataError
from rota.base.instant import Duration, Instant
from rota.serving.model.request import DEFAULT_TENANT, SLO, ProgramId, Request, RequestId, TenantId

NO_SLO = SLO()

MAX_TOKENS = 2**31 - 1
"""Largest token count that a trace may state."""

MAX_SHARED_TOKENS = 2**24
"""Most tokens of a prompt that prefix ids cover: more than any model's context, and few enough that the ids of the
engine's blocks in it (a million) do not fill the memory."""

MAX_HASH_BLOCK_TOKENS = 2**16

DEFAULT_MAX_TOKENS = 4096
"""What a client of an unknown kind is taken to declare: a round cap far above any output of the public traces (2,000 at
most), so that it tells a policy nothing."""


class Arrival(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, gc=False):
    """One row of a trace: when a request comes, how long its prompt is, and how long its answer will truly be.

    The last is the oracle. Only the world that plays the engine may read it; `to_request` builds what all others see.

    A row either comes at its own instant (it is *open*), or it *waits*: it comes `gap` after the last of the requests
    `after` has ended, as the next turn of a conversation or the next call of an agent does. Open rows stand in order of
    `at`. A row that waits stands after everything it waits for and before the next open row, so that an open row and
    those that follow it are one piece of work, and whoever plays a trace holds only what is under way.
    """

    at: Duration
    """Since the start of the trace. For a row that waits: the earliest possible instant, as if answers took no time."""
    num_prompt_tokens: int
    num_output_tokens: int
    """The truth, at least 1."""
    prefix_hashes: tuple[int, ...] = ()
    """Chained ids of the prompt's leading blocks of `hash_block_tokens` tokens; the last may cover a partial block.
    May cover less than the prompt: the rest is shared with nobody."""
    hash_block_tokens: int = 512
    session: str | None = None
    tenant: TenantId = DEFAULT_TENANT
    priority: int = 0
    program: str | None = None
    """The purpose that it shares with other rows."""
    id: str | None = None
    """A name for others to wait for, unique among the rows since the last open one, that one included."""
    after: tuple[str, ...] = ()
    """Ids of the rows that must have ended, each between the last open row and this one."""
    gap: Duration = Duration(0)
    """Think time or tool time, between the end of the last of `after` and the arrival."""


Fact = Literal["prefixes", "sessions", "tenants", "priorities", "programs", "waits"]
"""What an arrival may say beyond its time and its lengths."""


def facts_of(arrival: Arrival) -> set[Fact]:
    """What an arrival says beyond its time and its lengths. An id says nothing unless somebody waits for it."""
    said: set[Fact] = set()
    if arrival.prefix_hashes:
        said.add("prefixes")
    if arrival.session is not None:
        said.add("sessions")
    if arrival.tenant != DEFAULT_TENANT:
        said.add("tenants")
    if arrival.priority:
        said.add("priorities")
    if arrival.program is not None:
        said.add("programs")
    if arrival.after:
        said.add("waits")
    return said


def refuse_more(row: int, arrival: Arrival, format_name: str, holds: frozenset[Fact]) -> None:
    """Raise `DataError` if the arrival says something that a format cannot hold. `row` counts from 1."""
    lost = sorted(facts_of(arrival) - holds)
    if lost:
        raise DataError(
            f"row {row}: the {format_name} format does not hold {' and '.join(lost)}",
            hint="the rota format holds everything; rota trace convert --lossy leaves them out",
        )


def refuse_block_size(arrival: Arrival, block_size: int) -> None:
    """Raise `ConfigError` if an engine's blocks of `block_size` tokens do not divide the trace's prefix blocks."""
    if arrival.hash_block_tokens % block_size:
        raise ConfigError(
            f"block_size {block_size} does not divide the trace's prefix blocks of {arrival.hash_block_tokens} tokens",
            hint=f"use a block size that divides {arrival.hash_block_tokens}, such as 16",
        )


Declare = Literal["cap", "exact"]


def to_request(
    arrival: Arrival,
    request_id: str,
    origin: Instant,
    *,
    max_model_len: int,
    block_size: int | None = 16,
    declare: Declare = "cap",
    max_tokens: int = DEFAULT_MAX_TOKENS,
    slo: SLO = NO_SLO,
    arrived_at: Instant | None = None,
) -> tuple[Request, int]:
    """The pair that a world needs: the request that schedulers may see, and the output length that only it may know.

    `max_tokens` of the request is what a client would declare: the room left in the model's context, at most the cap
    `max_tokens`. It is never derived from the truth, unless `declare` is "exact", which hands every policy an oracle
    and must be reported as such. The truth is clipped to what was declared, as an engine would stop there. A prompt
    that leaves no room still declares 1: refusing it is the instance's business. `block_size` None leaves prefixes out.
    `arrived_at` is when a row that waited does come.
    """
    declared = arrival.num_output_tokens if declare == "exact" else max_tokens
    declared = max(1, min(declared, max_model_len - arrival.num_prompt_tokens))
    hashes = arrival.prefix_hashes if block_size is not None else ()
    if hashes and block_size is not None:
        refuse_block_size(arrival, block_size)
    request = Request(
        id=RequestId(request_id),
        arrived_at=Instant(origin + arrival.at) if arrived_at is None else arrived_at,
        num_prompt_tokens=arrival.num_prompt_tokens,
        max_tokens=declared,
        priority=arrival.priority,
        tenant=arrival.tenant,
        program=None if arrival.program is None else ProgramId(arrival.program),
        session=arrival.session,
        slo=slo,
        block_hashes=hashes,
        hash_block_tokens=arrival.hash_block_tokens if hashes else None,
    )
    return request, min(arrival.num_output_tokens, declared)
