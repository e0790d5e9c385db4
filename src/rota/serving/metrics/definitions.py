"""Each metric, once. All times are of the front door: `ttft` counts from arrival there, not from being scheduled.

Rejected, failed and aborted requests have no latency, but they count: they are in the denominators of attainment, and a
mean over those who got through is never shown without how many did not.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from rota.base.instant import NANOSECONDS_PER_MILLISECOND, Duration, Instant
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import SLO, RequestId, TenantId

Status = Literal["finished", "rejected", "failed", "aborted"]
"""Answered in full; refused before it ran; ended by an error; left by its client."""


class RequestRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of one request."""

    id: RequestId
    tenant: TenantId
    priority: int
    arrived_at: Instant
    first_token_at: Instant | None
    finished_at: Instant
    """When it ended, in whatever way."""
    num_prompt_tokens: int
    num_output_tokens: int
    status: Status
    reason: str = ""
    """Why it was rejected or failed."""
    instance_id: InstanceId | None = None
    """Where it ran last."""
    slo: SLO = SLO()
    first_scheduled_at: Instant | None = None
    num_cached_tokens: int = 0
    """Prompt tokens that were found in a prefix cache when it was first admitted."""
    num_preemptions: int = 0
    num_migrations: int = 0
    """How often it went on at another instance with what it had."""
    downtime: Duration = Duration(0)
    """From each stop for a move, or crash that it outlived, until its next token, added up."""

    @property
    def ttft(self) -> Duration | None:
        """Arrival to first token; None if there was none."""
        return None if self.first_token_at is None else Duration(self.first_token_at - self.arrived_at)

    @property
    def e2e(self) -> Duration | None:
        """Arrival to last token; None unless finished."""
        return Duration(self.finished_at - self.arrived_at) if self.status == "finished" else None

    @property
    def tpot(self) -> Duration | None:
        """`(e2e - ttft) / (output tokens - 1)`, to the nanosecond; None for one token or unless finished."""
        if self.status != "finished" or self.first_token_at is None or self.num_output_tokens < 2:
            return None
        return Duration(round((self.finished_at - self.first_token_at) / (self.num_output_tokens - 1)))

    @property
    def queue_time(self) -> Duration | None:
        """Arrival to being scheduled first; None where nobody noted that."""
        return None if self.first_scheduled_at is None else Duration(self.first_scheduled_at - self.arrived_at)

    @property
    def meets_slo(self) -> bool:
        """Whether it finished and met every target it was promised. Without targets finishing is enough; a target for
        `tpot` is met by an answer of one token."""
        if self.status != "finished":
            return False
        slo = self.slo
        if slo.ttft is not None and (self.ttft is None or self.ttft > slo.ttft):
            return False
        if slo.e2e is not None and self.finished_at - self.arrived_at > slo.e2e:
            return False
        if slo.tpot is None or self.num_output_tokens < 2:
            return True
        # Compared by total, not by mean, so that rounding the mean cannot decide.
        first = self.first_token_at
        return first is not None and self.finished_at - first <= slo.tpot * (self.num_output_tokens - 1)


class Distribution(msgspec.Struct, frozen=True):
    """Mean and percentiles, in milliseconds; all None where there is nothing to take them of.

    A percentile is linear between the two nearest ranks (numpy's default): of n sorted values, p99 lies at rank
    `0.99 * (n - 1)`, counted from 0.
    """

    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None


def distribution_ms(nanoseconds: "Sequence[int] | npt.NDArray[np.int64]") -> Distribution:
    """The distribution of durations given in nanoseconds."""
    values = np.asarray(nanoseconds, dtype=np.int64)
    if not len(values):
        return Distribution()
    p50, p90, p99 = (float(p) / NANOSECONDS_PER_MILLISECOND for p in np.percentile(values, (50, 90, 99)))
    # Summed as whole numbers without bound: the same mean in whichever order the values come.
    mean = sum(values.tolist()) / len(values) / NANOSECONDS_PER_MILLISECOND
    return Distribution(mean, p50, p90, p99)


def itl(token_at: Sequence[int]) -> list[Duration]:
    """The gaps between consecutive tokens of one request. Percentiles of ITL are of all gaps of all requests together,
    never of means; where tokens come in chunks, they are the gaps between chunks, and a report must say so."""
    return [Duration(later - earlier) for earlier, later in pairwise(token_at)]


def slo_attainment(num_met: int, num_requests: int) -> float | None:
    """Share of all requests, those rejected, failed and aborted included, that met every target; None of none."""
    return num_met / num_requests if num_requests else None


def per_second(count: int, span: int) -> float | None:
    """A count over a span in nanoseconds; None where no time passed. Goodput is this of the requests that met every
    target, over the span from the first arrival to the last end."""
    return count * 1e9 / span if span > 0 else None


def prefix_hit_rate(num_cached_tokens: int, num_prompt_tokens: int) -> float | None:
    """Share of the prompt tokens of admitted requests that a prefix cache held; None where no prompt was looked up."""
    return num_cached_tokens / num_prompt_tokens if num_prompt_tokens else None


class Samples(msgspec.Struct):
    """How one instance stood over time: parallel lists, filled by whoever watches it and thinned by them too."""

    at: list[int] = []
    """Instants, rising."""
    running: list[int] = []
    waiting: list[int] = []
    free_blocks: list[int] = []
    """Blocks that can be had."""
