"""What no instance can ever take."""

from rota.serving.api import ClusterView, Request


def why_never(request: Request, cluster: ClusterView, slack: float) -> str | None:
    """Why a request fits at none of the ready instances, however long it waits; None where it does, or where none is
    ready.

    It needs its prompt and `max_tokens`, or one token where the client did not say; an instance takes its
    `max_model_len`, and no more than its blocks hold. A router that estimates lengths leaves a `slack`, a share, to the
    engine, which counts."""
    instances = cluster.instances
    if not instances:
        return None
    num_needed = request.num_prompt_tokens + (request.max_tokens if request.declares_max_tokens else 1)
    most = 0
    for each in instances:
        most = max(most, min(each.max_model_len, each.num_blocks * each.block_size))
        if num_needed <= most * (1 + slack):
            return None
    fitting = f"prompt and max_tokens come to {num_needed} tokens, and the largest instance takes {most}"
    return f"the request can never fit: {fitting}"
