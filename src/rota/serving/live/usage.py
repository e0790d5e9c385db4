"""How many tokens an answer says it produced, and whether a stream says that it is whole. Reads the few bytes that say
so, and nothing else of an answer."""

import re

import msgspec

_FRAMING = re.compile(rb"\r\n[0-9a-fA-F]{1,8}\r\n")
_DONE = re.compile(rb"data: ?\[DONE\]")


class _Usage(msgspec.Struct):
    completion_tokens: int | None = None


class _Answer(msgspec.Struct):
    usage: _Usage | None = None


_decode = msgspec.json.Decoder(_Answer).decode


def num_output_tokens(answer: bytes) -> int | None:
    """`usage.completion_tokens` of a whole answer, or None where it does not say."""
    try:
        usage = _decode(answer).usage
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return usage.completion_tokens if usage else None


def num_streamed_tokens(data: bytes) -> int | None:
    """The same from the last event in `data` that says so, with or without the framing of HTTP/1.1 chunks. An event
    that was cut in two by the network is not found."""
    for event in reversed(data.replace(b"\r\n", b"\n").split(b"\n\n")):
        _, found, text = event.partition(b"data:")
        if found and b'"usage"' in text:
            num_tokens = num_output_tokens(text)
            if num_tokens is not None:
                return num_tokens
    return None


def says_done(data: bytes) -> bool:
    """Whether `[DONE]` is in the last that came of a stream, with or without the framing of HTTP/1.1 chunks."""
    return _DONE.search(_FRAMING.sub(b"", data)) is not None
