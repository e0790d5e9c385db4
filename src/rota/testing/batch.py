"""The conformance suite of batch policies."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from rota.base.errors import LawBroken
from rota.serving.api import (
    EVERYTHING,
    BatchDraft,
    BatchPolicy,
    BatchShape,
    Capability,
    EngineCapabilities,
    EngineView,
    OrderPolicy,
    Pool,
    Refusal,
    SequenceView,
)
from rota.serving.policies.batch.passes import fill
from rota.serving.policies.order.fcfs import Fcfs
from rota.serving.policies.order.strict_priority import StrictPriority
from rota.serving.stack import EnginePolicies
from rota.testing.order import MEMORIES
from rota.testing.worlds import (
    Workload,
    check_requires,
    check_same_again,
    check_same_commands,
    check_same_leaping,
    picture,
    play,
    refuse_writing,
    seeded_workload,
    workloads,
)

ORDERS: tuple[Callable[[], OrderPolicy], ...] = (Fcfs, StrictPriority, lambda: StrictPriority(ageing_seconds=0.01))


def check_batch_policy(factory: Callable[[], BatchPolicy], *, max_examples: int = 40) -> None:
    """Prove that a batch policy keeps the contract of its kind; raises `LawBroken` (or the machine's `PolicyError` or
    `StarvationError`) with the first example that does not.

    `factory` makes a fresh policy, each time alike. The policy runs inside the real instance machine, under random
    workloads with little memory, classes, shared prefixes and clients who leave, with every built-in order and memory
    policy:

    * no step holds more tokens than the engine or the policy's own shape allows, nor more sequences than may run, and
      none twice (law 4);
    * it uses the draft and nothing behind it, and writes to nothing that is shown (law 13);
    * every request ends exactly once, with its true length, and the machine's laws hold after every event;
    * a second run with fresh policies gives the same commands, and so does one at another time (law 8);
    * leaping over equal steps changes no end;
    * with a shape, it composes just what the pass over that shape does, so that an engine may run its own instead;
    * with a shape, work is conserved (law 7): after a pass that preempted nobody for lack of memory, tokens are left
      only if every running sequence was served (or holds back for prefills, where the shape says so) and the next in
      the queue cannot start;
    * `requires` states what the shape does, or, without a shape, `FREE_BATCH`.
    """
    policy = factory()
    check_requires(policy)
    _check_stated(policy.shape, policy.requires)
    shape = policy.shape

    def keeps_the_contract(workload: Workload, order: Callable[[], OrderPolicy], memory: Callable[[], Any]) -> None:
        def policies() -> EnginePolicies:
            return EnginePolicies(order(), BatchSpy(factory()), memory())

        played = check_same_again(workload, policies)
        if shape is not None:
            passed = play(workload, EnginePolicies(order(), OfShape(shape), memory()), steady=False)
            check_same_commands(played, passed, "the pass over the policy's shape composes another batch")
        check_same_leaping(played, workload, policies)

    for seed, (order, memory) in enumerate(product(ORDERS, MEMORIES)):
        keeps_the_contract(seeded_workload(seed), order, memory)
    some = given(workload=workloads(), order=st.sampled_from(ORDERS), memory=st.sampled_from(MEMORIES))
    settings(max_examples=max_examples, deadline=None, report_multiple_bugs=False)(some(keeps_the_contract))()


def _check_stated(shape: BatchShape | None, requires: EngineCapabilities) -> None:
    if shape is None:
        needs = {Capability.FREE_BATCH: True}
    else:
        needs = {
            Capability.TOKEN_BUDGET: shape.token_budget is not None,
            Capability.ORDER_RUNNING: shape.decodes_first,
            Capability.ADMIT_BEFORE_RUNNING: shape.admit_before_running,
        }
    for needed, is_needed in needs.items():
        if is_needed and needed not in requires:
            raise LawBroken(f"the policy does what needs {needed}, and does not require it")


class OfShape:
    """The pass over a shape, as a policy."""

    requires = EVERYTHING

    def __init__(self, shape: BatchShape) -> None:
        self.shape: BatchShape | None = shape
        self._shape = shape

    def plan(self, draft: BatchDraft, order: OrderPolicy) -> None:
        fill(draft, order, self._shape)


class BatchSpy:
    """Stands between the machine and a batch policy, and checks every pass."""

    def __init__(self, policy: BatchPolicy) -> None:
        self.policy = policy
        self.requires = policy.requires
        self.shape = policy.shape

    def plan(self, draft: BatchDraft, order: OrderPolicy) -> None:
        spy = _DraftSpy(draft)
        try:
            self.policy.plan(spy, order)
        except AttributeError as error:
            raise LawBroken(
                f"the policy wrote to a view (law 13) or used what a draft does not offer: {error}"
            ) from error
        spy.refuse_writing("the batch policy")
        shape = self.shape
        if shape is None:
            return
        num_granted = sum(spy.granted.values())
        if shape.token_budget is not None and num_granted > shape.token_budget:
            raise LawBroken(f"law 4: {num_granted} tokens in a step, {shape.token_budget} by the policy's own shape")
        if draft.num_preempted == 0 and draft.token_budget > 0:
            _check_conservation(draft, spy.granted, order, shape)


def _check_conservation(draft: BatchDraft, granted: dict[str, int], order: OrderPolicy, shape: BatchShape) -> None:
    for sequence in draft.view.running:
        if shape.admit_before_running and sequence.num_pending_tokens == 1:
            continue
        if sequence.id not in granted:
            raise LawBroken(f"law 7: {draft.token_budget} tokens are left, and {sequence!r} runs without any")
    cursor = order.open(draft.view, Pool.WAITING)
    while (following := cursor.next()) is not None and following.id in granted:
        pass
    # A grant that is refused leaves no trace, and one that is given ends the run here.
    if following is not None and not isinstance(draft.grant(following, following.num_pending_tokens), Refusal):
        raise LawBroken(f"law 7: {following!r} could have started with the tokens, slots and blocks that were left")


class _DraftSpy:
    """The draft as `BatchDraft` shows it, and nothing more of it."""

    def __init__(self, draft: BatchDraft) -> None:
        self._draft = draft
        self._before = picture(draft.view)
        self.granted: dict[str, int] = {}

    @property
    def view(self) -> EngineView:
        return self._draft.view

    @property
    def token_budget(self) -> int:
        return self._draft.token_budget

    @property
    def num_preempted(self) -> int:
        return self._draft.num_preempted

    def limit_tokens(self, token_budget: int) -> None:
        self._draft.limit_tokens(token_budget)

    def line_up(self, running: Sequence[SequenceView]) -> None:
        if sorted(map(id, running)) != sorted(map(id, self._draft.view.running)):
            raise LawBroken(f"lined up {running!r}, which are not the running sequences")
        self._draft.line_up(running)

    def displace(self, order: OrderPolicy) -> int:
        self.refuse_writing("the batch policy")
        num_displaced = self._draft.displace(order)
        self._before = picture(self._draft.view)
        return num_displaced

    def make_room(self, order: OrderPolicy, *, decodes_first: bool) -> int:
        self.refuse_writing("the batch policy")
        num_preempted = self._draft.make_room(order, decodes_first=decodes_first)
        self._before = picture(self._draft.view)
        return num_preempted

    def grant(self, sequence: SequenceView, num_tokens: int) -> int | Refusal:
        self.refuse_writing("the batch policy")
        num_preempted = self._draft.num_preempted
        result = self._draft.grant(sequence, num_tokens)
        self._before = picture(self._draft.view)
        if not isinstance(result, Refusal):
            self.granted[sequence.id] = result
        if self._draft.num_preempted != num_preempted:
            self.granted = {key: value for key, value in self.granted.items() if key not in self._victims()}
        return result

    def _victims(self) -> set[str]:
        return {sequence.id for sequence in getattr(self._draft, "preempted", ())}

    def refuse_writing(self, where: str) -> None:
        """Raise `LawBroken` if what the view shows has changed since the draft last changed it."""
        refuse_writing(self._before, self._draft.view, where)
