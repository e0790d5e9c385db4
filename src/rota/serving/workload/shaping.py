"""Less of a trace, more of it, or a part of it. Conversations and programs stay whole in all of it.

A *unit* is what is kept or left as one: all rows of a session, or an open row with those that wait for it.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from math import ceil

import msgspec

from rota.base.errors import ConfigError
from rota.base.instant import Duration
from rota.base.random_streams import RandomStreams
from rota.serving.workload.arrivals import MAX_HASH_BLOCK_TOKENS, MAX_TOKENS, Arrival
from rota.serving.workload.sorting import groups, in_order, shifted

Trace = Callable[[], Iterable[Arrival]]
"""Reads a trace from its beginning, as often as it is called."""

ENGINE_BLOCK_TOKENS = 16


def sample_share(arrivals: Iterable[Arrival], share: float, seed: int) -> Iterator[Arrival]:
    """Each unit with probability `share`, whatever else is in the trace: a thinner trace of the same span."""
    if not 0 < share <= 1:
        raise ConfigError(f"a share must be above 0 and at most 1, not {share:g}")
    return _kept(arrivals, seed, lambda place: place < share)


def sample_rows(trace: Trace, num_rows: int, seed: int) -> Iterator[Arrival]:
    """Units at random until there are `num_rows` rows; the last may bring some more. Reads the trace twice."""
    places, sizes = array("d"), array("q")
    known: dict[str, int] = {}
    for place, session, group in _placed(trace(), seed):
        index = len(places) if session is None else known.setdefault(session, len(places))
        if index == len(places):
            places.append(place)
            sizes.append(0)
        sizes[index] += len(group)
    last, so_far = 0.0, 0
    for index in sorted(range(len(places)), key=places.__getitem__):
        if so_far >= num_rows:
            break
        last = places[index]
        so_far += sizes[index]
    return _kept(trace(), seed, lambda place: place <= last)


def split_in_time(arrivals: Iterable[Arrival], at: int, *, is_first: bool) -> Iterator[Arrival]:
    """The units that begin before `at`, or the others; the part begins at 0. A session belongs to the part in which its
    first row lies, wherever the others do."""
    homes: dict[str, bool] = {}
    start: int | None = None
    for group in groups(arrivals):
        session = group[0].session
        is_before = group[0].at < at
        if session is not None:
            is_before = homes.setdefault(session, is_before)
        if is_before == is_first:
            start = group[0].at if start is None else start
            yield from shifted(group, -start)


def split_at_random(arrivals: Iterable[Arrival], share: float, seed: int, *, is_first: bool) -> Iterator[Arrival]:
    """A unit is in the first part with probability `share`, else in the other. Instants stay as they are."""
    return _kept(arrivals, seed, lambda place: (place < share) == is_first)


def superpose(trace: Trace, factor: float, seed: int) -> Iterator[Arrival]:
    """`factor` times as many open rows a second, by laying copies of the trace over each other; a fraction is a copy
    thinned to it. Every copy but the first begins at a random moment and goes round, so that bursts do not coincide,
    and has sessions, programs and prefixes of its own."""
    if factor < 1:
        raise ConfigError(f"to superpose, the factor must be at least 1, not {factor:g}", hint="thin it instead")
    num_copies = ceil(factor)
    if num_copies > 1000:
        raise ConfigError(f"a factor of {factor:g} would lay {num_copies} copies over each other; at most 1,000")
    span = 1 + max((arrival.at for arrival in trace() if not arrival.after), default=0)
    stream = RandomStreams(seed).stream("workload.superpose")
    offsets = [0] + [stream.integers(0, span) for _ in range(num_copies - 1)]

    def copies() -> Iterator[Arrival]:
        for copy, offset in enumerate(offsets):
            share = min(1.0, factor - copy)
            rows = trace() if share == 1.0 else sample_share(trace(), share, seed)
            for group in groups(rows):
                moved = (group[0].at + offset) % span - group[0].at
                yield from (_own(arrival, copy, num_copies) for arrival in shifted(group, moved))

    return in_order(copies())


def scale_lengths(arrivals: Iterable[Arrival], prompt: float = 1.0, output: float = 1.0) -> Iterator[Arrival]:
    """Prompts and outputs so many times as long, each at least 1 token. The share of a prompt that is shared stays what
    it is: a block of the prefixes grows with the prompt.

    Raises `ConfigError` where such a block would no longer be made of an engine's blocks of 16 tokens.
    """
    for name, factor in (("prompt", prompt), ("output", output)):
        if not 0 < factor < float("inf"):
            raise ConfigError(f"the factor of {name} lengths must be a positive number, not {factor:g}")
    for arrival in arrivals:
        block = arrival.hash_block_tokens
        if arrival.prefix_hashes and prompt != 1.0:
            block = round(block * prompt)
            if (
                block * 1.0 != arrival.hash_block_tokens * prompt
                or block % ENGINE_BLOCK_TOKENS
                or block > MAX_HASH_BLOCK_TOKENS
            ):
                raise ConfigError(
                    f"prompts cannot be {prompt:g} times as long: prefix blocks of {arrival.hash_block_tokens} tokens "
                    f"would become ones of {arrival.hash_block_tokens * prompt:g}",
                    hint=f"{ENGINE_BLOCK_TOKENS} must divide the new size, and it be at most {MAX_HASH_BLOCK_TOKENS}",
                )
        num_prompt_tokens = _scaled(arrival.num_prompt_tokens, prompt)
        yield msgspec.structs.replace(
            arrival,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=_scaled(arrival.num_output_tokens, output),
            prefix_hashes=arrival.prefix_hashes[: -(-num_prompt_tokens // block)],
            hash_block_tokens=block,
        )


def _scaled(num_tokens: int, factor: float) -> int:
    return min(MAX_TOKENS, max(1, round(num_tokens * factor)))


def _own(arrival: Arrival, copy: int, num_copies: int) -> Arrival:
    """The arrival with names that no other copy has."""
    hashes = tuple(h * num_copies + copy for h in arrival.prefix_hashes)
    if not copy:
        return msgspec.structs.replace(arrival, prefix_hashes=hashes)
    session, program = (name if name is None else f"{name}#{copy}" for name in (arrival.session, arrival.program))
    return msgspec.structs.replace(arrival, prefix_hashes=hashes, session=session, program=program)


def _placed(arrivals: Iterable[Arrival], seed: int) -> Iterator[tuple[float, str | None, list[Arrival]]]:
    """Each group of rows, its session, and a place in [0, 1) that is the same for all rows of a unit."""
    for number, group in enumerate(groups(arrivals)):
        session = group[0].session
        key = f"{seed}/{number}" if session is None else f"{seed}/session/{session}"
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        yield (int.from_bytes(digest, "big") >> 11) / 2**53, session, group


def _kept(arrivals: Iterable[Arrival], seed: int, is_kept: Callable[[float], bool]) -> Iterator[Arrival]:
    for place, _, group in _placed(arrivals, seed):
        if is_kept(place):
            yield from group


def moved_to_start(arrivals: Iterable[Arrival]) -> Iterator[Arrival]:
    """The same rows, the first of which lies at 0."""
    start: int | None = None
    for arrival in arrivals:
        start = arrival.at if start is None else start
        yield msgspec.structs.replace(arrival, at=Duration(arrival.at - start)) if start else arrival
