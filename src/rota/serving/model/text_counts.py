"""What may be noted of a prompt's text without keeping any of it: how much of what it has, nothing of what it says."""

from collections.abc import Sequence

TEXT_COUNTS = (
    "messages",
    "last_bytes",
    "last_lines",
    "last_words",
    "last_questions",
    "last_fences",
    "last_digits",
    "last_capitals",
    "last_symbols",
    "last_beyond_ascii",
    "answer_bytes",
    "answer_lines",
    "answer_fences",
)
"""Names of the counts, in order: messages of the chat (0 where it is none); of the last message bytes, lines, words,
question marks, fences of code, digits, capital letters, signs of programs, bytes beyond ASCII; of the answer before it
bytes, lines, fences."""

_DIGITS = b"0123456789"
_CAPITALS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SYMBOLS = b"{}();=<>"
_BEYOND_ASCII = bytes(range(128, 256))
_FENCE = b"```"


def text_counts(messages: Sequence[tuple[str, str]], *, is_chat: bool = True) -> tuple[int, ...]:
    """The counts of a prompt's messages, each a role and a text; none of no message. Costs the length of the last two,
    at the speed of C."""
    if not messages:
        return ()
    last = _encoded(messages[-1][1])
    answer = _encoded(next((text for role, text in reversed(messages[:-1]) if role == "assistant"), ""))
    return (
        len(messages) if is_chat else 0,
        len(last),
        last.count(b"\n"),
        len(last.split()),
        last.count(b"?"),
        last.count(_FENCE),
        _num_of(last, _DIGITS),
        _num_of(last, _CAPITALS),
        _num_of(last, _SYMBOLS),
        _num_of(last, _BEYOND_ASCII),
        len(answer),
        answer.count(b"\n"),
        answer.count(_FENCE),
    )


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _num_of(text: bytes, some: bytes) -> int:
    return len(text) - len(text.translate(None, some))
