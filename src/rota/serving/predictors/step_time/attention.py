"""Attention of a step read off a table over four quantities, some of its points missing, none of its readings falling.

A batch that holds a prefill runs another kernel than decodes alone: in the tables at hand decodes take about twice as
long beside even a short prefill. So the two kinds are two tables, and nothing is interpolated between them.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rota.serving.predictors.step_time.layer_tables import AttentionPoint

Cells = NDArray[np.float64]


class DecodeAttention:
    """Attention of decodes alone in whole nanoseconds, by their number and the mean of their contexts.

    Straight between the points of the table along both; `row` is where it is cheap to ask for many contexts of as many
    decodes."""

    def __init__(self, points: Mapping[AttentionPoint, float]) -> None:
        """`points` are in nanoseconds; those with a prefill are left out."""
        alone = {(num, each): time for (chunk, _, num, each), time in points.items() if not chunk}
        axes = [_axis({point[axis] for point in alone}) for axis in (0, 1)]
        cells = np.full([len(axis) for axis in axes], np.nan)
        for (num, each), time in alone.items():
            cells[axes[0].index(num), axes[1].index(each)] = time
        self._numbers, self._means = axes
        self._cells: list[list[int]] = _whole(cells, (1, 0), axes)

    def row(self, num_decodes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sums of contexts at which there are points, and the times there: `interpolated` reads between them."""
        first, along, wide = _bracket(self._numbers, num_decodes)
        sums = tuple([mean * num_decodes for mean in self._means])
        near, far = self._cells[first], self._cells[first + 1]
        return sums, tuple([few + (many - few) * along // wide for few, many in zip(near, far, strict=True)])


class MixedAttention:
    """Attention of one prefill chunk and decodes of equal length, in whole nanoseconds.

    Straight between the points of the table along each of the four quantities; before the first point as there, beyond
    the last straight on. Points that lack, since they would not have fitted into memory or since another grid was used
    for other chunks, are filled in along the decodes' length, then along the tokens before the chunk, then by chunk.
    Dips of the measurement are levelled: each point lies half way between the lowest table without dips above all and
    the highest below all, which leaves points without dips as they are.
    """

    def __init__(self, points: Mapping[AttentionPoint, float]) -> None:
        """`points` are in nanoseconds; those of decodes alone are left out."""
        mixed = {point: time for point, time in points.items() if point[0]}
        axes = [_axis({point[axis] for point in mixed} | ({0} if axis else set())) for axis in range(4)]
        places = [{value: index for index, value in enumerate(axis)} for axis in axes]
        cells = np.full([len(axis) for axis in axes], np.nan)
        for (chunk, before, num, each), time in mixed.items():
            at = places[0][chunk], places[1][before], places[2][num]
            if num:
                cells[(*at, places[3][each])] = time
            else:
                cells[at] = time
        self._largest = axes[0][-1], axes[1][-1]
        self._axes = axes
        self._cells: list[list[list[list[int]]]] = _whole(cells, (3, 1, 0, 2), axes)

    def prefill(self, chunk: int, before: int) -> int:
        """Nanoseconds of a chunk of `chunk` tokens after `before` computed ones, without decodes. A chunk larger than
        the table's largest is so many of those, one after the other."""
        largest = self._largest[0]
        if chunk > largest:
            full, rest = divmod(chunk, largest)
            pieces = sum(self.prefill(largest, before + piece * largest) for piece in range(full))
            return pieces + (self.prefill(rest, before + full * largest) if rest else 0)
        (first, along, wide), (row, down, high) = (_bracket(self._axes[0], chunk), _bracket(self._axes[1], before))
        near, far = self._cells[first], self._cells[first + 1]
        upper = near[row][0][0] + (near[row + 1][0][0] - near[row][0][0]) * down // high
        lower = far[row][0][0] + (far[row + 1][0][0] - far[row][0][0]) * down // high
        return upper + (lower - upper) * along // wide

    def decodes_beside(self, chunk: int, before: int, num_decodes: int, each: int) -> int:
        """Nanoseconds by which `num_decodes` decodes over `each` tokens make such a chunk longer; at the edge of the
        table for larger chunks, since the difference of two lines that go on beyond it means nothing."""
        chunk, before = min(chunk, self._largest[0]), min(before, self._largest[1])
        return max(0, self(chunk, before, num_decodes, each) - self.prefill(chunk, before))

    def __call__(self, chunk: int, before: int, num_decodes: int, each: int) -> int:
        """Nanoseconds of such a chunk beside `num_decodes` decodes over `each` tokens."""
        (c, at_c, of_c), (b, at_b, of_b), (n, at_n, of_n), (e, at_e, of_e) = (
            _bracket(axis, value) for axis, value in zip(self._axes, (chunk, before, num_decodes, each), strict=True)
        )
        by_chunk = []
        for slab in (self._cells[c], self._cells[c + 1]):
            by_before = []
            for plane in (slab[b], slab[b + 1]):
                near, far = plane[n], plane[n + 1]
                few = near[e] + (near[e + 1] - near[e]) * at_e // of_e
                many = far[e] + (far[e + 1] - far[e]) * at_e // of_e
                by_before.append(few + (many - few) * at_n // of_n)
            by_chunk.append(by_before[0] + (by_before[1] - by_before[0]) * at_b // of_b)
        return by_chunk[0] + (by_chunk[1] - by_chunk[0]) * at_c // of_c


def _axis(values: set[int]) -> list[int]:
    """The values in order; at least two, since one has no line through it."""
    axis = sorted(values)
    return axis if len(axis) > 1 else [axis[0], axis[0] + 1]


def _whole(cells: Cells, order: Sequence[int], axes: Sequence[list[int]]) -> Any:
    """The cells without gaps, filled along the axes in `order`, and without dips, as nested lists of whole numbers.

    Each axis gets one point more, twice as far out as its last, to set how it goes on beyond: by its last slope, or by
    that of a line with less of the other quantities if that is steeper, so that lines do not cross out there."""
    for is_last in (False, True):
        for axis in order:
            # Only what no other axis can tell is taken to be as the first point that is known.
            cells = np.apply_along_axis(_filled, axis, cells, np.array(axes[axis], dtype=float), ahead=is_last)
    cells = _levelled(cells)
    for axis, at in enumerate(axes):
        last, before = np.take(cells, [-1], axis=axis), np.take(cells, [-2], axis=axis)
        rise = (last - before) * (at[-1] / (at[-1] - at[-2]))
        for other in range(cells.ndim):
            rise = np.maximum.accumulate(rise, axis=other)
        cells = np.concatenate([cells, last + rise], axis=axis)
        at.append(2 * at[-1])
    return cells.round().astype(np.int64).tolist()


def _bracket(at: Sequence[int], value: int) -> tuple[int, int, int]:
    """The point below `value`, how far beyond it `value` lies, and how far the next point lies."""
    if value <= at[0]:
        return 0, 0, 1
    left = min(bisect_right(at, value), len(at) - 1) - 1
    return left, value - at[left], at[left + 1] - at[left]


def _filled(line: Cells, at: Cells, ahead: bool) -> Cells:
    """A line without gaps: straight between known points, beyond the last straight on and, if `ahead`, before the first
    as there."""
    known = np.flatnonzero(~np.isnan(line))
    if len(known) in (0, len(line)):
        return line
    full = np.interp(at, at[known], line[known], left=line[known[0]] if ahead else np.nan)
    if len(known) > 1:
        last, before = known[-1], known[-2]
        slope = max(0.0, (line[last] - line[before]) / (at[last] - at[before]))
        beyond = at > at[last]
        full[beyond] = line[last] + slope * (at[beyond] - at[last])
    return full


def _levelled(cells: Cells) -> Cells:
    above, below = cells, cells
    for axis in range(cells.ndim):
        above = np.maximum.accumulate(above, axis=axis)
        below = np.flip(np.minimum.accumulate(np.flip(below, axis=axis), axis=axis), axis=axis)
    levelled: Cells = (above + below) / 2
    return levelled
