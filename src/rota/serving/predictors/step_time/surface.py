"""Integer curves and surfaces over a grid that never fall along an axis, and stay that way between and beyond points.

All values are whole numbers and interpolation is exact (floor of a rational), so that two ways to the same number give
the same number.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate


def interpolated(at: Sequence[int], values: Sequence[int], x: int) -> int:
    """The value at `x` of the line through at least two points: flat below the first, straight on beyond the last."""
    if x <= at[0]:
        return values[0]
    right = min(bisect_right(at, x), len(at) - 1)
    low, value = at[right - 1], values[right - 1]
    return value + (values[right] - value) * (x - low) // (at[right] - low)


def run_along(
    at: Sequence[int], values: Sequence[int], first: int, step: int, num_steps: int, *, plus: int = 0
) -> list[int]:
    """`interpolated` at `first`, `first + step` and so on, `num_steps` of them, each with `plus` added; one search for
    each stretch between two points rather than for each of them."""
    times: list[int] = []
    x = first
    while len(times) < num_steps:
        if x <= at[0]:
            num_left = min(num_steps - len(times), (at[0] - x) // step + 1)
            times += [plus + values[0]] * num_left
            x += num_left * step
            continue
        right = min(bisect_right(at, x), len(at) - 1)
        low, width = at[right - 1], at[right] - at[right - 1]
        base, rise = values[right - 1], values[right] - values[right - 1]
        num_left = num_steps - len(times)
        if right < len(at) - 1:
            num_left = min(num_left, -(-(at[right] - x) // step))
        start, slope = rise * (x - low), rise * step
        base += plus
        times += [base + (start + index * slope) // width for index in range(num_left)]
        x += num_left * step
    return times


class Curve:
    """A function of one whole number through given points: straight between them, flat below, straight on beyond."""

    __slots__ = ("_at", "_values")

    def __init__(self, at: Sequence[int], values: Sequence[float], *, level: bool = True) -> None:
        """`at` rises. `values` may dip, and are smoothed (`_smoothed`) unless `level` is off."""
        flat = [round(value) for value in values]
        if level:
            flat = [row[0] for row in _smoothed([[value] for value in flat])]
        self._at, self._values = tuple(at), tuple(flat)
        if len(self._at) == 1:
            self._at, self._values = (*self._at, self._at[0] + 1), (*self._values, self._values[0])

    def __call__(self, x: int) -> int:
        return interpolated(self._at, self._values, x)


class Surface:
    """A function of two whole numbers on a grid: straight along columns, then along rows.

    Beyond the last column every row rises alike, by `beyond` per column unit, and beyond the last row every column
    rises alike, by `below` per row unit, so that rows and columns never cross. Ahead of the first row
    and column it is flat.
    """

    __slots__ = ("_cells", "_columns", "_rows")

    def __init__(
        self, rows: Sequence[int], columns: Sequence[int], cells: list[list[float]], *, below: float, beyond: float
    ) -> None:
        """`rows` and `columns` rise; `cells` is indexed by row, then column, and may dip; see `_smoothed`."""
        smooth = _smoothed([[round(cell) for cell in row] for row in cells])
        far = max(columns[-1] * 2, columns[-1] + 1)
        rise = max(0, round(beyond * (far - columns[-1])))
        smooth = [[*row, row[-1] + rise] for row in smooth]
        deep = max(rows[-1] * 2, rows[-1] + 1)
        drop = max(0, round(below * (deep - rows[-1])))
        smooth.append([cell + drop for cell in smooth[-1]])
        self._rows, self._columns = (*rows, deep), (*columns, far)
        self._cells = tuple(tuple(row) for row in smooth)

    @property
    def columns(self) -> tuple[int, ...]:
        """Where every row has its points."""
        return self._columns

    def row(self, x: int) -> tuple[int, ...]:
        """The values at `columns` of the row at `x`."""
        rows, cells = self._rows, self._cells
        if x <= rows[0]:
            return cells[0]
        right = min(bisect_right(rows, x), len(rows) - 1)
        low, span = rows[right - 1], rows[right] - rows[right - 1]
        return tuple(
            near + (deep - near) * (x - low) // span for near, deep in zip(cells[right - 1], cells[right], strict=True)
        )

    def __call__(self, x: int, y: int) -> int:
        rows, columns, cells = self._rows, self._columns, self._cells
        y = max(y, columns[0])
        right = min(bisect_right(columns, y), len(columns) - 1)
        left = right - 1
        step, width = y - columns[left], columns[right] - columns[left]
        if x <= rows[0]:
            row = cells[0]
            return row[left] + (row[right] - row[left]) * step // width
        under = min(bisect_right(rows, x), len(rows) - 1)
        upper, lower = cells[under - 1], cells[under]
        near = upper[left] + (upper[right] - upper[left]) * step // width
        deep = lower[left] + (lower[right] - lower[left]) * step // width
        return near + (deep - near) * (x - rows[under - 1]) // (rows[under] - rows[under - 1])


def _smoothed(cells: list[list[int]]) -> list[list[int]]:
    """The cells without dips: half way between the lowest surface that never falls and lies nowhere below them, and the
    highest that never falls and lies nowhere above them. Both never fall, so their mean does not; cells without dips
    stay as they are."""
    above = _running_max(cells)
    # The greatest function below is the running minimum from the far corner: turn, negate, and it is a running maximum.
    turned = [[-cell for cell in reversed(row)] for row in reversed(cells)]
    below = [[-cell for cell in reversed(row)] for row in reversed(_running_max(turned))]
    return [[(a + b) // 2 for a, b in zip(high, low, strict=True)] for high, low in zip(above, below, strict=True)]


def _running_max(cells: list[list[int]]) -> list[list[int]]:
    rows = [list(accumulate(row, max)) for row in cells]
    return list(accumulate(rows, lambda upper, row: [max(a, b) for a, b in zip(upper, row, strict=True)]))
