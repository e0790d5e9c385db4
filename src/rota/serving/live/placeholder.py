"""What a simulated engine says: words that mean nothing, in the shape of an OpenAI answer.

A token is a function of its prompt and of its position behind the prompt's beginning, so any engine that is given the
prompt and the tokens so far, as ids, goes on with the same ones.
"""

import time
from collections.abc import Sequence
from zlib import crc32

import msgspec

from rota.serving.model.request import RequestId

_TEXT = (
    "one step at a time the queue moves on and every request that came in will find its turn while blocks are held "
    "and freed again so that nobody waits for ever even when many arrive at once"
)
_WORDS = _TEXT.split()
_TOKENS = [f" {word}" for word in _WORDS]
_NUM_IDS = 2**20

_json = msgspec.json.encode


def prompt_ids(text: bytes, num_tokens: int) -> range:
    """A text as so many token ids, the same for the same text. The first stands for the whole of it."""
    first = crc32(text) % _NUM_IDS
    return range(first, first + num_tokens)


class Placeholder:
    """One answer, token by token. The same prompt gives the same words."""

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
        prompt: Sequence[int],
        goes_on: bool = False,
        tells_ids: bool = False,
    ) -> None:
        """`prompt` is at least one token id. With `goes_on` the prompt ends with the beginning of the answer, and the
        next token stands behind others. With `tells_ids` the events have token ids, as vLLM's do on request."""
        self._is_chat = is_chat
        self._goes_on = goes_on
        self._tells_ids = tells_ids
        self._prompt = prompt
        self._first_id = b"%d" % prompt[0]
        self._num_choices = num_choices
        self._num_prompt_tokens = num_prompt_tokens
        self._finish_reason = finish_reason
        self._include_usage = include_usage
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

    @property
    def prompt(self) -> Sequence[int]:
        """The prompt's token ids."""
        return self._prompt

    def token_id(self, index: int) -> int:
        """The id of the token at `index` of this answer."""
        return crc32(self._first_id, len(self._prompt) + index) % _NUM_IDS

    def word(self, index: int) -> str:
        """The token at `index`."""
        text = _TOKENS[self.token_id(index) % len(_TOKENS)]
        return text[1:] if index == 0 and not self._goes_on else text

    def first_event(self) -> bytes:
        """What comes before the first token: the role, in a chat."""
        if not self._is_chat:
            return b""
        event = self._event('{"index":%d,"delta":{"role":"assistant","content":""},"finish_reason":null}')
        if self._tells_ids:
            event = event[:-3] + b',"prompt_token_ids":' + _json(list(self._prompt)) + b"}\n\n"
        return event

    def token_event(self, index: int) -> bytes:
        """The event of one token, for every choice."""
        ids = f',"token_ids":[{self.token_id(index)}]' if self._tells_ids else ""
        if self._is_chat:
            return self._event(
                '{"index":%d,"delta":{"content":"' + self.word(index) + f'"}},"finish_reason":null{ids}}}'
            )
        if self._tells_ids and index == 0:
            ids = f',"prompt_token_ids":{_json(list(self._prompt)).decode()}{ids}'
        return self._event('{"index":%d,"text":"' + self.word(index) + f'","logprobs":null,"finish_reason":null{ids}}}')

    def last_events(self, num_tokens: int, finish_reason: str | None = None) -> bytes:
        """The end of the stream: reason, usage if asked for, and the mark."""
        reason = f'"finish_reason":"{finish_reason or self._finish_reason}"' + (
            ',"token_ids":[]' if self._tells_ids else ""
        )
        if self._is_chat:
            last = self._event('{"index":%d,"delta":{},' + reason + "}")
        else:
            last = self._event('{"index":%d,"text":"","logprobs":null,' + reason + "}")
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
