"""Chunks of HTTP/1.1 (RFC 9112, 7.1), recognised without a parser: what is whole can be passed on as it came."""

import re

_HEAD = re.compile(rb"([0-9a-fA-F]{1,8})\r\n")
_PREFIX_BYTES = 5
"""Enough for the size and line end of a chunk of less than 4 KiB, which nearly every event of a stream is."""
_NUM_KNOWN_MAX = 8192
_num_bytes_of: dict[bytes, int] = {}
"""Length of a chunk, framing included, by its first bytes; as many as were met, bounded."""


def are_whole_chunks(data: bytes) -> bool:
    """Whether `data` (not empty), which begins where a chunk begins, is whole chunks with something in them, no more.

    False for whatever is unusual, so that a parser has to look: the last chunk, extensions, a chunk cut in two.
    """
    at, end = 0, len(data)
    if _num_bytes_of.get(data[:_PREFIX_BYTES]) == end:  # One chunk of a known size, most of the time.
        return data.endswith(b"\r\n")
    while at < end:
        num_bytes = _num_bytes_of.get(data[at : at + _PREFIX_BYTES]) or _num_bytes_at(data, at)
        at += num_bytes
        if not num_bytes or not data.startswith(b"\r\n", at - 2):
            return False
    return True


def _num_bytes_at(data: bytes, at: int) -> int:
    """Length of the chunk that begins there; 0 if that is unusual."""
    head = _HEAD.match(data, at)  # `int` alone would take signs, blanks and underscores.
    if head is None or (size := int(head[1], 16)) == 0:
        return 0
    num_bytes = len(head[0]) + size + 2
    if len(head[0]) <= _PREFIX_BYTES and len(_num_bytes_of) < _NUM_KNOWN_MAX:
        _num_bytes_of[data[at : at + _PREFIX_BYTES]] = num_bytes
    return num_bytes
