"""Step time from measurements of prompts and of tokens apart, as Splitwise published them (`perf_model.csv`)."""

import csv
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

from rota.base.errors import ConfigError, DataError
from rota.base.instant import NANOSECONDS_PER_MILLISECOND, Instant
from rota.base.nearest import did_you_mean
from rota.serving.predictors.step_time.surface import Curve

_COLUMNS = ("model", "hardware", "prompt_size", "batch_size", "prompt_time", "token_time", "tensor_parallel")
_KNEE_TOKENS = 2048
"""Prompt tokens up to which the published prompt times are near a straight line; beyond, attention shows."""


class PhasesStepTime:
    """Prompts cost by the tokens of the step, decodes by how many there are, and a step of both a tenth more than
    prompts of as many tokens.

    * Prompts: the median measured time by prompt tokens in the batch, straight between points. A chunk on top of a
      context costs beyond that what a prompt of both would cost beyond a straight line, less what it would by itself:
      so the chunks of a prompt take together what the whole prompt was measured to take.
    * Decodes: the median time of a token by sequences in the batch (measured with prompts of 512 tokens). How long
      their contexts are costs nothing: in the file it makes a difference of 6 % at most.
    * Both: `1.1 *` the time of a prompt of all the tokens, as Splitwise's simulator has it.

    That simulator looks the time of decodes up by their number on an axis of prompt tokens, which is to say that a
    batch of 64 takes as long as one of 1; here it is looked up by sequences, as it was measured.
    """

    def __init__(self, *, table: str, model: str, hardware: str, tensor_parallel: int = 8) -> None:
        """`table` is the path of the CSV file; the others name rows of it. Raises `DataError` for a file that is no
        such table, and `ConfigError` for what it has no rows of."""
        prompts, alone, tokens = _read(table, model, hardware, tensor_parallel)
        self._prompt = Curve(list(prompts), list(prompts.values()))
        self._token = Curve(list(tokens), list(tokens.values()))
        self._bends = _bends(alone)

    def step_time(
        self, *, prefills: Sequence[tuple[int, int]], num_decodes: int, decode_kv_tokens: int, now: Instant = Instant(0)
    ) -> int:
        """Nanoseconds for one step; 0 for an empty one."""
        time = self._token(num_decodes) if num_decodes else 0
        if not prefills:
            return time
        num_tokens, extra = num_decodes, 0
        for new_tokens, context_tokens in prefills:
            num_tokens += new_tokens
            if context_tokens:
                extra += self._bend(context_tokens + new_tokens) - self._bend(context_tokens) - self._bend(new_tokens)
        together = self._prompt(num_tokens) + extra
        return max(time, together * 11 // 10) if num_decodes else together

    def decode_run(self, num_decodes: int, decode_kv_tokens: int, num_steps: int) -> list[int]:
        """Nanoseconds of each of `num_steps` decode-only steps in a row; see `DecodeRunPredictor`."""
        return [self._token(num_decodes) if num_decodes else 0] * num_steps

    def _bend(self, num_tokens: int) -> int:
        """What a prompt of so many tokens costs beyond the straight line through zero and the knee."""
        return sum((num_tokens - at) * rise for at, rise in self._bends if num_tokens > at)


def _bends(alone: Mapping[int, float]) -> list[tuple[int, int]]:
    """Where the time of a prompt that is alone turns upwards from the knee on, and by how many nanoseconds a token
    more; where it turns down again, which is a dip of the measurement, it goes straight on."""
    at = [0] + [size for size in alone if size >= _KNEE_TOKENS]
    slope, bends = None, []
    for low, high in pairwise(at):
        rise = round((alone[high] - (alone[low] if low else 0.0)) / (high - low))
        if slope is not None and rise > slope:
            bends.append((low, rise - slope))
        slope = rise if slope is None else max(slope, rise)
    return bends


def _read(
    table: str, model: str, hardware: str, tensor_parallel: int
) -> tuple[Mapping[int, float], Mapping[int, float], Mapping[int, float]]:
    """Median nanoseconds of prompts by tokens of the batch, of those that were alone in it by theirs, and of a token
    by the sequences of the batch."""
    try:
        with Path(table).open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            missing = sorted(set(_COLUMNS) - set(rows.fieldnames or ()))
            if missing:
                raise DataError(f"{table}:1:1: no column {', '.join(missing)}")
            read = [_row(f"{table}:{rows.line_num}", row) for row in rows]
    except OSError as error:
        raise DataError(f"{table}: cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: not a CSV file: {error}") from None
    wanted = f"{model} {hardware} tp{tensor_parallel}"
    prompts: dict[int, list[float]] = {}
    alone: dict[int, list[float]] = {}
    tokens: dict[int, list[float]] = {}
    for name, prompt_size, batch_size, prompt_ms, token_ms in read:
        if name == wanted:
            prompts.setdefault(prompt_size * batch_size, []).append(prompt_ms)
            if batch_size == 1:
                alone.setdefault(prompt_size, []).append(prompt_ms)
            if prompt_size == 512:
                tokens.setdefault(batch_size, []).append(token_ms)
    if not prompts or not tokens:
        known = sorted({row[0] for row in read})
        raise ConfigError(f"{table} has no rows of {wanted}", hint=did_you_mean(wanted, known))
    return _medians(prompts), _medians(alone), _medians(tokens)


def _medians(measured: Mapping[int, list[float]]) -> dict[int, float]:
    return {at: median(measured[at]) * NANOSECONDS_PER_MILLISECOND for at in sorted(measured)}


def _row(spot: str, row: Mapping[str, str | None]) -> tuple[str, int, int, float, float]:
    numbers = []
    for column in ("prompt_size", "batch_size", "tensor_parallel", "prompt_time", "token_time"):
        text = row[column] or ""
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 < number <= 1e9:
            raise DataError(f"{spot}: {column}: expected a positive number, got {text[:40]!r}")
        numbers.append(number)
    prompt_size, batch_size, tensor_parallel, prompt_ms, token_ms = numbers
    name = f"{row['model']} {row['hardware']} tp{int(tensor_parallel)}"
    return name, int(prompt_size), int(batch_size), prompt_ms, token_ms
