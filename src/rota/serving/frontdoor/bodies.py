"""Which request bodies are understood: the fields that the router itself needs or knows, checked; all others pass
untouched.

The engine gets the client's own bytes. What is read here is for deciding only, so a field that the router does not know
is the engine's business.
"""

import re
from typing import Annotated, Any, Literal

import msgspec

from rota.serving.frontdoor.problems import Problem

_INT_MAX = 2**31 - 1
# JSON has no integers of its own: 5.0 is one, for its schemas and for the engines.
_Integral = Annotated[float, msgspec.Meta(multiple_of=1)]
_Count = (
    Annotated[int, msgspec.Meta(ge=1, le=_INT_MAX)] | Annotated[float, msgspec.Meta(multiple_of=1, ge=1, le=_INT_MAX)]
)
_Priority = (
    Annotated[int, msgspec.Meta(ge=-_INT_MAX, le=_INT_MAX)]
    | Annotated[float, msgspec.Meta(multiple_of=1, ge=-_INT_MAX, le=_INT_MAX)]
)
_Choices = Annotated[int, msgspec.Meta(ge=1, le=1024)] | Annotated[float, msgspec.Meta(multiple_of=1, ge=1, le=1024)]
_Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
_Name = Annotated[str, msgspec.Meta(max_length=256)]
_Shown = Annotated[str, msgspec.Meta(max_length=256, pattern=r"^[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?$")]
"""A name that people are shown, in terminals too: as in the headers, printable ASCII."""


class ContentPart(msgspec.Struct):
    """One part of a message: text, or a medium whose size in tokens cannot be known here."""

    type: str
    text: str | None = None


class Message(msgspec.Struct):
    """One message of a chat."""

    role: str
    content: str | list[ContentPart] | None = None


class AgenticContext(msgspec.Struct):
    """What an agent says about the program that a request belongs to."""

    program_id: _Name | None = None


class ExtraArguments(msgspec.Struct):
    """vLLM's free arguments, as far as the router reads them."""

    tenant: _Shown | None = None
    session_id: _Name | None = None
    agentic_context: AgenticContext | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Body(msgspec.Struct, kw_only=True):
    """What chat and text completions have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: _Count | None = None
    n: _Choices | None = None
    stop: str | list[str] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    seed: int | _Integral | None = None
    user: str | None = None
    priority: _Priority | None = None
    session_id: _Name | None = None
    cache_salt: str | None = None
    vllm_xargs: ExtraArguments | msgspec.UnsetType | None = msgspec.UNSET


class ChatBody(Body, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: msgspec.Raw
    max_completion_tokens: _Count | None = None
    tools: msgspec.Raw = msgspec.Raw()


class CompletionBody(Body, kw_only=True):
    """`POST /v1/completions`."""

    prompt: msgspec.Raw


class MoveBody(msgspec.Struct, forbid_unknown_fields=True):
    """Where a running request is to go on, and how: both as its engines can, if it is not said."""

    destination: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    way: Literal["hand_off", "replay"] | None = None


Prompt = str | list[str] | list[int | float] | list[list[int | float]]

_chat = msgspec.json.Decoder(ChatBody).decode
_completion = msgspec.json.Decoder(CompletionBody).decode
_move = msgspec.json.Decoder(MoveBody).decode
_messages = msgspec.json.Decoder(Annotated[list[Message], msgspec.Meta(min_length=1)]).decode
_text_prompt = msgspec.json.Decoder(str).decode
_list_prompt = msgspec.json.Decoder(list[str | int | _Integral | list[int | _Integral]]).decode

_AT = re.compile(r" - at `\$?(.*)`$")
_MISSING = re.compile(r"required field `([^`]+)`")
_BYTE = re.compile(r"\(byte (\d+)\)")


def read_chat(raw: bytes) -> tuple[ChatBody, list[Message]]:
    """The body of a chat completion. Raises `Problem` (400) that names the field."""
    body: ChatBody = _decoded(_chat, raw)
    return body, _decoded(_messages, body.messages, "messages")


def read_completion(raw: bytes) -> tuple[CompletionBody, Prompt]:
    """The body of a text completion. Raises `Problem` (400) that names the field."""
    body: CompletionBody = _decoded(_completion, raw)
    if not bytes(body.prompt).startswith(b"["):
        return body, _decoded(_text_prompt, body.prompt, "prompt")
    items: list[Any] = _decoded(_list_prompt, body.prompt, "prompt")
    if not items:
        raise Problem(400, "prompt must not be an empty array", param="prompt")
    kinds = {type(item) for item in items} - {float}
    if len(kinds) > 1 or (kinds & {str, list} and any(isinstance(item, float) for item in items)):
        raise Problem(400, "prompt mixes strings, token ids and arrays; it must hold one kind", param="prompt")
    return body, items


def read_move(raw: bytes) -> MoveBody:
    """The body of an order to move a request. Raises `Problem` (400) that names the field."""
    check_encoding(raw)
    body: MoveBody = _decoded(_move, raw)
    return body


def _decoded(decode: Any, raw: Any, prefix: str = "") -> Any:
    try:
        return decode(raw)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), prefix) from None
    except msgspec.DecodeError as error:
        raise _malformed(str(error), bytes(raw), prefix) from None
    except UnicodeDecodeError as error:
        raise _not_utf8(bytes(raw), error) from None
    except RecursionError:
        raise Problem(400, "the JSON body is nested too deeply", param=prefix or None, code="json_too_deep") from None


def check_encoding(raw: bytes) -> None:
    """Raise `Problem` unless the body is there, and is UTF-8."""
    if not raw:
        raise Problem(400, "the request has no body; a JSON object was expected", code="missing_body")
    if not raw.isascii():
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(raw, error) from None


def _invalid(text: str, prefix: str) -> Problem:
    at = _AT.search(text)
    path = prefix + (at.group(1) if at else "")
    missing = _MISSING.search(text)
    if missing:
        path = f"{path}.{missing.group(1)}"
    path = path.lstrip(".")
    message = _AT.sub("", text).replace("Expected `float` that's a multiple of 1.0", "Expected a whole number")
    return Problem(400, f"{path}: {message}" if path else message, param=path or None, code="invalid_type")


def _malformed(text: str, raw: bytes, prefix: str) -> Problem:
    found = _BYTE.search(text)
    offset = min(int(found.group(1)), len(raw)) if found else len(raw)
    line = raw.count(b"\n", 0, offset) + 1
    column = offset - (raw.rfind(b"\n", 0, offset) + 1) + 1
    what = _BYTE.sub("", text).removeprefix("JSON is malformed: ").strip()
    where = f"{prefix} is not valid JSON" if prefix else "the body is not valid JSON"
    return Problem(400, f"{where}: line {line}, column {column}: {what}", param=prefix or None, code="malformed_json")


def _not_utf8(raw: bytes, error: UnicodeDecodeError) -> Problem:
    line = raw.count(b"\n", 0, error.start) + 1
    column = error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1
    return Problem(400, f"the body is not UTF-8: line {line}, column {column}", code="malformed_json")
