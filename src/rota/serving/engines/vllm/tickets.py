"""What a request takes along when it moves to another engine, and how it is asked to go on there."""

from collections.abc import Mapping
from typing import Any

import msgspec

_CARRIED = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "logit_bias",
    "allowed_token_ids",
    "ignore_eos",
    "stop_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "priority",
    "user",
    "cache_salt",
    "session_id",
    "vllm_xargs",
    "stream",
    "stream_options",
    "return_token_ids",
)
"""Fields of a chat or completion body that mean the same for the rest of its answer."""


class Ticket(msgspec.Struct, frozen=True, omit_defaults=True):
    """A request as its source let go of it: every token so far, and where the blocks lie that hold them."""

    request_id: str
    """As it was asked for."""
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    """All that its source has made and told its client; the last of them is the source's last."""
    num_tokens_left: int
    """Output tokens that the request may still make; at least 1."""
    kv_transfer_params: dict[str, Any] | None = None
    """Names the blocks at the source. The source keeps them until they are pulled, or for its lease (30 s). None where
    there is nothing to pull; then the destination computes them anew (replay)."""


class Stays(msgspec.Struct, frozen=True):
    """The request was not let go of, or there is none such; it is as if nobody had asked."""

    reason: str


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an engine answers: one of the two is set."""

    ticket: Ticket | None = None
    stays: Stays | None = None


def continuation(ticket: Ticket, body: Mapping[str, Any], *, replay: bool = False) -> dict[str, Any]:
    """The body of the `POST /v1/completions` by which the destination goes on with the request.

    `body` is the client's own, of a completion or a chat. The prompt is every token so far, as ids, so that nothing is
    encoded twice; the answer holds new tokens only. `replay` leaves the ticket's blocks alone: for an engine that
    cannot pull them, or a second try after a failure.
    """
    going_on = {name: body[name] for name in _CARRIED if name in body}
    going_on["prompt"] = [*ticket.prompt_token_ids, *ticket.output_token_ids]
    going_on["max_tokens"] = ticket.num_tokens_left
    if ticket.kv_transfer_params is not None and not replay:
        going_on["kv_transfer_params"] = ticket.kv_transfer_params
    return going_on
