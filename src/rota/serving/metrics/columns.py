"""The records of a run as arrays: what tests of differences and charts compute on, a few bytes a request."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from rota.base.instant import NANOSECONDS_PER_MILLISECOND, Duration
from rota.serving.metrics.definitions import RequestRecord

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Columns:
    """One entry a request. Latencies are in milliseconds, NaN where there is none."""

    arrived_at: npt.NDArray[np.int64]
    """Nanoseconds."""
    priority: npt.NDArray[np.int64]
    tenant: npt.NDArray[np.str_]
    ttft: Floats
    tpot: Floats
    e2e: Floats
    is_met: npt.NDArray[np.bool_]
    """Whether it met every target."""
    is_finished: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.arrived_at)

    def where(self, chosen: "npt.NDArray[np.bool_]") -> "Columns":
        """The requests that are chosen."""
        return Columns(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})


def columns_of(records: Iterable[RequestRecord]) -> Columns:
    """The records in any order, as columns in order of id: of a trace that is the order of its rows, whatever became of
    them, so that two runs of one trace can be laid side by side."""
    ordered = sorted(records, key=lambda record: (len(record.id), record.id))
    return Columns(
        arrived_at=np.array([record.arrived_at for record in ordered], dtype=np.int64),
        priority=np.array([record.priority for record in ordered], dtype=np.int64),
        tenant=np.array([record.tenant for record in ordered], dtype=np.str_),
        ttft=_milliseconds([record.ttft for record in ordered]),
        tpot=_milliseconds([record.tpot for record in ordered]),
        e2e=_milliseconds([record.e2e for record in ordered]),
        is_met=np.array([record.meets_slo for record in ordered], dtype=np.bool_),
        is_finished=np.array([record.status == "finished" for record in ordered], dtype=np.bool_),
    )


def by_class(columns: Columns) -> Mapping[str, Columns]:
    """The requests of each priority, the highest class first."""
    return {f"class {one}": columns.where(columns.priority == one) for one in np.unique(columns.priority).tolist()}


def by_tenant(columns: Columns, num_tenants_max: int) -> Mapping[str, Columns]:
    """The requests of each tenant, those with most requests first, so many at most."""
    names, counts = np.unique(columns.tenant, return_counts=True)
    busiest = np.lexsort((names, -counts))[:num_tenants_max]
    return {str(names[index]): columns.where(columns.tenant == names[index]) for index in busiest}


def _milliseconds(durations: list[Duration | None]) -> Floats:
    values = [np.nan if duration is None else duration / NANOSECONDS_PER_MILLISECOND for duration in durations]
    return np.array(values, dtype=np.float64)
