"""Chunks of HTTP/1.1 (RFC 9112, 7.1), recognised without a parser: what is whole can be passed on as it came."""

import re

_HEAD = re.compile(rb"([0-9a-fA-F]{1,8})\r\n")
_PREFIX_BYTES = 5
"""Enough for the size and line end of a chunk of less than 4 KiB, which nearly every event of a stream is."""
_NUM_KNOWN_MAX = 8192
_num_bytes_of: dict[bytes, int] = {}
"""Length of a chunk, framing included, by its first bytes; as many as were met, bounded."""


def are_whole_chunks(data: bytes) -> bool:
    """Whether `data`, which begins where a chunk begins, is one or more whole chunks with data and nothing else.

    False for whatever is unusual, so that a parser has to look: the last chunk, extensions, a chunk cut in two.
    """
    if _num_bytes_of.get(data[:_PREFIX_BYTES]) == len(data):
        return data.endswith(b"\r\n")
    at, end = 0, len(data)
    while at < end:
        head = _HEAD.match(data, at)  # `int` alone would take signs, blanks and underscores.
        if head is None or (size := int(head[1], 16)) == 0:
            return False
        num_bytes = len(head[0]) + size + 2
        if len(head[0]) <= _PREFIX_BYTES and len(_num_bytes_of) < _NUM_KNOWN_MAX:
            _num_bytes_of[data[at : at + _PREFIX_BYTES]] = num_bytes
        at += num_bytes
        if not data.startswith(b"\r\n", at - 2):
            return False
    return at == end
