"""What the router knows of a prompt without a tokenizer: about how long it is, and which prefix it shares with others.

Length: a quarter of the bytes of its text, rounded up, and a little for each message; exact for prompts given as token
ids. Prefix: hashes over the JSON text of the prompt as it was sent, block after block, each over all that came before.
A block is as many bytes as `TOKENS_PER_BLOCK` tokens are estimated to be. Two clients that write the same prompt with
different white space share no prefix here; the same client, one turn later, does.
"""

import struct
from hashlib import blake2b

from rota.serving.frontdoor.bodies import Message, Prompt
from rota.serving.model.text_counts import text_counts

BYTES_PER_TOKEN = 4
TOKENS_PER_BLOCK = 64
NUM_BLOCKS_MAX = 512
"""Blocks hashed at most: 128 KiB of prompt. What lies beyond is private to the request."""

_BLOCK_BYTES = BYTES_PER_TOKEN * TOKENS_PER_BLOCK
_TOKENS_PER_MESSAGE = 4
_TOKENS_PER_MEDIUM = 256
_NUMBERS = (int, float)
"""A tuple, since `int | float` would be made anew for each of a million token ids."""


def num_message_tokens(messages: list[Message]) -> int:
    """Estimated prompt tokens of a chat, at least 1. Every part that is not text counts 256."""
    num_bytes = 0
    num_tokens = _TOKENS_PER_MESSAGE * len(messages)
    for message in messages:
        content = message.content
        if isinstance(content, str):
            num_bytes += _num_bytes(content)
        elif content is not None:
            for part in content:
                if part.text is not None:
                    num_bytes += _num_bytes(part.text)
                else:
                    num_tokens += _TOKENS_PER_MEDIUM
    return max(1, num_tokens + _quarter(num_bytes))


def num_prompt_tokens(prompt: Prompt) -> int:
    """Prompt tokens of a text completion, at least 1; several prompts in one request add up."""
    if isinstance(prompt, str):
        return max(1, _quarter(_num_bytes(prompt)))
    num_tokens = 0
    for item in prompt:
        if isinstance(item, _NUMBERS):
            num_tokens += 1
        elif isinstance(item, str):
            num_tokens += _quarter(_num_bytes(item))
        else:
            num_tokens += len(item)
    return max(1, num_tokens)


def message_counts(messages: list[Message]) -> tuple[int, ...]:
    """What is counted of the text of a chat; other media have none."""
    return text_counts([(message.role, _text(message)) for message in messages])


def prompt_counts(prompt: Prompt) -> tuple[int, ...]:
    """What is counted of the text of a completion, several in one request being one text; nothing of token ids."""
    texts = [prompt] if isinstance(prompt, str) else [item for item in prompt if isinstance(item, str)]
    return text_counts([("user", "\n".join(texts))], is_chat=False) if texts else ()


def block_hashes(prompt: bytes, num_tokens: int, *salts: bytes) -> tuple[int, ...]:
    """Chained 64-bit hashes of the prompt's full blocks. `salts` is what else must agree for a cache to be shared: the
    model, the tenant's cache salt, the tools that the chat template puts in front."""
    num_blocks = min(len(prompt) // _BLOCK_BYTES, num_tokens // TOKENS_PER_BLOCK, NUM_BLOCKS_MAX)
    if not num_blocks:
        return ()
    running = blake2b(digest_size=8)
    for salt in salts:
        running.update(b"%d:%b" % (len(salt), salt))
    update, digest = running.update, running.digest
    digests = []
    for start in range(0, num_blocks * _BLOCK_BYTES, _BLOCK_BYTES):
        update(prompt[start : start + _BLOCK_BYTES])
        digests.append(digest())
    return struct.unpack(f">{num_blocks}q", b"".join(digests))


def _text(message: Message) -> str:
    content = message.content
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content if part.text is not None)


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _quarter(num_bytes: int) -> int:
    return -(-num_bytes // BYTES_PER_TOKEN)
