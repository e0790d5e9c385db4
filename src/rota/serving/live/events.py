"""Reads the events of a stream that can go on elsewhere, and says what of them the client gets.

Of what an engine sends, the client gets whole events only, and of those only such as end a piece of text. A token that
is the beginning of a character brings no text; its event waits for the one that brings the character. Otherwise a
stream could break off inside a character, and vLLM, given such a beginning at the end of a prompt, answers with the
text of the whole prompt.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import msgspec

from rota.base.errors import EngineError
from rota.serving.live.resumption import Resumption

_EVENT_BYTES_MAX = 4 * 1024 * 1024
_DATA = b"data: "
_DONE = b"data: [DONE]"
_IDS = re.compile(rb'(,"(?:prompt_)?token_ids":)\[[0-9, ]*\]')
"""The ids as JSON has them. A quotation mark after a comma and before a colon cannot be inside a string, where it would
be escaped."""
_CHARACTERS = rb'[^"\\\x00-\x1f]*(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*)*'
"""What a JSON string has between its quotation marks."""
_ID = rb"(0|[1-9][0-9]{0,17})"
"""A token id: an integer of no more than 64 bits."""
_PADDED_NULLS = tuple(b"null" + b" " * num_blanks for num_blanks in range(17))
_frame_of = re.compile(
    rb'(data: \{.*?"(?:content|text)":")' + _CHARACTERS + rb'("[^\[\]]*,"token_ids":)\[' + _ID + rb"\](.*)", re.DOTALL
).fullmatch


@functools.lru_cache(maxsize=64)
def _plain_end(between: bytes, after: bytes) -> Callable[[bytes, int, int], re.Match[bytes] | None]:
    """Finds the list of ids and the id, where there is some text and then these."""
    ids = rb"(\[" + _ID + rb"\])"
    return re.compile(b'(?!")' + _CHARACTERS + re.escape(between) + ids + re.escape(after) + rb"\Z").match


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    # What only a parser in the engine makes of tokens; it would begin anew.
    reasoning: Any = None
    reasoning_content: Any = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class _Error(msgspec.Struct):
    message: str = ""


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    prompt_token_ids: list[int] | None = None
    error: _Error | None = None


class _Named(msgspec.Struct):
    id: str = ""
    created: int = 0
    model: str = ""


_decode = msgspec.json.Decoder(_Event).decode
_name = msgspec.json.Decoder(_Named).decode


class EventReader:
    """One attempt's events, from the first byte to `[DONE]`. `Resumption` is brought up to date as the client is."""

    def __init__(self, resumption: Resumption) -> None:
        self.is_done = False
        """The engine said that the stream is whole."""
        self.broken: str | None = None
        """What is wrong with the stream, once something is. Nothing of that event, or after it, reaches the client."""
        self._resumption = resumption
        self._num_before = 0
        """Tokens that other engines made."""
        self._goes_on = resumption.has_started
        self._is_checked = not self._goes_on
        """The engine confirmed that it goes on from where we said."""
        self._strip = not resumption.wants_token_ids
        self._rest = b""
        self._held: list[bytes] = []
        self._held_ids: list[int] = []
        self._is_unsettled = False
        """Part of an event is held back, or no more tokens may come."""
        self._before: bytes | None = None
        """What every plain event of this stream has before its text."""
        self._plain_end = _plain_end(b"", b"")
        self._keeps_end = False
        self._kept: list[bytes] = []

    def feed(self, data: bytes) -> bytes:
        """What the client gets now. Stops at what is no event of such a stream, at the engine's own errors, and where
        it did not go on from the tokens that it was given."""
        if self._rest:
            data = self._rest + data
        *events, self._rest = data.split(b"\n\n")
        out: list[bytes] = []
        try:
            for event in events:
                known = self._known(event, 0, len(event))
                if known is not None:
                    out += (known, b"\n\n")
                    continue
                out.append(self._take(event))
                self._note_unsettled()
            if len(self._rest) > _EVENT_BYTES_MAX:
                raise EngineError(f"an event of the stream exceeds {_EVENT_BYTES_MAX} bytes")
        except EngineError as error:
            self.broken = error.message
        return out[0] if len(out) == 1 else b"".join(out)

    @property
    def has_frame(self) -> bool:
        """Whether `glance` may know what comes."""
        return self._before is not None

    def glance(self, chunk: bytes) -> bytes | None:
        """What the client gets for an HTTP/1.1 chunk that is one plain event. None, and nothing is changed, if it is
        anything else: then it has to be parsed, and `feed`."""
        if self._rest or not chunk.endswith(b"\n\n\r\n"):
            return None
        at = chunk.find(b"\r\n") + 2
        out = self._known(chunk, at, len(chunk) - 4)
        if out is None or len(out) == len(chunk):
            return out
        return b"%x\r\n%b" % (len(out) - at - 2, out[at:])

    def _known(self, data: bytes, at: int, end: int) -> bytes | None:
        """The data without the ids, if what lies there is a plain event: one like those before it, but for its text and
        its one token id. None, and nothing is changed, if it is anything else.

        Nearly all events of a stream are such. That they are is as sure as if their JSON were decoded."""
        before = self._before
        if before is None or self._is_unsettled or not data.startswith(before, at):
            return None
        plain = self._plain_end(data, at + len(before), end)
        if plain is None:
            return None
        if not data.isascii():
            try:
                data.decode()
            except UnicodeDecodeError:
                return None
        self._resumption.output_token_ids.append(int(plain[2]))
        if not self._strip:
            return data
        ids_at, end_at = plain.span(1)
        # If it can be, as long as the ids were, so that the size of a chunk stays right.
        return data[:ids_at] + _PADDED_NULLS[max(0, end_at - ids_at - 4)] + data[end_at:]

    def keep_end(self) -> None:
        """An engine that lets go of a request ends its part of the answer as if by length. So keep such an end back,
        and what comes after it, until it is known whose end it is: see `settle`."""
        self._keeps_end = True

    @property
    def has_kept_end(self) -> bool:
        return bool(self._kept)

    def settle(self, *, is_inner: bool) -> bytes:
        """What the client gets of an end that was kept: all of it, or, where it was the end of one engine's part, its
        token without the reason. Without such an end nothing. The next end is not kept."""
        kept, self._kept, self._keeps_end = self._kept, [], False
        if is_inner:
            kept = [_without_reason(event) for event in kept[:1]]
        try:
            return b"".join([self._take(event) for event in kept])
        except EngineError as error:
            self.broken = error.message
            return b""
        finally:
            self._note_unsettled()

    def _note_unsettled(self) -> None:
        resumption = self._resumption
        is_inside = self._held or self._held_ids or resumption.num_unsure
        self._is_unsettled = bool(is_inside or self._kept or resumption.has_finished)

    def end(self) -> None:
        """The connection ended in good order: the stream must have, too."""
        if not self.is_done or self._rest.strip():
            self.broken = self.broken or "the stream ended without [DONE]"

    def _take(self, event: bytes) -> bytes:
        if self._kept:
            self._kept.append(event)
            return b""
        if self.is_done:
            raise EngineError("more events came after the end of the stream")
        if event == _DONE:
            if not self._resumption.has_finished or self._resumption.owes_usage():
                raise EngineError("the stream ended before it was whole")
            self.is_done = True
            return event + b"\n\n"
        if not event.startswith(_DATA):
            raise EngineError(f"not an event of a stream: {event[:80]!r}")
        try:
            said = _decode(memoryview(event)[len(_DATA) :])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise EngineError(f"not an event of a stream: {error}: {event[:80]!r}") from None
        if said.error is not None:
            raise EngineError(f"the engine broke off: {said.error.message}")
        if not self._resumption.id:
            self._name(event)
        if said.choices is None:
            raise EngineError(f"an event without choices: {event[:80]!r}")
        if not said.choices:
            event = self._forward(event)
            self._resumption.has_usage = True
            return event
        return self._take_choice(event, said, said.choices[0])

    def _take_choice(self, event: bytes, said: _Event, choice: _Choice) -> bytes:
        resumption, delta = self._resumption, choice.delta
        if resumption.has_finished:
            raise EngineError("more tokens came after the reason for the end")
        if choice.finish_reason in ("abort", "error"):
            raise EngineError(f"the engine gave the request up ({choice.finish_reason})")
        if self._keeps_end and choice.finish_reason == "length":
            self._kept.append(event)
            return b""
        prompt = said.prompt_token_ids or choice.prompt_token_ids
        if prompt is not None:
            self._check_prompt(prompt)
        text = choice.text if delta is None else delta.content
        ids = choice.token_ids
        if ids is not None:
            if not self._is_checked:
                raise EngineError("the engine does not say what it goes on from")
            self._held_ids += ids
        elif text or choice.finish_reason:
            if self._goes_on:
                raise EngineError("the engine does not say the ids of its tokens")
            resumption.why_not = "the engine does not say the ids of its tokens"
        elif self._goes_on and delta is not None and delta.role is not None:
            return b""  # the role was said when the stream began
        if delta is not None and (delta.reasoning or delta.reasoning_content or delta.tool_calls):
            resumption.why_not = "part of the answer was made by a parser inside the engine"
            text = text or "made"
        if self._before is None and not self._goes_on and choice.finish_reason is None:
            plain = _frame_of(event)
            if plain is not None:
                self._before, self._plain_end = plain[1], _plain_end(plain[2], plain[4])
        event = self._forward(event)
        if not text and choice.finish_reason is None:
            self._held.append(event)
            return b""
        # Text that comes with one id is whole up to there; with several, the last may have brought none of it.
        is_sure = not resumption.num_unsure and len(ids or ()) <= 1
        resumption.num_unsure = 0 if len(ids or ()) == 1 or is_sure else resumption.num_unsure + len(self._held_ids)
        resumption.output_token_ids += self._held_ids
        resumption.has_finished = choice.finish_reason is not None
        self._held_ids.clear()
        if self._held:
            event = b"".join((*self._held, event))
            self._held.clear()
        return event

    def _check_prompt(self, prompt: list[int]) -> None:
        resumption = self._resumption
        if not self._goes_on:
            resumption.prompt_token_ids = prompt
        elif prompt == resumption.prompt():
            self._is_checked = True
            self._num_before = len(resumption.output_token_ids)
        else:
            raise EngineError("the engine does not go on from the token ids that it was given")

    def _name(self, event: bytes) -> None:
        named = _name(event[len(_DATA) :])
        self._resumption.id, self._resumption.created, self._resumption.model = named.id, named.created, named.model

    def _forward(self, event: bytes) -> bytes:
        """The event as the client would have had it, had nothing happened."""
        if self._goes_on:
            event = self._as_before(event)
        elif self._strip and b'token_ids":[' in event:
            event = _IDS.sub(rb"\1null", event)
        return event + b"\n\n"

    def _not_told_before(self, ids: list[int]) -> list[int]:
        told = self._resumption.told_before[: len(ids)]
        del self._resumption.told_before[: len(ids)]
        return ids[len(told) :] if ids[: len(told)] == told else ids

    def _as_before(self, event: bytes) -> bytes:
        resumption = self._resumption
        body: dict[str, Any] = msgspec.json.decode(event[len(_DATA) :])
        body.update(id=resumption.id, created=resumption.created, model=resumption.model)
        for choice in body["choices"]:
            if "prompt_token_ids" in choice:
                choice["prompt_token_ids"] = None
            if self._strip and "token_ids" in choice:
                choice["token_ids"] = None
            elif choice.get("token_ids") and resumption.told_before:
                choice["token_ids"] = self._not_told_before(choice["token_ids"])
        try:
            usage = body.get("usage")
            if usage:
                usage["prompt_tokens"] -= self._num_before
                usage["completion_tokens"] += self._num_before
        except (KeyError, TypeError):
            raise EngineError(f"a usage that counts no tokens: {event[:80]!r}") from None
        return _DATA + msgspec.json.encode(body)


def _without_reason(event: bytes) -> bytes:
    body: dict[str, Any] = msgspec.json.decode(event[len(_DATA) :])
    for choice in body["choices"]:
        choice["finish_reason"] = None
    return _DATA + msgspec.json.encode(body)
