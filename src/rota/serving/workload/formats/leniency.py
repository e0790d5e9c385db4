"""What a reader may be asked to let pass. Nothing passes unasked, and what passed is counted."""

from collections.abc import Mapping
from typing import Literal

import msgspec

SORT_HINT = "rota trace convert --sort puts the rows in order"
ZERO_HINT = "rota trace convert --zero one reads it as 1, --zero skip leaves such rows out and says how many"
UNFINISHED_HINT = "rota trace convert --skip-unfinished leaves such requests out and says how many"

Zero = Literal["refuse", "one", "skip"]
"""What becomes of a row with a length of 0, which no request can have: an error, a length of 1, or no row."""


class Leniency(msgspec.Struct, frozen=True):
    """What a reader is to let pass."""

    zero: Zero | None = None
    """None is what the format is used to, which is `refuse` for most."""
    is_unsorted: bool = False
    """Rows may go back in time, also before the first one; who reads them sorts them (`workload.sorting`)."""
    skip_unfinished: bool = False
    """Requests of a journal that never ended with a known length are left out."""


STRICT = Leniency()


class Tally:
    """How many rows were not taken as they are."""

    def __init__(self) -> None:
        self.num_skipped = 0
        self.num_raised = 0
        self.num_without_requests = 0

    @property
    def counts(self) -> Mapping[str, int]:
        """By what was done to them; rows that nothing was done to are not counted."""
        counts = {
            "rows left out": self.num_skipped,
            "rows with a length of 0 read as 1": self.num_raised,
            "conversations without an answered prompt": self.num_without_requests,
        }
        return {what: count for what, count in counts.items() if count}

    def settled(self, prompt: int, output: int, zero: Zero) -> tuple[int, int] | None:
        """The lengths of a row of which one is 0; None if the row is to be left out."""
        if zero == "skip":
            self.num_skipped += 1
            return None
        self.num_raised += 1
        return max(1, prompt), max(1, output)
