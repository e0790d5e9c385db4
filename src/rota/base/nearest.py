"""Names that were probably meant: the hint that every "unknown name" error gives."""

import difflib
from collections.abc import Iterable

MAX_NAMES_LISTED = 20


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """One sentence that names the nearest of `known`, or lists them (at most 20) when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    if not names:
        return "there are none to choose from"
    more = f", and {len(names) - MAX_NAMES_LISTED} more" if len(names) > MAX_NAMES_LISTED else ""
    return f"known: {', '.join(names[:MAX_NAMES_LISTED])}{more}"
