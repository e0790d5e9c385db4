"""Which streams can go on at another engine after their first token, by what their bodies ask for.

A body that is sent again, with the tokens so far put behind its prompt and its counts reduced, has to mean the rest of
the same answer. Fields of which that is known are listed here; a body with any other field stays where it is. What is
listed without a type means the same in the middle of an answer as at its start.
"""

from typing import Any

import msgspec

from rota.serving.engines.travel import why_terms_stay
from rota.serving.frontdoor.bodies import Message, Prompt


class _Terms(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What chat and text completions have in common."""

    model: msgspec.Raw = msgspec.Raw()
    stream: msgspec.Raw = msgspec.Raw()
    stream_options: msgspec.Raw = msgspec.Raw()
    user: msgspec.Raw = msgspec.Raw()
    priority: msgspec.Raw = msgspec.Raw()
    session_id: msgspec.Raw = msgspec.Raw()
    request_id: msgspec.Raw = msgspec.Raw()
    cache_salt: msgspec.Raw = msgspec.Raw()
    vllm_xargs: msgspec.Raw = msgspec.Raw()
    stream_interval: msgspec.Raw = msgspec.Raw()
    add_special_tokens: msgspec.Raw = msgspec.Raw()
    # How one token is drawn from its distribution, whatever came before.
    top_p: msgspec.Raw = msgspec.Raw()
    top_k: msgspec.Raw = msgspec.Raw()
    min_p: msgspec.Raw = msgspec.Raw()
    logit_bias: msgspec.Raw = msgspec.Raw()
    allowed_token_ids: msgspec.Raw = msgspec.Raw()
    repetition_penalty: msgspec.Raw = msgspec.Raw()
    """Looks at prompt and output alike, so it does not matter which of them a token belongs to."""
    # When it ends, and how it reads.
    stop_token_ids: msgspec.Raw = msgspec.Raw()
    ignore_eos: msgspec.Raw = msgspec.Raw()
    skip_special_tokens: msgspec.Raw = msgspec.Raw()
    spaces_between_special_tokens: msgspec.Raw = msgspec.Raw()
    max_tokens: msgspec.Raw = msgspec.Raw()
    min_tokens: msgspec.Raw = msgspec.Raw()
    # Those that must ask for nothing.
    temperature: float | None = None
    seed: float | None = None
    n: float | None = None
    best_of: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop: str | list[str] | None = None
    logprobs: float | bool | None = None
    echo: bool | None = None
    response_format: Any = None
    return_token_ids: bool = True

    def stays(self) -> bool:
        """Whether something here depends on how the answer began, beyond its tokens."""
        return bool(
            why_terms_stay(self)
            or (self.n or 1) != 1
            or (self.best_of or 1) != 1
            or self.echo
            or not (self.response_format is None or self.response_format == {"type": "text"})
            or not self.return_token_ids
        )


class _ChatTerms(_Terms, kw_only=True):
    messages: msgspec.Raw
    max_completion_tokens: msgspec.Raw = msgspec.Raw()
    # Spent on the prompt's tokens, which are sent as they are.
    add_generation_prompt: msgspec.Raw = msgspec.Raw()
    continue_final_message: msgspec.Raw = msgspec.Raw()
    chat_template: msgspec.Raw = msgspec.Raw()
    chat_template_kwargs: msgspec.Raw = msgspec.Raw()
    tools: list[msgspec.Raw] | None = None

    def stays(self) -> bool:
        return bool(self.tools) or super().stays()


class _CompletionTerms(_Terms, kw_only=True):
    prompt: msgspec.Raw


_chat = msgspec.json.Decoder(_ChatTerms).decode
_completion = msgspec.json.Decoder(_CompletionTerms).decode


def chat_travels(raw: bytes, messages: list[Message]) -> bool:
    """Whether a chat's stream can go on elsewhere. Only text can be said by its tokens."""
    for message in messages:
        content = message.content
        if isinstance(content, list) and any(part.type != "text" for part in content):
            return False
    try:
        return not _chat(raw).stays()
    except msgspec.ValidationError:
        return False


def completion_travels(raw: bytes, prompt: Prompt) -> bool:
    """Whether a text completion's stream can go on elsewhere. It must be one."""
    if isinstance(prompt, list) and (isinstance(prompt[0], list) or (isinstance(prompt[0], str) and len(prompt) > 1)):
        return False
    try:
        return not _completion(raw).stays()
    except msgspec.ValidationError:
        return False
