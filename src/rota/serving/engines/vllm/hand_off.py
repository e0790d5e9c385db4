"""Letting go of a running request at its next token, with its blocks kept for another engine to pull.

vLLM 0.32 keeps the blocks of a request that ends at its `max_tokens`, if the request says `do_remote_decode`. So the
request is cut to end with its next token and made to say so. At that moment and not when it arrives: a request that
says it from the beginning, and then ends by itself, would keep its blocks pinned for a whole lease.
"""

import re
from typing import Any

from rota.serving.engines.travel import why_terms_stay
from rota.serving.engines.vllm.control import Asked, ControlChannel
from rota.serving.engines.vllm.tickets import Reply, Stays, Ticket

_PRODUCER = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class HandOffs:
    """The hand-offs of one scheduler, from being asked for to the reply. Everything happens in the engine's thread."""

    def __init__(self, scheduler: Any, channel: ControlChannel, exporter: Any) -> None:
        """`exporter` is the scheduler side of the NIXL connector; without it (None) tickets hold tokens only."""
        self._scheduler = scheduler
        self._channel = channel
        self._exporter = exporter
        self._leaving: dict[str, _Leaving] = {}

    def begin_asked(self) -> None:
        """Before a pass: cut those that were asked for since the last one, restore those nobody waits for any more."""
        for asked in self._channel.take():
            if not asked.is_withdrawn:
                self._begin(asked)
        for request_id in [name for name, leaving in self._leaving.items() if leaving.asked.is_withdrawn]:
            self.undo(request_id, "it was taken back")

    def undo(self, request_id: str, reason: str) -> None:
        """The request goes on here after all. Unknown ids are ignored."""
        leaving = self._leaving.pop(request_id, None)
        if leaving is not None:
            leaving.request.max_tokens = leaving.max_tokens
            self._retract(leaving.request)
            leaving.asked.answer(Reply(stays=Stays(reason)))

    def closing(self, request: Any) -> None:
        """It has ended and its blocks are about to be freed: they are kept only if it was we who ended it, and if
        they hold all but its last token, which is what a destination takes them for."""
        leaving = self._leaving.get(request.request_id)
        if leaving is None or request.kv_transfer_params is None:
            return
        if not leaving.is_cut_short or not self._is_pullable(request):
            self._retract(request)

    def closed(self, request: Any, kv_transfer_params: dict[str, Any] | None) -> None:
        """It has ended: answer with its ticket, if it was we who ended it."""
        leaving = self._leaving.pop(request.request_id, None)
        if leaving is None:
            return
        if not leaving.is_cut_short:
            leaving.asked.answer(Reply(stays=Stays("it has ended")))
            return
        ticket = Ticket(
            request_id=leaving.asked.command.hand_off,
            prompt_token_ids=tuple(request.prompt_token_ids),
            output_token_ids=tuple(request.output_token_ids),
            num_tokens_left=leaving.max_tokens - request.num_output_tokens,
            kv_transfer_params=kv_transfer_params,
            **self._blocks(kv_transfer_params),
        )
        leaving.asked.answer(Reply(ticket=ticket))

    def close(self) -> None:
        self._channel.close()

    def _blocks(self, kv_transfer_params: dict[str, Any] | None) -> dict[str, int]:
        if not kv_transfer_params:
            return {}
        (group,) = self._scheduler.kv_cache_config.kv_cache_groups  # else there is no exporter
        block_bytes = group.kv_cache_spec.page_size_bytes * len(group.layer_names)
        return {"block_size": self._scheduler.block_size, "block_bytes": block_bytes}

    def _begin(self, asked: Asked) -> None:
        requests = self._scheduler.requests
        names = [name for name in requests if is_internal_id(name, asked.command.hand_off)]
        reason = "it is not here (any more)"
        if len(names) == 1:
            request = requests[names[0]]
            reason = "it is leaving already" if names[0] in self._leaving else self._why_it_stays(request)
        elif names:
            reason = "it is several sequences at once"
        if reason:
            asked.answer(Reply(stays=Stays(reason)))
            return
        self._leaving[request.request_id] = leaving = _Leaving(asked, request, self._scheduler.max_model_len)
        # Tokens in flight come anyway; with none in flight, the next one is the last.
        last = request.num_output_tokens + max(1, request.num_output_placeholders)
        if self._exporter is not None:
            if self._is_on_boundary(request, last):
                last += 1
            request.kv_transfer_params = dict(_PRODUCER)
            self._exporter._reqs_in_batch.add(request.request_id)
        request.max_tokens = min(last, leaving.max_tokens)

    def _why_it_stays(self, request: Any) -> str:
        from vllm.v1.request import RequestStatus

        if request.is_finished():
            return "it has ended"
        if request.status != RequestStatus.RUNNING:
            return "it does not run yet"
        if self._scheduler.num_spec_tokens:
            return "drafted tokens are in its blocks"
        return why_it_stays(request)

    def _is_on_boundary(self, request: Any, num_output_tokens: int) -> bool:
        """Whether its last token would be the first of a block. That token is not computed here, so the block is not
        there, and a destination, which takes room for all tokens, would pull one block too many (vLLM's worker
        asserts). One token later all is well."""
        return bool((request.num_prompt_tokens + num_output_tokens - 1) % self._scheduler.block_size == 0)

    def _is_pullable(self, request: Any) -> bool:
        has_all = request.num_computed_tokens == request.num_tokens - 1
        return has_all and not self._is_on_boundary(request, request.num_output_tokens)

    def _retract(self, request: Any) -> None:
        """Its blocks are its own again; the worker forgets that it was told of them."""
        request.kv_transfer_params = None
        if self._exporter is not None:
            self._exporter._reqs_not_processed.add(request.request_id)


class _Leaving:
    """A request between being cut and its end."""

    def __init__(self, asked: Asked, request: Any, max_model_len: int) -> None:
        self.asked = asked
        self.request = request
        self.max_tokens = min(int(request.max_tokens), max_model_len - int(request.num_prompt_tokens))
        """Where it would have ended."""

    @property
    def is_cut_short(self) -> bool:
        """Whether it has ended where we cut it, and not by itself in the same token."""
        from vllm.v1.request import RequestStatus

        request = self.request
        return (
            request.status == RequestStatus.FINISHED_LENGTH_CAPPED
            and request.num_output_tokens < self.max_tokens
            and request.num_output_tokens >= request.max_tokens
        )


def exporter_of(scheduler: Any) -> Any:
    """The side of the scheduler's KV connector that lets blocks be pulled; None where there is none, or where blocks of
    this model cannot be counted by tokens alone (more than one group, or windows)."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    exporter = getattr(scheduler.connector, "connector_scheduler", None)
    groups = scheduler.kv_cache_config.kv_cache_groups
    if exporter is None or len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec):
        return None
    return None if exporter.use_host_buffer or exporter.is_bidirectional_kv_xfer_enabled else exporter


def is_internal_id(name: str, request_id: str) -> bool:
    """Whether vLLM made `name` of a request that came with `X-Request-Id: request_id`: it adds the endpoint, on
    completions the index of the prompt, and eight random digits."""
    same = re.escape(request_id)
    pattern = rf"(?:cmpl-{same}-\d+|(?:\d+_)?(?:chatcmpl|generate-tokens)-{same}|{same})(?:-[0-9a-f]{{8}})?"
    return re.fullmatch(pattern, name) is not None


def why_it_stays(request: Any) -> str:
    """What of a vLLM request would be lost or changed if it went on elsewhere; empty if nothing.

    What the client's body alone tells is judged by the rules of `travel`, as the router does; this engine knows more of
    the request.
    """
    parameters = request.sampling_params
    if parameters is None or not request.prompt_token_ids:
        return "it has no prompt of tokens, or does not generate"
    reasons = {
        "its grammar's state does not travel": parameters.structured_outputs is not None,
        "its log-probabilities are of one engine": parameters.prompt_logprobs is not None,
        "its bad words may lie across the move": bool(parameters.bad_words),
        "its budget for thinking counts output tokens": parameters.thinking_token_budget is not None,
        "its repetitions are counted from its first output token": parameters.repetition_detection is not None,
        "it has an adapter": request.lora_request is not None,
        "it has more than text in its prompt": bool(request.mm_features),
        "its input streams in": bool(request.resumable),
    }
    return why_terms_stay(parameters) or next((reason for reason, holds in reasons.items() if holds), "")


def drop_unusable_ticket(request: Any, block_size: int) -> None:
    """Guarantees that a request that arrives with a ticket has exactly the blocks that the ticket names; any other is
    computed anew.

    vLLM 0.32 pairs blocks from their end: with one more or fewer it would end the engine, or read another block's keys
    and values, and the tokens would be wrong. The source's blocks are then freed when their lease ends.
    """
    ticket = request.kv_transfer_params
    if not ticket or not ticket.get("do_remote_prefill") or not ticket.get("remote_block_ids"):
        return
    num_blocks = -(-request.num_prompt_tokens // block_size)
    is_whole = ticket.get("remote_num_tokens", 0) >= request.num_prompt_tokens - 1
    if not is_whole or any(len(group) != num_blocks for group in ticket["remote_block_ids"]):
        request.kv_transfer_params = None
