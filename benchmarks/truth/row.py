"""One line of the table of truth, and where the data of the truth lie."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rota.base.errors import DataError

Verdict = Literal["holds", "missed", "shown"]

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class TruthRow:
    """One quantity, as it is in truth and as Rota says it is."""

    group: str
    """Where the truth comes from; the name of the module that made the row."""
    case: str
    """What was run."""
    quantity: str
    unit: str
    truth: float | None
    """None where the row sums up others, as a median of errors does."""
    rota: float | None
    error: float | None
    """Signed, as a fraction of the truth; None for a row that is only shown."""
    bound: float | None
    """Largest error that may be, either way, as a fraction; None for a row that promises nothing."""
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        """Whether the row keeps its bound; an error that is not a number does not."""
        if self.bound is None:
            return "shown"
        if self.error is None or math.isnan(self.error) or abs(self.error) > self.bound:
            return "missed"
        return "holds"


def relative_error(rota: float, truth: float) -> float:
    """Signed error as a fraction of the truth; where the truth is 0, anything else is infinitely wrong."""
    if truth == 0:
        return 0.0 if rota == 0 else math.inf
    return rota / truth - 1.0


def compared(
    group: str,
    case: str,
    quantity: str,
    unit: str,
    *,
    truth: float,
    rota: float,
    bound: float | None = None,
    note: str = "",
) -> TruthRow:
    """The row of one quantity whose error is plain: what Rota says over what is true, less one."""
    return TruthRow(group, case, quantity, unit, truth, rota, relative_error(rota, truth), bound, note)


def data(*parts: str) -> Path:
    """A file or folder of the truth, under `ROTA_DATA` or else beside the repository. Raises `DataError` if it is not
    there."""
    root = Path(os.environ.get("ROTA_DATA") or REPOSITORY.parent / "shared")
    path = root.joinpath(*parts)
    if not path.exists():
        raise DataError(
            f"{path}: not found, and without it there is nothing to compare with",
            hint="set ROTA_DATA to the folder that holds truth/, traces/ and profiles/",
        )
    return path
