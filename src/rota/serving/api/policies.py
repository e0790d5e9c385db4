"""The hooks: what a policy of each kind implements. A stack is one object per hook.

A policy is called with views and a draft, is never suspended, and must give the same answer for the same arguments. Its
constants are keyword parameters of its constructor with the published defaults. What it needs of an engine it declares
in `requires`; what it lacks is refused when the stack is assembled, never approximated.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from rota.base.instant import Duration, Instant
from rota.serving.api.decisions import Admission, Flip, Move, OnRefusal, Pick, Pool, Refusal, Start, Stop
from rota.serving.api.views import ClusterView, EngineView, FleetView, InstanceView, MemoryView, SequenceView
from rota.serving.model.capabilities import EngineCapabilities
from rota.serving.model.instance import InstanceId
from rota.serving.model.request import Request, RequestId


class Cursor(Protocol):
    """A walk over sequences that hears what came of each, so that it can charge inside the pass.

    A sequence that `next` gave and of which nothing is heard was passed over.
    """

    def next(self) -> SequenceView | None:
        """The next sequence to try, or None at the end. Each sequence of the pool at most once."""
        ...

    def granted(self, sequence: SequenceView, num_tokens: int) -> None:
        """A sequence that `next` gave got `num_tokens` tokens of this step."""
        ...

    def refused(self, sequence: SequenceView, why: Refusal) -> OnRefusal:
        """A sequence that `next` gave got none; say whether the walk goes on."""
        ...


@runtime_checkable
class OrderPolicy(Protocol):
    """Which waiting or running sequence is next.

    A policy may say `repeatable = True` if its answers depend on the sequences alone: not on `now`, nor on what its
    cursors have heard. Then a machine need not ask it about running sequences while all of them get what they need, nor
    again about waiting ones while the same sequences decode and nobody could start.
    """

    requires: EngineCapabilities
    running_order: Literal["admission", "own"]
    """Whether running sequences are walked in order of admission, or in an order of the policy's own."""
    displacing: bool
    """Whether `displaces` can ever be true; if not, no step looks for sequences to displace."""

    def open(self, view: EngineView, pool: Pool) -> Cursor:
        """Start a walk over one pool of this step."""
        ...

    def displaces(self, view: EngineView, waiting: SequenceView, running: SequenceView) -> bool:
        """Whether `waiting`, if it cannot start otherwise, may have `running` preempted. Must never hold between
        equals, nor both ways, and must hold for all that rank behind a sequence for which it holds."""
        ...


@dataclass(frozen=True, slots=True)
class BatchShape:
    """A batch policy in four facts: what an engine's own pass can be set to, so that it can be hosted there.

    The pass over a shape is `rota.serving.policies.batch.passes.fill`; vLLM's own pass is the same one.
    """

    token_budget: int | None = None
    """Tokens a step, if fewer than the engine's limit."""
    decodes_first: bool = False
    """Serve running decodes ahead of running prefills."""
    admit_before_running: bool = False
    """Serve waiting sequences and prefills first; decodes run only in steps that have neither."""


class BatchDraft(Protocol):
    """A step being composed. Every grant is checked against budget, slots and memory as it is written; the machine then
    applies all of the draft or, if the policy fails, none of it."""

    @property
    def view(self) -> EngineView: ...
    @property
    def token_budget(self) -> int:
        """Tokens left in this step."""
        ...

    @property
    def num_preempted(self) -> int:
        """Sequences preempted so far in this step because memory ran out (displacements not counted)."""
        ...

    def limit_tokens(self, token_budget: int) -> None:
        """Lower the budget of this step, before the first grant."""
        ...

    def line_up(self, running: Sequence[SequenceView]) -> None:
        """Say in which order this step serves the running sequences. The memory policy takes its victims from this
        line; without a call it is the order of admission."""
        ...

    def displace(self, order: OrderPolicy) -> int:
        """Make room for waiting sequences by preempting running ones that `order` lets them displace, chosen by the
        memory policy one by one. For each waiting sequence all or nothing: if displacing everyone allowed would not let
        it start, nobody goes. Call before the first grant. Returns how many were preempted."""
        ...

    def make_room(self, order: OrderPolicy, *, decodes_first: bool) -> int:
        """Preempt running sequences until all the others get the blocks that this step would fill, victims being
        chosen by the memory policy one by one. Does nothing unless that policy chooses freely. `decodes_first` says in
        which order the pass will serve them. Call after `displace`, before the first grant. Returns how many were
        preempted."""
        ...

    def grant(self, sequence: SequenceView, num_tokens: int) -> int | Refusal:
        """Give a sequence up to `num_tokens` tokens; returns how many it got, at least 1, or why none.

        A running sequence that lacks blocks makes the draft ask the memory policy for victims, one by one, until it
        fits or is a victim itself. A waiting sequence is admitted by its first grant; tokens found in the prefix cache
        come on top. It never makes victims; see `displace`.
        """
        ...


@runtime_checkable
class BatchPolicy(Protocol):
    """How many tokens of whom in this step."""

    requires: EngineCapabilities
    shape: BatchShape | None
    """The policy as a shape, or None if only free composition can express it (then no engine but ours hosts it).
    Hosts go by the shape where there is one, so `plan` must be the pass over it."""

    def plan(self, draft: BatchDraft, order: OrderPolicy) -> None:
        """Compose one step."""
        ...


VictimOrder = Literal["line", "admission", "chosen"]


@runtime_checkable
class MemoryPolicy(Protocol):
    """Whom to preempt when blocks or slots lack. The one way so far is to recompute."""

    requires: EngineCapabilities
    victim_order: VictimOrder
    """Whether victims come from the end of the line that the step serves, or from the end of the order of admission.
    vLLM always takes the end of the line, so there the two must agree. Or `chosen`: whoever it likes, which needs
    `CHOOSE_VICTIM`. It is then asked ahead of the pass over those who run (`BatchDraft.make_room`), which is before any
    engine's own rule applies."""

    def victim(self, view: MemoryView, candidates: Sequence[SequenceView], needy: SequenceView) -> SequenceView | None:
        """The one of `candidates` to preempt now for `needy`, or None for nobody. Candidates are running, in the order
        in which the step serves them, and may include `needy` itself. Asked again for as long as room lacks."""
        ...


@runtime_checkable
class DispatchPolicy(Protocol):
    """Which instance a request goes to."""

    requires: EngineCapabilities

    def pick(self, request: Request, cluster: ClusterView) -> Pick:
        """Choose among `cluster.instances`, which is never empty. Ties break by id, unless a stream was given."""
        ...


@runtime_checkable
class DecodePlacer(Protocol):
    """A dispatch policy that says where a request decodes only when its first token has come (`Pick.prefill_only`)."""

    def pick_decode(self, request: Request, at: InstanceId, cluster: ClusterView) -> Pick:
        """Choose among `cluster.instances`, the ready ones, of which `at` is usually one; `at` itself lets it stay."""
        ...


@runtime_checkable
class RoleFlipper(Protocol):
    """A dispatch policy that may want an instance to have another role."""

    def flip(self, cluster: ClusterView) -> Flip | None:
        """The one of the ready instances that should be drained and given another role now, if any. Asked whenever a
        report came, unless one is on its way to another role already."""
        ...


@runtime_checkable
class EndObserver(Protocol):
    """A dispatch, order or admission policy that wants to hear of ends, to learn how long answers are or to forget a
    request. An admission policy hears also of those whom it let in and who were not taken after all."""

    def request_ended(self, request: Request, num_output_tokens: int | None) -> None:
        """A request ended, in whatever way; with so many output tokens if it finished and its engine told. An order
        policy hears of each request that ends at, or leaves, its engine, before the next step is planned."""
        ...


@runtime_checkable
class FirstTokenObserver(Protocol):
    """An admission policy that wants to hear of first tokens, to know whose prompts still wait."""

    def first_token_seen(self, request: Request) -> None:
        """The first token of a request came, or the first after it was resumed: nothing of its prompt waits at its
        instance. Of an answer that is not streamed the router sees it at the end only."""
        ...


@runtime_checkable
class AdmissionPolicy(Protocol):
    """Whether a request may enter at all."""

    requires: EngineCapabilities

    def admit(self, request: Request, cluster: ClusterView, num_unfinished: int) -> Admission:
        """Decide on arrival. `num_unfinished` counts the requests that entered and have not ended."""
        ...


@runtime_checkable
class MigrationPolicy(Protocol):
    """Which running requests go on at another instance."""

    requires: EngineCapabilities
    interval_seconds: float
    """How often it is asked, in seconds; 0 for never."""

    def plan(self, cluster: ClusterView, moving: Set[RequestId]) -> Sequence[Move]:
        """The moves to begin now, the most useful first. `cluster` holds the instances that are ready, and those that
        drain; `moving` are the requests that are on their way already, and may not be moved again.

        What it sees is late. Before each move the machine looks again: the request must run at the source, and the
        destination be ready. A move that fails this is dropped, with its reason in the counts."""
        ...


@runtime_checkable
class ReportObserver(Protocol):
    """A migration policy that reads ahead: what it reads of an instance when that reports, it need not read in the
    round, which is short for it."""

    def instance_reported(self, instance: InstanceView) -> None:
        """A report of an instance was taken, or one of its requests ended or left. Called after the event, once for
        each instance that it changed.

        It is an occasion, not a duty of the caller's: a policy must decide the same whether it was called or not, so
        check in the round that what was read still holds (`running` and `waiting` are then the same objects)."""
        ...


@runtime_checkable
class ScalingPolicy(Protocol):
    """How many instances there are."""

    requires: EngineCapabilities
    interval_seconds: float
    """How often it is asked, in seconds; 0 for never."""

    def plan(self, fleet: FleetView) -> Sequence[Start | Stop]:
        """What to start and what to stop now. Whatever it needs of the past it remembers itself.

        The machine keeps to the rules of the fleet (`FleetRules`): a wish that would break one is dropped, with its
        reason in the counts, so a policy may ask again and again. It is asked in regular intervals, if work is there or
        not; what it sees of instances is as late as their reports."""
        ...


@runtime_checkable
class DemandPredictor(Protocol):
    """How much will be wanted, from how much was."""

    def forecast(self, history: Sequence[float], num_ahead: int) -> Sequence[float]:
        """The next `num_ahead` values of an evenly spaced series of values that are at least 0, the oldest first. May
        raise on a history that it cannot go by; whoever asked falls back on what was said before."""
        ...


@runtime_checkable
class LengthPredictor(Protocol):
    """How many tokens an answer will have. It goes by what is known on arrival and by answers that have ended; the
    truth of one that has not is in the world alone, which only the predictor named `oracle` may ask."""

    cost: Duration
    """What one prediction takes of the engine's time. A simulated step takes as much longer; a live one just does."""

    def predict(self, request: Request) -> float:
        """Output tokens, at least 1 and at most what the client allows. Good for ranking; whole only by chance."""
        ...

    def request_ended(self, request: Request, num_output_tokens: int | None) -> None:
        """A request ended, with so many output tokens if it was served to its end."""
        ...


@runtime_checkable
class StepTimePredictor(Protocol):
    """How long a step takes."""

    def step_time(
        self, *, prefills: Sequence[tuple[int, int]], num_decodes: int, decode_kv_tokens: int, now: Instant = Instant(0)
    ) -> int:
        """Nanoseconds for one step.

        `prefills` lists `(new_tokens, context_tokens)` for every sequence that computes more than one token, context
        being what is computed already. `num_decodes` sequences compute one token each, over `decode_kv_tokens` tokens
        of context in all. Positive for any non-empty step, and never falls when work is added."""
        ...
