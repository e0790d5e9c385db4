"""The conformance suite of order policies."""

from collections.abc import Callable
from itertools import product
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from rota.base.errors import LawBroken
from rota.base.instant import Instant
from rota.serving.api import (
    Capability,
    Cursor,
    EndObserver,
    EngineView,
    OnRefusal,
    OrderPolicy,
    Pool,
    Refusal,
    RequestId,
    SequenceView,
)
from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import Request
from rota.serving.policies.batch.prefill_first import PrefillFirst
from rota.serving.policies.batch.stall_free_chunks import StallFreeChunks
from rota.serving.policies.batch.vllm_default import VllmDefault
from rota.serving.policies.memory.recompute_last import RecomputeLast
from rota.serving.policies.memory.recompute_lowest import RecomputeLowest
from rota.serving.stack import EnginePolicies
from rota.testing.worlds import (
    Job,
    Workload,
    check_requires,
    check_same_again,
    check_same_leaping,
    picture,
    refuse_writing,
    seeded_workload,
    workloads,
)

BATCHES: tuple[Callable[[], Any], ...] = (VllmDefault, lambda: StallFreeChunks(chunk_size=8), PrefillFirst)
MEMORIES: tuple[Callable[[], Any], ...] = (RecomputeLowest, RecomputeLast)


def check_order_policy(factory: Callable[[], OrderPolicy], *, max_examples: int = 40) -> None:
    """Prove that an order policy keeps the contract of its kind; raises `LawBroken` (or the machine's `PolicyError` or
    `StarvationError`) with the first example that does not.

    `factory` makes a fresh policy, each time alike. The policy runs inside the real instance machine, under random
    workloads with little memory, classes, shared prefixes and clients who leave, below every built-in batch and memory
    policy:

    * a walk gives each sequence at most once, and only of its pool;
    * nothing that is shown is written to (law 13);
    * every request ends exactly once, with its true length, and the machine's laws hold after every event;
    * a second run with fresh policies gives the same commands, and so does one at another time (law 8);
    * leaping over equal steps changes nothing, and if it is `repeatable`, nor does being asked for every step;
    * `displaces` never holds of a sequence and itself or one just like it, nor both ways (law 14), never unless
      `displacing` says so, and it respects the policy's own walk: who displaces one displaces all behind it, and where
      one in the queue displaces nobody, nobody behind it does;
    * `requires` states what the policy does: own orders, skipping, displacing.
    """
    check_requires(factory())
    _check_stated(factory())

    def keeps_the_contract(workload: Workload, batch: Callable[[], Any], memory: Callable[[], Any]) -> None:
        def policies() -> EnginePolicies:
            return EnginePolicies(OrderSpy(factory()), batch(), memory())

        check_same_leaping(check_same_again(workload, policies), workload, policies)

    keeps_the_contract(long_prompt_above_decodes(), VllmDefault, RecomputeLowest)
    for seed, (batch, memory) in enumerate(product(BATCHES, MEMORIES)):
        keeps_the_contract(seeded_workload(seed), batch, memory)
    some = given(workload=workloads(), batch=st.sampled_from(BATCHES), memory=st.sampled_from(MEMORIES))
    settings(max_examples=max_examples, deadline=None, report_multiple_bugs=False)(some(keeps_the_contract))()


def long_prompt_above_decodes() -> Workload:
    """A prompt of a higher class that fills several steps, beside a sequence of a lower class that decodes: who of the
    two is served first decides whether the other is served at all."""
    requests = (
        Request(RequestId("r0"), Instant(0), 4, 40, priority=1),
        Request(RequestId("r1"), Instant(2_000_000), 100, 5, priority=0),
    )
    limits = InstanceLimits(num_blocks=40, block_size=4, max_num_batched_tokens=24)
    return Workload(limits, tuple(Job(request, request.max_tokens) for request in requests))


def _check_stated(policy: OrderPolicy) -> None:
    if policy.running_order not in ("admission", "own"):
        raise LawBroken(f"running_order is {policy.running_order!r}, neither 'admission' nor 'own'")
    for is_done, needed in (
        (policy.running_order == "own", Capability.ORDER_RUNNING),
        (policy.displacing, Capability.DISPLACE),
    ):
        if is_done and needed not in policy.requires:
            raise LawBroken(f"the policy does what needs {needed}, and does not require it")


class OrderSpy:
    """Stands between the machine and an order policy, and checks every answer."""

    def __init__(self, policy: OrderPolicy) -> None:
        self.policy = policy
        self.requires = policy.requires
        self.running_order = policy.running_order
        self.displacing = policy.displacing
        self.repeatable = getattr(policy, "repeatable", False)

    def open(self, view: EngineView, pool: Pool) -> "_CursorSpy":
        before = picture(view)
        self._check_displacing(view)
        refuse_writing(before, view, "displaces or a walk")
        cursor = self.policy.open(view, pool)
        refuse_writing(before, view, "opening a walk")
        return _CursorSpy(self.policy, cursor, view, pool)

    def displaces(self, view: EngineView, waiting: SequenceView, running: SequenceView) -> bool:
        before = picture(view)
        answer = self.policy.displaces(view, waiting, running)
        refuse_writing(before, view, "displaces")
        return answer

    def request_ended(self, request: Request, num_output_tokens: int | None) -> None:
        if isinstance(self.policy, EndObserver):
            self.policy.request_ended(request, num_output_tokens)

    def _check_displacing(self, view: EngineView) -> None:
        sequences = [*view.running, *view.waiting]
        for left in sequences:
            twin: Any = _Twin(left)
            if self._either_way(view, left, left) or self._either_way(view, left, twin):
                raise LawBroken(f"law 14: {left!r} displaces its equal")
            for right in sequences:
                if self.policy.displaces(view, left, right):
                    if not self.displacing:
                        raise LawBroken(f"displacing is False, and yet {left!r} displaces {right!r}")
                    if self.policy.displaces(view, right, left):
                        raise LawBroken(f"law 14: {left!r} and {right!r} displace each other")
        if self.displacing:
            self._check_ranks(view)

    def _either_way(self, view: EngineView, left: SequenceView, right: SequenceView) -> bool:
        return self.policy.displaces(view, left, right) or self.policy.displaces(view, right, left)

    def _check_ranks(self, view: EngineView) -> None:
        running = _walk(self.policy.open(view, Pool.RUNNING))
        nobody = False
        for waiting in _walk(self.policy.open(view, Pool.WAITING)):
            displaced = [self.policy.displaces(view, waiting, sequence) for sequence in running]
            if displaced != sorted(displaced):
                raise LawBroken(f"{waiting!r} displaces {displaced} of {running!r}, not all behind the first")
            if nobody and any(displaced):
                raise LawBroken(f"{waiting!r} displaces somebody, though one ahead of it displaces nobody")
            nobody = not any(displaced)


class _CursorSpy:
    def __init__(self, policy: OrderPolicy, cursor: Cursor, view: EngineView, pool: Pool) -> None:
        self._policy = policy
        self._cursor = cursor
        self._view = view
        self._pool = pool
        self._sequences = list(view.running if pool is Pool.RUNNING else view.waiting)
        self._position = {id(sequence): position for position, sequence in enumerate(self._sequences)}
        self._given: list[SequenceView] = []

    def next(self) -> SequenceView | None:
        before = picture(self._view)
        sequence = self._cursor.next()
        refuse_writing(before, self._view, "a cursor's next")
        if sequence is None:
            return None
        position = self._position.get(id(sequence))
        if position is None:
            raise LawBroken(f"a walk over the {self._pool} sequences gave {sequence!r}, which is not among them")
        if any(given is sequence for given in self._given):
            raise LawBroken(f"a walk over the {self._pool} sequences gave {sequence!r} twice")
        if position != len(self._given) and self._is_bound_to_queue():
            raise LawBroken(
                f"the {self._pool} sequence {sequence!r} was given ahead of {self._sequences[len(self._given)]!r}: "
                "an order of the policy's own, which it does not state"
            )
        self._given.append(sequence)
        return sequence

    def granted(self, sequence: SequenceView, num_tokens: int) -> None:
        before = picture(self._view)
        self._cursor.granted(sequence, num_tokens)
        refuse_writing(before, self._view, "a cursor's granted")

    def refused(self, sequence: SequenceView, why: Refusal) -> OnRefusal:
        before = picture(self._view)
        answer = self._cursor.refused(sequence, why)
        refuse_writing(before, self._view, "a cursor's refused")
        if answer is OnRefusal.SKIP and Capability.SKIP_REFUSED not in self._policy.requires:
            raise LawBroken(f"the policy skips {sequence!r}, and does not require {Capability.SKIP_REFUSED}")
        return answer

    def _is_bound_to_queue(self) -> bool:
        if self._pool is Pool.RUNNING:
            return self._policy.running_order == "admission"
        return Capability.ORDER_WAITING not in self._policy.requires


class _Twin:
    """A sequence that is like another in all but its id."""

    def __init__(self, sequence: SequenceView) -> None:
        self._sequence = sequence
        self.id = RequestId(f"{sequence.id}'")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sequence, name)


def _walk(cursor: Cursor) -> list[SequenceView]:
    sequences = []
    while (sequence := cursor.next()) is not None:
        sequences.append(sequence)
    return sequences
