"""Which policies vLLM's scheduler can be told to follow exactly; everything else is refused, never approximated."""

from rota.base.errors import CapabilityError
from rota.serving.api import (
    BatchPolicy,
    BatchShape,
    Capability,
    EngineCapabilities,
    InstanceLimits,
    MemoryPolicy,
    OrderPolicy,
)

VLLM_CAPABILITIES: EngineCapabilities = frozenset(
    {
        Capability.ORDER_WAITING,
        Capability.ORDER_RUNNING,
        Capability.TOKEN_BUDGET,
        Capability.PREEMPT_RECOMPUTE,
        Capability.DISPLACE,
        Capability.CHOOSE_VICTIM,
        Capability.PREFIX_CACHE,
    }
)
"""What vLLM 0.32 can be told from inside its scheduler.

It lacks SKIP_REFUSED (a waiting request without room ends the scan), FREE_BATCH and ADMIT_BEFORE_RUNNING (its pass
serves running requests first). Inside its pass the victim is the end of its running list; whom to preempt is chosen
freely ahead of the pass, which then lacks nothing.
"""

_WHY_LACKING = {
    Capability.ADMIT_BEFORE_RUNNING: "its pass serves running requests first",
    Capability.SKIP_REFUSED: "its scan ends at the first waiting request that lacks room",
    Capability.FREE_BATCH: "its pass composes the batch",
}


def check_hostable(
    order: OrderPolicy, batch: BatchPolicy, memory: MemoryPolicy, limits: InstanceLimits | None = None
) -> BatchShape:
    """Guarantees that vLLM with our plug-in does exactly what these policies say; returns the shape of its pass.

    Raises `CapabilityError` naming the policy, what it needs and what vLLM lacks. `limits` are the engine's settings;
    without them what depends on settings is taken as fine.
    """
    for kind, policy in (("order", order), ("batch", batch), ("memory", memory)):
        for capability in sorted(policy.requires - VLLM_CAPABILITIES):
            why = _WHY_LACKING.get(capability, "it has no such seam")
            raise _refusal(f"{kind} policy {_name(policy)} needs {capability}, which vLLM 0.32 lacks: {why}")
    shape = batch.shape
    if shape is None:
        raise _refusal(f"batch policy {_name(batch)} composes batches freely, and vLLM 0.32's pass composes its own")
    if shape.admit_before_running:
        why = _WHY_LACKING[Capability.ADMIT_BEFORE_RUNNING]
        raise _refusal(f"batch policy {_name(batch)} needs admit_before_running, which vLLM 0.32 lacks: {why}")
    if shape.token_budget is not None and shape.token_budget < 1:
        raise _refusal(f"batch policy {_name(batch)} has a budget of {shape.token_budget} tokens a step")
    if memory.victim_order in ("line", "chosen"):
        return shape
    if memory.victim_order != "admission":
        raise _refusal(
            f"memory policy {_name(memory)} takes victims in the order {memory.victim_order!r}, and vLLM 0.32 always "
            "takes the end of the line that it serves"
        )
    # The end of the line is the sequence admitted last only where the line is the order of admission.
    if order.running_order != "admission":
        raise _refusal(
            f"memory policy {_name(memory)} preempts the sequence admitted last, but vLLM 0.32 takes the end of the "
            f"line that it serves, and order policy {_name(order)} has a line of its own"
        )
    if shape.decodes_first and limits is not None and limits.long_prefill_token_threshold > 0:
        # Without a cap on chunks a prefill under way takes all that is left of every step, so nobody is admitted
        # behind it: it is the one admitted last, and serving decodes first leaves the line in order of admission.
        raise _refusal(
            f"memory policy {_name(memory)} preempts the sequence admitted last, but with long_prefill_token_threshold "
            f"{limits.long_prefill_token_threshold} batch policy {_name(batch)} may serve others after it"
        )
    return shape


def _refusal(message: str) -> CapabilityError:
    return CapabilityError(
        message,
        hint="hosted are orders that end their walk where one does not fit; batch vllm_default, stall_free_chunks; "
        "memory recompute_lowest, recompute_cheapest",
    )


def _name(policy: object) -> str:
    return type(policy).__name__
