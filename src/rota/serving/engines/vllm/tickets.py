"""What a request takes along when it moves to another engine, and what an engine answers who was asked for it."""

from typing import Any

import msgspec


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
    block_size: int = 0
    """Tokens a block; 0 where there is nothing to pull."""
    block_bytes: int = 0
    """Bytes a block, of all layers."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def transfer_params(self, num_tokens: int) -> dict[str, Any] | None:
        """The `kv_transfer_params` with which a destination pulls the blocks of the first `num_tokens` tokens, which it
        is given as its prompt; None if there is nothing to pull.

        They name exactly as many blocks as that prompt needs, since vLLM pairs blocks from their end. Fewer tokens than
        all are right where the client has not got the last ones.
        """
        if self.kv_transfer_params is None or not 0 < num_tokens <= self.num_tokens:
            return None
        num_blocks = self._num_blocks(num_tokens)
        block_ids = [group[:num_blocks] for group in self.kv_transfer_params["remote_block_ids"]]
        return {**self.kv_transfer_params, "remote_block_ids": block_ids}

    def num_bytes(self, num_tokens: int) -> int:
        """Bytes of the blocks that so many tokens take; those that the destination has cached it does not pull."""
        return 0 if self.kv_transfer_params is None else self._num_blocks(num_tokens) * self.block_bytes

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


class Stays(msgspec.Struct, frozen=True):
    """The request was not let go of, or there is none such; it is as if nobody had asked."""

    reason: str


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an engine answers: one of the two is set."""

    ticket: Ticket | None = None
    stays: Stays | None = None
