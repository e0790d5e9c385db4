"""What a policy may look at. Read-only, and never the truth about the future."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from rota.base.instant import Duration, Instant
from rota.serving.model.fleet import StartOffer, StartSource
from rota.serving.model.instance import InstanceId, InstanceLimits, Role, SequenceReport
from rota.serving.model.request import Request, RequestId, TenantId


class SequenceView(Protocol):
    """One request's life on one instance. A step computes tokens until `num_computed_tokens` reaches `num_tokens`;
    reaching it yields one more token. Prefill, chunks, cache hits, decode and resumption are all that one sentence."""

    @property
    def id(self) -> RequestId: ...
    @property
    def request(self) -> Request: ...
    @property
    def priority(self) -> int: ...
    @property
    def tenant(self) -> TenantId: ...
    @property
    def arrived_at(self) -> Instant:
        """Arrival at the front door; never reset, not by preemption either."""
        ...

    @property
    def admitted_seq(self) -> int:
        """Rises with every admission on this instance: the last admitted has the highest."""
        ...

    @property
    def queue_position(self) -> int:
        """Orders the waiting sequences of all classes: lower stands nearer the front."""
        ...

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and what was generated so far."""
        ...

    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_computed_tokens(self) -> int: ...
    @property
    def num_output_tokens(self) -> int: ...
    @property
    def num_pending_tokens(self) -> int:
        """`num_tokens - num_computed_tokens`: 1 for a decode, more for a prefill or a resumption."""
        ...

    @property
    def num_preemptions(self) -> int: ...


class WaitingView(Protocol):
    """The waiting sequences in queue order: by arrival, with the preempted at the front (last preempted first), as vLLM
    keeps them. Also by class, so that an order by class need not sort a long queue in every step."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[SequenceView]: ...
    def priorities(self) -> Sequence[int]:
        """The classes that have anyone waiting, lowest number first."""
        ...

    def of_priority(self, priority: int) -> Iterator[SequenceView]:
        """The waiting sequences of one class, in queue order."""
        ...

    def tenants(self, priority: int) -> Iterator[TenantId]:
        """The tenants that have anyone of that class waiting, each once; the order is that in which they came."""
        ...

    def of_tenant(self, priority: int, tenant: TenantId) -> Iterator[SequenceView]:
        """The waiting sequences of one tenant and class, in queue order."""
        ...

    def groups(self, priority: int, key: Callable[[SequenceView], Hashable]) -> Iterator[Hashable]:
        """As `tenants`, by the `key` of each sequence, which is asked once each time that it has come to wait."""
        ...

    def of_group(
        self, priority: int, key: Callable[[SequenceView], Hashable], group: Hashable
    ) -> Iterator[SequenceView]:
        """The waiting sequences of one group and class, in queue order; none if there is no such group."""
        ...

    def ranked(self, key: Callable[[SequenceView], Any], changed: Iterable[RequestId] = ()) -> Iterator[SequenceView]:
        """The waiting sequences by class, lowest number first, then by `key`, then in queue order. Kept sorted between
        steps, and for one key at a time: pass the same function in every step. It is asked once each time that a
        sequence has come to wait, at the next call, and must not change for as long as it waits, but for those of
        `changed` that still do: these are asked again."""
        ...


class EngineView(Protocol):
    """One engine at the start of a step, as a policy inside it sees it."""

    @property
    def now(self) -> Instant: ...
    @property
    def limits(self) -> InstanceLimits: ...
    @property
    def running(self) -> Sequence[SequenceView]:
        """In order of admission."""
        ...

    @property
    def waiting(self) -> WaitingView: ...

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be had: free plus cached and unreferenced."""
        ...

    def num_cached_tokens(self, sequence: SequenceView) -> int:
        """Leading tokens of a sequence that the prefix cache has now, which admission would not compute; at the router,
        those that some instance is thought to have. Costs a look at each cached block, so ask of few."""
        ...


class MemoryView(EngineView, Protocol):
    """One engine as a memory policy sees it, which must know what a victim would give back."""

    def num_blocks_freed(self, leaving: Sequence[SequenceView]) -> int:
        """Blocks that could be had again if these running sequences let go of theirs; shared ones count once, and only
        if nobody else holds them. Costs O(blocks that they hold)."""
        ...


class InstanceView(Protocol):
    """One instance as the router knows it: the last report, and what was dispatched and not yet answered."""

    @property
    def id(self) -> InstanceId: ...
    @property
    def role(self) -> Role: ...
    @property
    def observed_at(self) -> Instant | None:
        """When the last report was true; None before the first."""
        ...

    @property
    def num_running(self) -> int:
        """By the last report."""
        ...

    @property
    def num_waiting(self) -> int:
        """By the last report."""
        ...

    @property
    def num_free_blocks(self) -> int | None:
        """By the last report; None before the first."""
        ...

    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int:
        """Tokens per block."""
        ...

    @property
    def running(self) -> Sequence[SequenceReport]:
        """Those who run, in order of admission, by the last report; without those known to have ended or left since.
        Empty where the instance does not tell of them. Never written to; at the router the same object until
        it changes."""
        ...

    @property
    def waiting(self) -> Sequence[SequenceReport]:
        """The first of those who wait, in queue order, by the last report; without those known to have ended since.
        The same object until it changes, as `running`."""
        ...

    @property
    def max_num_seqs(self) -> int:
        """Sequences that may run at once."""
        ...

    @property
    def max_model_len(self) -> int:
        """Prompt plus output tokens of one sequence, at most."""
        ...

    @property
    def max_num_batched_tokens(self) -> int:
        """Token budget of a step."""
        ...

    @property
    def is_draining(self) -> bool:
        """Whether it takes no new requests and should be emptied. Only migration policies are shown such."""
        ...

    @property
    def num_migrations(self) -> int:
        """Migrations under way from or to this instance."""
        ...

    @property
    def num_outstanding_requests(self) -> int:
        """Dispatched and not yet ended: our own count, always fresh."""
        ...

    @property
    def num_outstanding_tokens(self) -> int:
        """Prompt tokens of outstanding requests whose first token was not seen, plus one for each that decodes."""
        ...

    @property
    def num_expected_requests(self) -> int:
        """Requests whose first token comes elsewhere, and that are to decode here: our own count."""
        ...

    @property
    def num_booked_tokens(self) -> int:
        """Prompt tokens of all requests that are outstanding or expected here, whether they decode or not: what they
        hold at least, or will. Our own count, always fresh."""
        ...

    def num_prefix_tokens(self, request: Request) -> int:
        """Leading tokens of the prompt that were sent to this instance before and are thought to be cached there."""
        ...


class ClusterView(Protocol):
    """The instances that may take a request now, ordered by id."""

    @property
    def now(self) -> Instant: ...
    @property
    def instances(self) -> Sequence[InstanceView]: ...
    def __iter__(self) -> Iterator[InstanceView]: ...


class Heard(StrEnum):
    """What was heard of a request."""

    FIRST_TOKEN = "first_token"
    """Its first token passed."""
    END = "end"
    """It was answered in full."""
    LOST = "lost"
    """It failed, or was refused for want of room."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one request, as a client sees it."""

    request: Request
    what: Heard
    took: Duration | None = None
    """To the first token: since arrival. At the end: per token after the first, None where that is not known. For one
    that was lost: None."""


@dataclass(frozen=True, slots=True)
class WorkTotals:
    """How much work has come and ended since the router began."""

    num_arrived: int = 0
    num_prompt_tokens: int = 0
    """Of all that arrived, refused ones included."""
    num_finished: int = 0
    num_output_tokens: int = 0
    """Of those that finished, where the engine said."""


@dataclass(frozen=True, slots=True)
class StartingInstance:
    """An instance that was ordered and does not take requests yet."""

    id: InstanceId
    source: StartSource | None
    """None where the host started it by itself."""
    ordered_at: Instant


class FleetView(ClusterView, Protocol):
    """The whole fleet. `instances` are those that are ready, and those that drain (`is_draining`), by id."""

    @property
    def starting(self) -> Sequence[StartingInstance]:
        """On their way, the oldest order first."""
        ...

    @property
    def num_aside(self) -> int:
        """Instances that are neither ready nor on their way nor about to go: lost and to be restarted, or taken out by
        hand."""
        ...

    @property
    def offers(self) -> Sequence[StartOffer]:
        """How instances could be started now, and how long each way takes, the quickest first; empty where the host
        does not know."""
        ...

    @property
    def min_instances(self) -> int: ...
    @property
    def max_instances(self) -> int: ...
    @property
    def num_held(self) -> int:
        """Requests that no instance could take so far."""
        ...

    @property
    def waits(self) -> Sequence[Duration]:
        """How long each request that has got no token has been there, the oldest first."""
        ...

    @property
    def outcomes(self) -> Sequence[Outcome]:
        """What was heard since the policy was asked last, the oldest first; of very many the newest."""
        ...

    @property
    def totals(self) -> WorkTotals: ...
