"""The conformance suite of memory policies."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from rota.base.errors import LawBroken
from rota.base.instant import Instant
from rota.serving.api import Capability, MemoryPolicy, MemoryView, OrderPolicy, SequenceView
from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import Request, RequestId
from rota.serving.policies.batch.vllm_default import VllmDefault
from rota.serving.policies.order.strict_priority import StrictPriority
from rota.serving.stack import EnginePolicies
from rota.testing.batch import ORDERS
from rota.testing.order import BATCHES
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


def check_memory_policy(factory: Callable[[], MemoryPolicy], *, max_examples: int = 40) -> None:
    """Prove that a memory policy keeps the contract of its kind; raises `LawBroken` (or the machine's `PolicyError` or
    `StarvationError`) with the first example that does not.

    `factory` makes a fresh policy, each time alike. The policy runs inside the real instance machine, under random
    workloads with too little memory, classes, shared prefixes and clients who leave, with every built-in order and
    batch policy:

    * the victim is one of the candidates, or nobody, which must not leave everybody without room for ever;
    * unless `victim_order` is `chosen`, which goes with `CHOOSE_VICTIM`, the victim is the one that it announces;
    * nothing that is shown is written to, the list of candidates included (law 13);
    * every request ends exactly once, with its true length, and the machine's laws hold after every event; so nobody
      goes round in circles, preempted for one whom it is then preempted for;
    * a second run with fresh policies gives the same commands, and so does one at another time (law 8);
    * leaping over equal steps changes no end.
    """
    check_requires(factory())
    _check_stated(factory())

    def keeps_the_contract(workload: Workload, order: Callable[[], OrderPolicy], batch: Callable[[], Any]) -> None:
        def policies() -> EnginePolicies:
            return EnginePolicies(order(), batch(), MemorySpy(factory()))

        check_same_leaping(check_same_again(workload, policies), workload, policies)

    keeps_the_contract(two_that_do_not_fit(), StrictPriority, VllmDefault)
    for seed, (order, batch) in enumerate(product(ORDERS, BATCHES)):
        keeps_the_contract(seeded_workload(seed), order, batch)
    some = given(workload=workloads(), order=st.sampled_from(ORDERS), batch=st.sampled_from(BATCHES))
    settings(max_examples=max_examples, deadline=None, report_multiple_bugs=False)(some(keeps_the_contract))()


def _check_stated(policy: MemoryPolicy) -> None:
    if policy.victim_order not in ("line", "admission", "chosen"):
        raise LawBroken(f"victim_order is {policy.victim_order!r}, neither 'line', 'admission' nor 'chosen'")
    if (policy.victim_order == "chosen") != (Capability.CHOOSE_VICTIM in policy.requires):
        raise LawBroken(f"victim_order is {policy.victim_order!r}, which does not go with what the policy requires")


def two_that_do_not_fit() -> Workload:
    """Two long sequences of unlike classes that each fit alone and not together: a policy that takes the wrong one has
    them preempt each other for ever."""
    limits = InstanceLimits(
        num_blocks=22,
        max_num_seqs=2,
        max_num_batched_tokens=8,
        enable_prefix_caching=False,
        long_prefill_token_threshold=5,
        reserve_full_prompt=True,
    )
    requests = (
        Request(RequestId("r0"), Instant(0), 74, 149, priority=0),
        Request(RequestId("r1"), Instant(0), 144, 123, priority=1),
    )
    return Workload(limits, tuple(Job(request, request.max_tokens) for request in requests))


class MemorySpy:
    """Stands between the machine and a memory policy, and checks every victim."""

    def __init__(self, policy: MemoryPolicy) -> None:
        self.policy = policy
        self.requires = policy.requires
        self.victim_order = policy.victim_order

    def victim(self, view: MemoryView, candidates: Sequence[SequenceView], needy: SequenceView) -> SequenceView | None:
        before, offered = picture(view), list(candidates)
        victim = self.policy.victim(view, candidates, needy)
        refuse_writing(before, view, "the memory policy")
        if list(candidates) != offered:
            raise LawBroken("law 13: the memory policy wrote to the list of candidates")
        if victim is None:
            return None
        if not any(victim is candidate for candidate in offered):
            raise LawBroken(f"the victim {victim!r} is not among the candidates {offered!r}")
        announced = self._announced(offered)
        if announced is not None and victim is not announced:
            raise LawBroken(f"the victim is {victim!r}, by its victim_order it is {announced!r}")
        return victim

    def _announced(self, offered: list[SequenceView]) -> SequenceView | None:
        if self.victim_order == "chosen":
            return None
        if self.victim_order == "line":
            return offered[-1]
        return max(offered, key=lambda sequence: sequence.admitted_seq)
