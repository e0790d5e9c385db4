"""Steps of a live engine as arrays, and which of them a fit may not see."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rota.base.errors import DataError
from rota.base.instant import NANOSECONDS_PER_SECOND
from rota.serving.engines.vllm.facts import StepRecord

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

PHASES = ("decode", "prefill", "mixed")

NUM_STEPS_MIN = 60
"""Of fewer one cannot keep some out and still fit the rest."""
_IDLE_SECONDS = 0.4
"""An engine that runs no step for so long has begun a new stretch."""
_LOSES_LITTLE = 0.1
"""Of all steps, those that lose least of their time to others."""
_NUM_STRETCHES_MIN = 10
HOLDOUT_EVERY, HOLDOUT_FIRST = 5, 2
"""One stretch in so many is held out. Kinds of load come in rounds of four, so that each is held out in turn."""


@dataclass(frozen=True, slots=True)
class Steps:
    """What steps were made of, one element a step, oldest first; times in ns."""

    at: Ints
    """When it began."""
    step_ns: Floats
    cpu_ns: Floats
    """CPU time of the engine's workers within the step; NaN where it is not known."""
    gap_ns: Floats
    """From the end of the step before; NaN where none of its sequences went on: the engine may have been idle."""
    num_tokens: Floats
    """New tokens of all sequences."""
    num_prefills: Floats
    prefill_pairs: Floats
    """Pairs of a new token and one at or before it: `sum(new * (context + new / 2))`."""
    prefill_context: Floats
    num_decodes: Floats
    decode_kv: Floats
    phase: npt.NDArray[np.int8]
    """Index into `PHASES`."""
    stretch: Ints
    """Which stretch of time it belongs to."""

    def __len__(self) -> int:
        return len(self.at)

    def where(self, chosen: Flags) -> "Steps":
        """Those steps alone."""
        return Steps(**{name: getattr(self, name)[chosen] for name in self.__slots__})

    def undisturbed(self, device: str) -> Floats:
        """What the steps would have taken, in ns, had nobody else used their cores: on a CPU engine their CPU time,
        and what a step that loses little takes beside it; elsewhere, and where that is not known, what they took."""
        if device != "cpu" or np.isnan(self.cpu_ns).any():
            return self.step_ns
        beside = max(0.0, float(np.quantile(self.step_ns - self.cpu_ns, _LOSES_LITTLE)))
        return np.asarray(self.cpu_ns + beside)

    @property
    def held_out(self) -> Flags:
        """Steps of whole stretches of time that no fit may see."""
        return np.asarray(self.stretch % HOLDOUT_EVERY == HOLDOUT_FIRST)


def steps_of(records: Sequence[StepRecord], spot: str) -> Steps:
    """The steps of a facts file. Those that computed nothing, and those of preempted batches, are left out.

    `spot` names the file in errors. Raises `DataError` if there are too few to fit anything, or a record cannot be.
    """
    kept: list[StepRecord] = []
    gaps: list[float] = []
    stretches: list[int] = []
    stretch = 0
    end: int | None = None
    for number, record in enumerate(records, start=1):
        if record.step_ns <= 0 or record.at < 0 or record.num_decodes < 0 or record.decode_kv_tokens < 0:
            raise DataError(f"{spot}: step record {number} (step {record.step}): a negative count or time")
        if any(new < 1 or context < 0 for new, context in record.prefills):
            raise DataError(f"{spot}: step record {number} (step {record.step}): a prefill of less than one token")
        gap = None if end is None else record.at - end
        is_new = gap is not None and (gap < 0 or gap > _IDLE_SECONDS * NANOSECONDS_PER_SECOND)
        stretch += is_new  # the engine was idle, or is another one
        if record.prefills or record.num_decodes:
            kept.append(record)
            went_on = record.num_running > record.num_admitted
            gaps.append(float(gap) if gap is not None and went_on and not is_new else np.nan)
            stretches.append(stretch)
        end = record.at + record.step_ns
    if len(kept) < NUM_STEPS_MIN:
        raise DataError(
            f"{spot}: {len(kept)} steps that computed something, and a fit wants {NUM_STEPS_MIN} at least",
            hint="load the engine for longer",
        )
    return _as_arrays(kept, gaps, stretches)


def _as_arrays(records: Sequence[StepRecord], gaps: Sequence[float], stretches: Sequence[int]) -> Steps:
    def floats(values: Sequence[float]) -> Floats:
        return np.asarray(values, dtype=np.float64)

    num_prefills = floats([len(record.prefills) for record in records])
    num_decodes = floats([record.num_decodes for record in records])
    at = np.asarray([record.at for record in records], dtype=np.int64)
    return Steps(
        at=at,
        step_ns=floats([record.step_ns for record in records]),
        cpu_ns=floats([record.cpu_ns or np.nan for record in records]),
        gap_ns=floats(gaps),
        num_tokens=floats([record.num_decodes + sum(new for new, _ in record.prefills) for record in records]),
        num_prefills=num_prefills,
        prefill_pairs=floats([sum(new * (context + new / 2) for new, context in r.prefills) for r in records]),
        prefill_context=floats([sum(context for _, context in record.prefills) for record in records]),
        num_decodes=num_decodes,
        decode_kv=floats([record.decode_kv_tokens for record in records]),
        phase=np.where(num_prefills == 0, 0, np.where(num_decodes == 0, 1, 2)).astype(np.int8),
        stretch=_at_least_some(np.asarray(stretches, dtype=np.int64), at),
    )


def _at_least_some(stretch: Ints, at: Ints) -> Ints:
    """The stretches; or, where an engine was hardly ever idle, as many pieces of equal time."""
    if stretch[-1] + 1 >= _NUM_STRETCHES_MIN:
        return stretch
    span = max(1, int(at.max() - at.min()) + 1)
    return np.asarray((at - at.min()) * _NUM_STRETCHES_MIN // span, dtype=np.int64)
