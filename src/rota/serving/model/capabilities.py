"""What an engine can be told to do, as one value that is the same live and simulated.

A policy declares what it needs in `requires`; assembly refuses a stack whose needs the engine lacks
(`CapabilityError`), so that a policy is never approximated in silence."""

from enum import StrEnum


class Capability(StrEnum):
    """One thing an engine can be told."""

    ORDER_WAITING = "order_waiting"
    """Admit waiting requests in the order that we give."""
    ORDER_RUNNING = "order_running"
    """Serve running requests in the order that we give."""
    TOKEN_BUDGET = "token_budget"
    """Take a limit of tokens per step."""
    ADMIT_BEFORE_RUNNING = "admit_before_running"
    """Give tokens to waiting requests ahead of running ones, and hold decodes back meanwhile."""
    SKIP_REFUSED = "skip_refused"
    """Go on past a waiting request that does not fit."""
    FREE_BATCH = "free_batch"
    """Run any legal batch, however it was composed."""
    PREEMPT_RECOMPUTE = "preempt_recompute"
    """Stop a running request, free its blocks and compute them again later."""
    DISPLACE = "displace"
    """Stop a running request for a waiting one."""
    CHOOSE_VICTIM = "choose_victim"
    """Choose freely whom to preempt when memory runs out, ahead of the step that lacks it."""
    PREFIX_CACHE = "prefix_cache"
    """Share the blocks of equal prefixes."""
    SWAP = "swap"
    """Keep the blocks of a preempted request in host memory."""
    RESUME_FROM_TOKENS = "resume_from_tokens"
    """Go on with a request whose first output tokens came from elsewhere, by computing them anew (replay)."""
    HAND_OVER_KV = "hand_over_kv"
    """Let a running request go at a token, and take one, with its blocks."""
    COPY_KV = "copy_kv"
    """Copy the blocks of a running request to another instance while it decodes."""


EngineCapabilities = frozenset[Capability]

EVERYTHING: EngineCapabilities = frozenset(Capability)
"""What the simulated engine can do."""

NOTHING: EngineCapabilities = frozenset()
"""What any OpenAI-compatible server can be told from outside: nothing about its steps."""
