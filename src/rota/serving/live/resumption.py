"""What the router keeps of a stream so that it can go on at another engine: the prompt as token ids, the token ids that
the client has got, and what the client's events are called.

The rest of an answer is asked for with the client's own body, at the same endpoint, changed in three places: the prompt
is given as token ids with those of the answer so far behind them, and `max_tokens` and `min_tokens` are less by as
many. So everything else that the body says travels by itself, and the events that come have the shape of those that
came before.
"""

from typing import Any

import msgspec

from rota.serving.engines.engine import EngineCall
from rota.serving.engines.vllm.tickets import Ticket

CHAT = "/v1/chat/completions"
DEFAULT_COMPLETION_TOKENS = 16
"""What an OpenAI server takes `max_tokens` of a text completion for where the client says nothing."""

_ASKED_FOR = b'"return_token_ids"'
_ASK = b'{"return_token_ids":true,'
_ASK_TOO = b',"return_token_ids":true'


class Resumption:
    """One stream of which the engine tells token ids. Written by the `EventReader` of the attempt under way."""

    __slots__ = (
        "_call",
        "created",
        "has_finished",
        "has_usage",
        "id",
        "model",
        "num_resumed",
        "num_unsure",
        "output_token_ids",
        "prompt_token_ids",
        "told_before",
        "why_not",
    )

    def __init__(self, call: EngineCall) -> None:
        self._call = call
        self.prompt_token_ids: list[int] | None = None
        self.output_token_ids: list[int] = []
        """Those that the client has got."""
        self.num_unsure = 0
        """The last so many of them may end inside a character: they came in one event with others, and its text is of
        all but, perhaps, the end."""
        self.told_before: list[int] = []
        """Ids that a client who asked for ids was told, and that are computed once more."""
        self.num_resumed = 0
        """How often the stream went on elsewhere, or was moved."""
        self.has_finished = False
        """The client has got the reason why the answer ended: there is nothing more to compute."""
        self.has_usage = False
        """The client has got the event with the usage."""
        self.why_not: str | None = None
        """Why it cannot go on elsewhere after all, once that is known."""
        self.id = ""
        self.created = 0
        self.model = ""

    @property
    def is_chat(self) -> bool:
        return self._call.path == CHAT

    @property
    def wants_token_ids(self) -> bool:
        """Whether the client itself asked for them."""
        return _ASKED_FOR in self._call.body

    @property
    def has_started(self) -> bool:
        """Whether the client has got a token or the end."""
        return bool(self.output_token_ids) or self.has_finished

    @property
    def num_output_tokens(self) -> int | None:
        """Tokens that the client has got, if another engine can go on from there; None if it cannot."""
        if self.why_not is not None or self.prompt_token_ids is None or not self.output_token_ids:
            return None
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Known tokens, of the prompt and those that the client has got."""
        return len(self.prompt_token_ids or ()) + len(self.output_token_ids)

    def unsure_ids(self) -> list[int]:
        return self.output_token_ids[len(self.output_token_ids) - self.num_unsure :]

    def leave_out_last(self) -> None:
        """The last token is inside a character: the next engine computes it again."""
        self.told_before.insert(0, self.output_token_ids.pop())
        self.num_unsure -= 1

    def first_call(self) -> EngineCall:
        """The client's request, with token ids asked for."""
        if self.wants_token_ids:
            return self._call
        body, end = memoryview(self._call.body), self._call.num_arguments_bytes
        if end:  # They stay first.
            return msgspec.structs.replace(self._call, body=b"".join((body[:end], _ASK_TOO, body[end:])))
        return msgspec.structs.replace(self._call, body=self._call.body.replace(b"{", _ASK, 1))

    def prompt(self) -> list[int]:
        """What is computed before the next token."""
        return [*(self.prompt_token_ids or ()), *self.output_token_ids]

    def next_call(self, ticket: Ticket | None = None) -> EngineCall:
        """The rest of the answer, asked of another engine; with the ticket of the engine before, that one's blocks are
        pulled, as far as the client has got the tokens."""
        body: dict[str, Any] = msgspec.json.decode(self._call.body)
        body["return_token_ids"] = True
        num_tokens = len(self.output_token_ids)
        transfer = None if ticket is None else ticket.transfer_params(self.num_tokens)
        limit = "max_tokens"
        if self.is_chat:
            # vLLM takes a chat's prompt as token ids where a prefill instance would hand them on.
            body["kv_transfer_params"] = {**(transfer or {}), "prompt_token_ids": self.prompt()}
            if body.get("max_completion_tokens") is not None:
                limit = "max_completion_tokens"
        else:
            body["prompt"] = self.prompt()
            if transfer is not None:
                body["kv_transfer_params"] = transfer
            body.setdefault("max_tokens", DEFAULT_COMPLETION_TOKENS)
        if ticket is not None:
            # Known where the client set no limit, too: the engine had one of its own.
            body[limit] = ticket.num_tokens_left + ticket.num_tokens - self.num_tokens
        elif body.get(limit) is not None:
            body[limit] = int(body[limit]) - num_tokens
        if body.get("min_tokens"):
            body["min_tokens"] = max(0, int(body["min_tokens"]) - num_tokens)
        return msgspec.structs.replace(self._call, body=msgspec.json.encode(body), num_arguments_bytes=0)

    def owes_usage(self) -> bool:
        """Whether the client asked for an event with the usage, and has not got it."""
        wishes = _wishes(self._call.body).stream_options
        return not self.has_usage and wishes is not None and bool(wishes.include_usage)

    def tail(self) -> bytes:
        """The events that an engine owes after the last token, for one that was lost with them."""
        if not self.owes_usage():
            return b"data: [DONE]\n\n"
        num_prompt_tokens, num_tokens = len(self.prompt_token_ids or ()), len(self.output_token_ids)
        usage = {
            "prompt_tokens": num_prompt_tokens,
            "total_tokens": num_prompt_tokens + num_tokens,
            "completion_tokens": num_tokens,
        }
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        event = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": []}
        return b"data: " + msgspec.json.encode({**event, "usage": usage}) + b"\n\ndata: [DONE]\n\n"


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Wishes(msgspec.Struct):
    stream_options: _StreamOptions | None = None


_wishes = msgspec.json.Decoder(_Wishes).decode
