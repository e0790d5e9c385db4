"""Step time from a table of steps, taken apart into three costs that add up and never fall."""

from collections.abc import Iterable, Mapping, Sequence

from rota.base.instant import NANOSECONDS_PER_MILLISECOND, Instant
from rota.serving.predictors.step_time.surface import Curve, Surface, interpolated, run_along
from rota.serving.predictors.step_time.table import StepRow, read_table

_MAX_ROWS_KEPT = 4096

Points = Sequence[tuple[int, float]]


class GridStepTime:
    """A mixed step costs `shared(tokens) + prefill(new tokens, work) + decode(sequences, context)`, each read off a
    table; a step of decodes only is read off the decode rows as they are.

    * `shared`: what all tokens share, the matrix products, by the number of tokens that the step computes in all.
    * `prefill`: attention of prefills, by their new tokens and their work, the number of pairs of a new token and one
      before it: `sum(new * (context + new / 2))`. In the tables attention is a straight line of that work whatever the
      prompt, so several prefills in a step simply add up their tokens and their work.
    * `decode`: attention of decodes and what each sequence costs beside, by the number of sequences and the sum of
      their contexts. Sequences of unlike contexts count as if they shared the sum evenly.

    How a mixed step adds up was chosen against the tables' mixed rows, none of which is used to fit, so that every one
    of them is left out. Mean and largest error over the 360 mixed rows of the shipped bfloat16 tables:

        shared products, attention of each kind added         1.3 %    8.3 %    (this one)
        prefill step + decode step - an empty step            5.9 %   27.6 %
        the slower of prefill step and decode step           16.3 %   46.8 %

    Tables that lack the tile jumps (512 and 513 tokens) do worse there: up to 19 %. So do 8-bit ones, whose kernels
    jump more: 18 %.

    Times are whole nanoseconds. Kernels jitter, so tables dip where a little more work is a little faster; dips are
    levelled (`surface._smoothed`), after which more work never takes less time. Beyond the table it goes straight on.
    """

    def __init__(self, *, table: str) -> None:
        """`table` is the name of a shipped table or the path of a CSV file. Raises `ConfigError` for a name that is not
        known and `DataError` for a file that is no table."""
        self._build(read_table(table))

    def _build(self, rows: Iterable[StepRow]) -> None:
        prefills: dict[int, dict[int, float]] = {}
        decodes: dict[int, dict[int, float]] = {}
        for row in rows:
            time = row.latency_ms * NANOSECONDS_PER_MILLISECOND
            if row.phase == "prefill":
                half_work = row.num_prefills * row.new_tokens * (2 * row.prefix_tokens + row.new_tokens)
                prefills.setdefault(row.num_prefills * row.new_tokens, {})[half_work] = time
            elif row.phase == "decode":
                decodes.setdefault(row.num_decodes, {})[row.num_decodes * row.decode_kv] = time
        prefill_rows, decode_rows = _sorted_rows(prefills), _sorted_rows(decodes)
        prefill_floor = {tokens: _at_zero(points) for tokens, points in prefill_rows.items()}
        decode_floor = {num: _at_zero(points) for num, points in decode_rows.items()}
        products = Curve(list(prefill_floor), list(prefill_floor.values()))
        # A prefill step of few tokens is slower than the decode step of as many: its kernels cost that more to start.
        start = max(0.0, *(products(num) - time for num, time in decode_floor.items()))
        start = min(start, 0.9 * min(prefill_floor.values()))
        self._shared = Curve(list(prefill_floor), [time - start for time in prefill_floor.values()])
        self._prefill = _surface(prefill_rows, {tokens: time - start for tokens, time in prefill_floor.items()})
        self._decode = _surface(decode_rows, {num: float(self._shared(num)) for num in decode_rows})
        self._decode_only = _surface(decode_rows, dict.fromkeys(decode_rows, 0.0))
        self._decode_rows: dict[int, tuple[int, ...]] = {}

    def step_time(
        self, *, prefills: Sequence[tuple[int, int]], num_decodes: int, decode_kv_tokens: int, now: Instant = Instant(0)
    ) -> int:
        """Nanoseconds for one step; 0 for an empty one."""
        if not prefills:
            if not num_decodes:
                return 0
            values = self._decode_rows.get(num_decodes) or self._decode_row(num_decodes)
            return interpolated(self._decode_only.columns, values, decode_kv_tokens)
        num_tokens = half_work = 0
        for new_tokens, context_tokens in prefills:
            num_tokens += new_tokens
            half_work += new_tokens * (2 * context_tokens + new_tokens)
        time = self._shared(num_tokens + num_decodes) + self._prefill(num_tokens, half_work)
        if not num_decodes:
            return time
        # Levelling the decodes' excess may lower it below what a step of decodes alone takes; a prefill makes no step
        # shorter.
        values = self._decode_rows.get(num_decodes) or self._decode_row(num_decodes)
        alone = interpolated(self._decode_only.columns, values, decode_kv_tokens)
        return max(alone, time + self._decode(num_decodes, decode_kv_tokens))

    def decode_run(self, num_decodes: int, decode_kv_tokens: int, num_steps: int) -> list[int]:
        """Nanoseconds of each of `num_steps` decode-only steps in a row; see `DecodeRunPredictor`."""
        if not num_decodes:
            return [0] * num_steps
        values = self._decode_rows.get(num_decodes) or self._decode_row(num_decodes)
        return run_along(self._decode_only.columns, values, decode_kv_tokens, num_decodes, num_steps)

    def _decode_row(self, num_decodes: int) -> tuple[int, ...]:
        """Times of a decode-only step at the columns of its surface, kept for the next call."""
        if len(self._decode_rows) >= _MAX_ROWS_KEPT:
            self._decode_rows.clear()
        row = self._decode_rows[num_decodes] = self._decode_only.row(num_decodes)
        return row


def _sorted_rows(cells: Mapping[int, Mapping[int, float]]) -> dict[int, Points]:
    return {key: sorted(cells[key].items()) for key in sorted(cells)}


def _slope(points: Points) -> float:
    """Rise per unit over the whole row; 0 where the row is one point or falls."""
    (first, low), (last, high) = points[0], points[-1]
    return max(0.0, (high - low) / (last - first)) if last > first else 0.0


def _at_zero(points: Points) -> float:
    """A row carried on to where its second quantity is zero, by its slope as a whole: single steps jitter too much."""
    first, time = points[0]
    return max(time - _slope(points) * first, 0.5 * time)


def _surface(rows: Mapping[int, Points], floor: Mapping[int, float]) -> Surface:
    """What the rows cost above `floor`, on a grid of every column that any of them has.

    Where a row has no point so far out, it rises as the next row does, which has.
    """
    columns = sorted({0}.union(*({at for at, _ in points} for points in rows.values())))
    keys = list(rows)
    cells: dict[int, list[float]] = {}
    following: list[float] | None = None
    for key in reversed(keys):
        cells[key] = following = _filled(columns, rows[key], floor[key], following)
    bottom, above = keys[-1], keys[len(keys) // 2]
    per_row = (cells[bottom][0] - cells[above][0]) / (bottom - above) if bottom > above else 0.0
    grid = [cells[key] for key in keys]
    return Surface(keys, columns, grid, below=max(0.0, per_row), beyond=_slope(rows[bottom]))


def _filled(columns: Sequence[int], points: Points, floor: float, following: list[float] | None) -> list[float]:
    known = [(0, _at_zero(points)), *(point for point in points if point[0] > 0)]
    slope = _slope(points)
    cells: list[float] = []
    segment = 0
    for index, column in enumerate(columns):
        while segment < len(known) - 1 and known[segment + 1][0] < column:
            segment += 1
        if column <= known[-1][0]:
            (low, before), (high, after) = known[segment], known[min(segment + 1, len(known) - 1)]
            share = (column - low) / (high - low) if high > low else 0.0
            cells.append(max(0.0, before + (after - before) * share - floor))
        elif following is None:
            cells.append(cells[-1] + slope * (column - columns[index - 1]))
        else:
            cells.append(cells[-1] + max(0.0, following[index] - following[index - 1]))
    return cells
