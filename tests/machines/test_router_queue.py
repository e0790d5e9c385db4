"""The router's queue under an order policy: no instance has more than it may, no place stays free while somebody could
take it, and who goes next is the policy's word."""

import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rota.base.errors import PolicyError
from rota.base.instant import Duration, Instant, seconds
from rota.serving.api import Capability, InOrder, Pool, QueueRules
from rota.serving.cluster.machine import ClusterMachine
from rota.serving.cluster.prefix_index import PrefixIndex
from rota.serving.cluster.queue import RouterQueue
from rota.serving.model.commands import Abort, Dispatch, Fail, Hold, Reject
from rota.serving.model.events import (
    ClientLeft,
    FirstTokenSeen,
    InstanceDraining,
    InstanceLost,
    InstanceReported,
    InstanceStarted,
    RequestArrived,
    RequestFailed,
    RequestFinished,
)
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceReport, InstanceSpec, SequenceReport
from rota.serving.model.request import Request, RequestId, TenantId
from rota.serving.policies.admission.bounded_queue import BoundedQueue
from rota.serving.policies.dispatch.least_outstanding_tokens import LeastOutstandingTokens
from rota.serving.policies.order.fair_prefix import FairPrefix
from rota.serving.policies.order.fair_tokens import FairTokens
from rota.serving.policies.order.fcfs import Fcfs
from rota.serving.policies.order.strict_priority import StrictPriority

MAX_OUTSTANDING = 2
MAX_HELD = 8
LIMITS = InstanceLimits(num_blocks=64)
ORDERS = (Fcfs, StrictPriority, FairTokens, FairPrefix)


class QueueWorld(RuleBasedStateMachine):
    """Requests and instances come and go in any order; the model knows who is where."""

    @initialize(order=st.sampled_from(ORDERS))
    def begin(self, order):
        rules = QueueRules(max_outstanding_per_instance=MAX_OUTSTANDING, max_held=MAX_HELD, timeout_seconds=100.0)
        self.machine = ClusterMachine(LeastOutstandingTokens(), BoundedQueue(), queue=rules, order=order())
        self.now = Instant(10**9)
        self.num_ids = 0
        self.owner: dict[RequestId, InstanceId | None] = {}
        self.tokens: dict[RequestId, int] = {}
        self.ready: set[InstanceId] = set()

    def feed(self, event):
        self.now = Instant(self.now + 1)
        self.obey(self.machine.handle(event, self.now))
        self.machine.check()

    def obey(self, commands):
        for command in commands:
            match command:
                case Dispatch(request_id, instance_id):
                    assert self.owner[request_id] is None
                    assert instance_id in self.ready
                    self.owner[request_id] = instance_id
                case Hold(request_id, reason):
                    assert reason
                    self.owner[request_id] = None
                case Reject(request_id) | Fail(request_id):
                    del self.owner[request_id]
                case Abort():
                    pass
                case _:
                    raise AssertionError(command)

    @rule(tenant=st.sampled_from("abc"), priority=st.integers(0, 1), num_prompt_tokens=st.integers(1, 200))
    def arrives(self, tenant, priority, num_prompt_tokens):
        self.num_ids += 1
        request = Request(RequestId(f"r{self.num_ids:03}"), self.now, num_prompt_tokens, 50, priority, TenantId(tenant))
        self.owner[request.id] = None
        self.tokens[request.id] = num_prompt_tokens
        self.feed(RequestArrived(request))

    def one(self, data, *, owned=True):
        ids = sorted(each for each, owner in self.owner.items() if (owner is not None) or not owned)
        return data.draw(st.sampled_from(ids)) if ids else None

    @rule(data=st.data(), num_output_tokens=st.none() | st.integers(1, 50))
    def finishes(self, data, num_output_tokens):
        if (name := self.one(data)) is not None:
            instance = self.owner.pop(name)
            self.feed(FirstTokenSeen(name, instance))
            self.feed(RequestFinished(name, instance, num_output_tokens))

    @rule(data=st.data(), retryable=st.booleans(), num_output_tokens=st.none() | st.integers(0, 9))
    def fails(self, data, retryable, num_output_tokens):
        if (name := self.one(data)) is not None:
            instance, self.owner[name] = self.owner[name], None
            if num_output_tokens is not None:
                self.feed(FirstTokenSeen(name, instance))
            self.feed(RequestFailed(name, instance, "it burns", retryable, num_output_tokens))

    @rule(data=st.data())
    def leaves(self, data):
        if (name := self.one(data, owned=False)) is not None:
            del self.owner[name]
            self.feed(ClientLeft(name))

    @rule(data=st.data(), more=st.integers(0, 20))
    def is_reported(self, data, more):
        if (name := self.one(data)) is not None:
            running = (SequenceReport(name, self.tokens[name] + more, 1),)
            self.feed(InstanceReported(InstanceReport(self.owner[name], self.now, 1, 0, 1, 64, running=running)))

    @rule(number=st.integers(0, 2))
    def starts(self, number):
        instance_id = InstanceId(f"i{number}")
        if instance_id not in self.machine.instance_states():
            self.ready.add(instance_id)
            able = frozenset({Capability.RESUME_FROM_TOKENS})
            self.feed(InstanceStarted(InstanceSpec(instance_id, LIMITS, capabilities=able)))

    @precondition(lambda self: self.ready)
    @rule(data=st.data(), drains=st.booleans())
    def goes(self, data, drains):
        instance_id = data.draw(st.sampled_from(sorted(self.ready)))
        self.ready.discard(instance_id)
        self.feed(InstanceDraining(instance_id) if drains else InstanceLost(instance_id))
        for name, owner in list(self.owner.items()):
            if owner == instance_id and not drains:
                self.owner[name] = None
                self.feed(RequestFailed(name, instance_id, "lost with it"))

    @rule(passed=st.integers(0, 60))
    def time_passes(self, passed):
        self.now = Instant(self.now + seconds(passed))
        deadline = self.machine.next_deadline()
        if deadline is not None and deadline <= self.now:
            self.obey(self.machine.expire(self.now))
            self.machine.check()

    @invariant()
    def nobody_has_more_than_it_may_and_no_place_is_free_while_somebody_waits(self):
        if not hasattr(self, "owner"):
            return
        load = Counter(self.owner.values())
        num_held = load.pop(None, 0)
        assert all(count <= MAX_OUTSTANDING for count in load.values())
        if num_held:
            resumed = any(self.machine._requests[name].num_resumptions for name in self.machine._queue)
            full = all(load[instance_id] >= MAX_OUTSTANDING for instance_id in self.ready)
            assert full or resumed, (load, self.ready)


TestQueueWorld = QueueWorld.TestCase
TestQueueWorld.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# --- who goes next ---------------------------------------------------------------------------------------------------


def served_by_turns(order, *, num_rounds=400, seed=7, at_least=(2, 18)):
    """Two tenants who always have requests waiting, the second with nine times as many. Returns how far the
    difference of the tokens served to them wandered, and the bound of that."""
    draw = random.Random(seed)
    rules = QueueRules(max_outstanding_per_instance=2, max_held=10_000, timeout_seconds=1e6)
    machine = ClusterMachine(LeastOutstandingTokens(), BoundedQueue(max_unfinished=10**6), queue=rules, order=order)
    now = Instant(10**9)
    prompts: dict[RequestId, tuple[str, int]] = {}
    flying: dict[RequestId, InstanceId] = {}
    served: Counter[str] = Counter()
    waiting: Counter[str] = Counter()
    gaps: list[int] = []

    def feed(event):
        nonlocal now
        now = Instant(now + 1)
        for command in machine.handle(event, now):
            if isinstance(command, Dispatch):
                tenant, tokens = prompts[command.request_id]
                flying[command.request_id] = command.instance_id
                served[tenant] += tokens + 2
                waiting[tenant] -= 1

    for number in range(2):
        feed(InstanceStarted(InstanceSpec(InstanceId(f"i{number}"), InstanceLimits(num_blocks=4096))))
    index = 0
    for _ in range(num_rounds):
        for tenant, count in zip("ab", at_least, strict=True):
            while waiting[tenant] < count:
                index += 1
                name = RequestId(f"r{index}")
                prompts[name] = (tenant, draw.randint(10, 500))
                waiting[tenant] += 1
                feed(RequestArrived(Request(name, now, prompts[name][1], 100, 0, TenantId(tenant))))
        name = draw.choice(sorted(flying))
        tenant, num_output_tokens = prompts[name][0], draw.randint(1, 100)
        served[tenant] += 2 * (num_output_tokens - 1)
        instance = flying.pop(name)
        feed(FirstTokenSeen(name, instance))
        feed(RequestFinished(name, instance, num_output_tokens))
        gaps.append(served["a"] - served["b"])
    machine.check()
    # Whoever is ahead was chosen last when it was not: since then it was charged a prompt, and the output tokens of the
    # four that may be under way. (The published bound counts their prompts, too.)
    return max(gaps) - min(gaps), 2 * (500 + 2 + 2 * 4 * 99)


def test_tenants_who_wait_at_the_router_are_served_alike_within_the_bound():
    for seed in range(10):
        widest, bound = served_by_turns(FairTokens(), seed=seed)
        assert widest <= bound
        unfair, _ = served_by_turns(Fcfs(), seed=seed)
        assert unfair > 5 * bound, "otherwise the bound says nothing"


def test_weights_hold_at_the_router_too():
    order = FairTokens(weights={"b": 3.0})
    served_by_turns(order, num_rounds=200)
    counters = order.class_of(0).counters
    assert counters[TenantId("a")] == pytest.approx(counters[TenantId("b")], rel=0.05)


def test_the_longest_prefix_of_those_who_wait_at_the_router_goes_first():
    """As far as the router knows what is cached: it goes by what it sent there."""
    rules = QueueRules(max_outstanding_per_instance=1)
    machine = ClusterMachine(
        LeastOutstandingTokens(), BoundedQueue(), queue=rules, order=FairPrefix(), prefix_index=PrefixIndex()
    )
    now, here = Instant(10**9), InstanceId("i0")
    machine.handle(InstanceStarted(InstanceSpec(here, LIMITS)), now)
    for name, document in (("first", "x"), ("other", "y"), ("same", "x")):
        hashes = tuple((document, block) for block in range(4))
        machine.handle(RequestArrived(Request(RequestId(name), now, 64, 50, block_hashes=hashes)), now)
    order = []
    for name in ("first", "same"):
        machine.handle(FirstTokenSeen(RequestId(name), here), now)
        (went,) = machine.handle(RequestFinished(RequestId(name), here, 5), now)
        order.append(went.request_id)
    assert order == ["same", "other"]


def test_what_is_counted_in_the_end_is_what_was_served():
    """Dispatch charges the prompt and a token, reports the tokens that they tell of, and the end all the rest."""
    order = FairTokens()
    rules = QueueRules(max_outstanding_per_instance=1)
    machine = ClusterMachine(LeastOutstandingTokens(), BoundedQueue(), queue=rules, order=order)
    now, here, there = Instant(10**9), InstanceId("i0"), InstanceId("i1")

    def charged():
        return order.class_of(0).counters[TenantId("a")]

    for each in (here, there):
        machine.handle(InstanceStarted(InstanceSpec(each, LIMITS)), now)
    machine.handle(RequestArrived(Request(RequestId("r0"), now, 30, 50, 0, TenantId("a"))), now)
    assert charged() == 30 + 2
    for name in ("r1", "r2"):
        machine.handle(RequestArrived(Request(RequestId(name), now, 40, 50, 0, TenantId("b"))), now)
    machine.handle(FirstTokenSeen(RequestId("r0"), here), now)
    running = (SequenceReport(RequestId("r0"), 35, 1),)
    machine.handle(InstanceReported(InstanceReport(here, now, 1, 0, 1, 64, running=running)), now)
    machine.handle(RequestFinished(RequestId("r1"), there, 1), now)
    assert charged() == 30 + 2 * 6, "five were told of, and the next is on its way"
    machine.handle(RequestFinished(RequestId("r0"), here, 20), now)
    assert charged() == 30 + 2 * 20


def test_whoever_comes_back_from_a_failure_goes_ahead_of_those_who_never_went():
    rules = QueueRules(max_outstanding_per_instance=1)
    machine = ClusterMachine(LeastOutstandingTokens(), BoundedQueue(), queue=rules, order=Fcfs())
    now, here, there = Instant(10**9), InstanceId("i0"), InstanceId("i1")
    machine.handle(InstanceStarted(InstanceSpec(here, LIMITS)), now)
    for number in range(3):
        machine.handle(RequestArrived(Request(RequestId(f"r{number}"), now, 10, 10)), now)
    machine.handle(InstanceLost(here), now)
    (held,) = machine.handle(RequestFailed(RequestId("r0"), here, "lost with it"), now)
    assert isinstance(held, Hold)
    (command,) = machine.handle(InstanceStarted(InstanceSpec(there, LIMITS)), now)
    assert (command.request_id, command.instance_id) == ("r0", there)


def test_a_class_goes_first_at_the_router():
    rules = QueueRules(max_outstanding_per_instance=1)
    machine = ClusterMachine(LeastOutstandingTokens(), BoundedQueue(), queue=rules, order=StrictPriority())
    now, here = Instant(10**9), InstanceId("i0")
    machine.handle(InstanceStarted(InstanceSpec(here, LIMITS)), now)
    for number, priority in enumerate((0, 5, 5, -1)):
        (command,) = machine.handle(RequestArrived(Request(RequestId(f"r{number}"), now, 10, 10, priority)), now)
        assert isinstance(command, Hold if number else Dispatch)
        if number:
            assert command.reason == "no instance can take it: those of 1 that could have 1 requests each"
            assert command.admission, "why it was let in is said once"
    went = []
    for name in ("r0", "r3", "r1"):
        (command,) = machine.handle(RequestFinished(RequestId(name), here, 1), now)
        went.append((command.request_id, command.admission))
    assert went == [("r3", ""), ("r1", ""), ("r2", "")]


def test_whoever_waits_too_long_is_refused_and_leaves_no_trace():
    rules = QueueRules(max_outstanding_per_instance=1, timeout_seconds=5.0, max_held=1)
    machine = ClusterMachine(LeastOutstandingTokens(), BoundedQueue(), queue=rules, order=FairTokens())
    now, here = Instant(10**9), InstanceId("i0")
    machine.handle(InstanceStarted(InstanceSpec(here, LIMITS)), now)
    for number in range(3):
        (command,) = machine.handle(RequestArrived(Request(RequestId(f"r{number}"), now, 10, 10)), now)
    assert isinstance(command, Reject)
    assert command.status == 503
    deadline = machine.next_deadline()
    assert deadline == Instant(now + seconds(5))
    (command,) = machine.expire(deadline)
    assert (type(command), command.request_id) == (Reject, "r1")
    machine.check()
    assert machine.unfinished() == ["r0"]


def test_an_order_policy_that_gives_who_does_not_wait_is_named():
    class Wrong(Fcfs):
        def open(self, view, pool):
            return InOrder(["nobody"] if pool is Pool.WAITING else view.running)

    rules = QueueRules(max_outstanding_per_instance=1)
    machine = ClusterMachine(LeastOutstandingTokens(), BoundedQueue(), queue=rules, order=Wrong())
    machine.handle(InstanceStarted(InstanceSpec(InstanceId("i0"), LIMITS)), Instant(1))
    with pytest.raises(PolicyError, match="Wrong gave 'nobody'"):
        machine.handle(RequestArrived(Request(RequestId("r"), Instant(1), 10, 10)), Instant(1))


def test_without_a_limit_nothing_is_asked_of_an_order_policy():
    queue = RouterQueue(QueueRules(), FairTokens())
    assert not queue.is_ordered
    assert queue.max_outstanding is None
    assert QueueRules() == QueueRules(0, 1024, 60.0)
    assert Duration(seconds(QueueRules().timeout_seconds)) == seconds(60)


def test_a_mistake_of_the_machine_is_not_laid_at_the_order_s_door(monkeypatch):
    rules = QueueRules(max_outstanding_per_instance=1)
    machine = ClusterMachine(LeastOutstandingTokens(), BoundedQueue(), queue=rules, order=Fcfs())
    machine.handle(InstanceStarted(InstanceSpec(InstanceId("i0"), LIMITS)), Instant(1))
    monkeypatch.setattr(machine, "_dispatch", lambda tracked, pick: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        machine.handle(RequestArrived(Request(RequestId("r"), Instant(1), 10, 10)), Instant(1))
