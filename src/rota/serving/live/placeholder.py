"""What a simulated engine says: words that mean nothing, in the shape of an OpenAI answer."""

import time
from zlib import crc32

import msgspec

from rota.serving.model.request import RequestId

_TEXT = (
    "one step at a time the queue moves on and every request that came in will find its turn while blocks are held "
    "and freed again so that nobody waits for ever even when many arrive at once"
)
_WORDS = _TEXT.split()
_TOKENS = [f" {word}" for word in _WORDS]

_json = msgspec.json.encode


class Placeholder:
    """One answer, token by token. The same request id gives the same words."""

    def __init__(
        self,
        request_id: RequestId,
        *,
        is_chat: bool,
        model: str,
        num_choices: int,
        num_prompt_tokens: int,
        finish_reason: str,
        include_usage: bool,
    ) -> None:
        self._is_chat = is_chat
        self._num_choices = num_choices
        self._num_prompt_tokens = num_prompt_tokens
        self._finish_reason = finish_reason
        self._include_usage = include_usage
        self._offset = crc32(request_id.encode())
        kind = "chat.completion" if is_chat else "text_completion"
        self._common = {
            "id": ("chatcmpl-" if is_chat else "cmpl-") + request_id,
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        chunk = {**self._common, "object": kind + ".chunk" if is_chat else kind}
        # Everything of an event but its choices, so that a token costs no encoding.
        self._before = b"data: " + _json(chunk)[:-1] + b',"choices":['
        self._after = b"]" + (b',"usage":null' if include_usage else b"") + b"}\n\n"

    def word(self, index: int) -> str:
        """The token at `index`."""
        text = _TOKENS[(self._offset + index) % len(_TOKENS)]
        return text[1:] if index == 0 else text

    def first_event(self) -> bytes:
        """What comes before the first token: the role, in a chat."""
        if not self._is_chat:
            return b""
        return self._event('{"index":%d,"delta":{"role":"assistant","content":""},"finish_reason":null}')

    def token_event(self, index: int) -> bytes:
        """The event of one token, for every choice."""
        if self._is_chat:
            return self._event('{"index":%d,"delta":{"content":"' + self.word(index) + '"},"finish_reason":null}')
        return self._event('{"index":%d,"text":"' + self.word(index) + '","logprobs":null,"finish_reason":null}')

    def last_events(self, num_tokens: int) -> bytes:
        """The end of the stream: reason, usage if asked for, and the mark."""
        if self._is_chat:
            last = self._event('{"index":%d,"delta":{},"finish_reason":"' + self._finish_reason + '"}')
        else:
            last = self._event('{"index":%d,"text":"","logprobs":null,"finish_reason":"' + self._finish_reason + '"}')
        if self._include_usage:
            usage = self._before + b'],"usage":' + _json(self._usage(num_tokens)) + b"}\n\n"
            return last + usage + b"data: [DONE]\n\n"
        return last + b"data: [DONE]\n\n"

    def answer(self, num_tokens: int) -> bytes:
        """The whole answer at once."""
        text = "".join([self.word(index) for index in range(num_tokens)])
        choices: list[dict[str, object]] = []
        for index in range(self._num_choices):
            said: dict[str, object] = {"text": text}
            if self._is_chat:
                said = {"message": {"role": "assistant", "content": text}}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": self._finish_reason})
        return _json({**self._common, "choices": choices, "usage": self._usage(num_tokens)})

    def _event(self, choice: str) -> bytes:
        choices = ",".join([choice % index for index in range(self._num_choices)])
        return self._before + choices.encode() + self._after

    def _usage(self, num_tokens: int) -> dict[str, int]:
        num_output = num_tokens * self._num_choices
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_output,
            "total_tokens": self._num_prompt_tokens + num_output,
        }
