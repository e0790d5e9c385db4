"""Every built-in policy of an engine keeps the contract of its kind, and a broken one of each sort is caught."""

import itertools
import random
import time

import pytest

from rota.base.errors import LawBroken, PolicyError, StarvationError
from rota.serving.api import BatchShape, Capability, OnRefusal, Pool
from rota.serving.policies.batch import BATCH
from rota.serving.policies.batch.passes import fill
from rota.serving.policies.batch.prefill_first import PrefillFirst
from rota.serving.policies.batch.stall_free_chunks import StallFreeChunks
from rota.serving.policies.batch.vllm_default import VllmDefault
from rota.serving.policies.memory import MEMORY
from rota.serving.policies.memory.recompute_cheapest import RecomputeCheapest
from rota.serving.policies.memory.recompute_last import RecomputeLast
from rota.serving.policies.memory.recompute_lowest import RecomputeLowest
from rota.serving.policies.order import ORDER
from rota.serving.policies.order.earliest_deadline import EarliestDeadline
from rota.serving.policies.order.fair_prefix import FairPrefix
from rota.serving.policies.order.fair_tokens import FairTokens
from rota.serving.policies.order.fcfs import Fcfs, InOrder
from rota.serving.policies.order.highest_response_ratio import HighestResponseRatio
from rota.serving.policies.order.least_attained_service import LeastAttainedService
from rota.serving.policies.order.least_slack import LeastSlack
from rota.serving.policies.order.shortest_predicted_first import ShortestPredictedFirst
from rota.serving.policies.order.skip_join_mlfq import SkipJoinMlfq
from rota.serving.policies.order.skip_predict import SkipPredict
from rota.serving.policies.order.strict_priority import StrictPriority
from rota.serving.predictors.length.declared import Declared
from rota.serving.predictors.length.history import History
from rota.testing import check_batch_policy, check_memory_policy, check_order_policy

DECLARED = Declared()
SOUND_ORDERS = {
    "earliest_deadline": lambda: EarliestDeadline(displace=True),
    "earliest_deadline, of those who wait": EarliestDeadline,
    "fair_prefix": lambda: FairPrefix(quantum_tokens=20),
    "fair_tokens": FairTokens,
    "fcfs": Fcfs,
    "highest_response_ratio": lambda: HighestResponseRatio(lengths=History(num_least=2)),
    "least_attained_service": lambda: LeastAttainedService(quantum_tokens=4, preempted_at_most=3),
    "least_slack": lambda: LeastSlack(lengths=History(num_least=2), displace=True),
    "least_slack, of those who wait": lambda: LeastSlack(lengths=DECLARED),
    "shortest_predicted_first": lambda: ShortestPredictedFirst(
        lengths=History(num_least=2), starvation_steps=6, promoted_tokens=2, bucket_tokens=2
    ),
    "shortest_predicted_first, unguarded": lambda: ShortestPredictedFirst(lengths=DECLARED, starvation_steps=0),
    "shortest_predicted_first, skipping": lambda: ShortestPredictedFirst(lengths=DECLARED, skip_refused=True),
    "skip_join_mlfq": lambda: SkipJoinMlfq(starvation_seconds=0.02, sweep_steps=3, base_ms=2, prefill_us_per_token=500),
    "skip_predict": lambda: SkipPredict(
        lengths=History(num_least=2), quick_lengths=DECLARED, short_tokens=6, bucket_tokens=2
    ),
    "strict_priority": StrictPriority,
    "strict_priority, ageing fast": lambda: StrictPriority(ageing_seconds=0.003),
    "strict_priority, ageing": lambda: StrictPriority(ageing_seconds=0.05, top=1),
}
SOUND_BATCHES = {
    "vllm_default": VllmDefault,
    "prefill_first": PrefillFirst,
    "stall_free_chunks": StallFreeChunks,
    "stall_free_chunks, small": lambda: StallFreeChunks(chunk_size=5),
}
SOUND_MEMORIES = {
    "recompute_cheapest": RecomputeCheapest,
    "recompute_cheapest, at most once": lambda: RecomputeCheapest(preempted_at_most=1),
    "recompute_last": RecomputeLast,
    "recompute_lowest": RecomputeLowest,
}


@pytest.mark.parametrize(
    ("registry", "sound"), [(ORDER, SOUND_ORDERS), (BATCH, SOUND_BATCHES), (MEMORY, SOUND_MEMORIES)]
)
def test_every_policy_is_here(registry, sound):
    assert {name.partition(",")[0] for name in sound} == set(registry.table)


IS_SLOW = {"strict_priority, ageing fast", "strict_priority, ageing"}
OF_FEW_EXAMPLES = {name for name in SOUND_ORDERS if not name.startswith(("fair_tokens", "fcfs", "strict_priority"))}
"""Orders that displace are asked about each pair of sequences in each step, which takes long."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in OF_FEW_EXAMPLES | IS_SLOW)) for name in SOUND_ORDERS],
)
def test_order(name):
    check_order_policy(SOUND_ORDERS[name], **({"max_examples": 2} if name in OF_FEW_EXAMPLES else {}))


@pytest.mark.parametrize("name", SOUND_BATCHES)
def test_batch(name):
    check_batch_policy(SOUND_BATCHES[name])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * ("," in name)) for name in SOUND_MEMORIES]
)
def test_memory(name):
    check_memory_policy(SOUND_MEMORIES[name])


# --- broken orders ----------------------------------------------------------------------------------------------------


class Skipping(InOrder):
    def refused(self, sequence, why):
        return OnRefusal.SKIP


class GivesTwice(Fcfs):
    def open(self, view, pool):
        sequences = list(view.running if pool is Pool.RUNNING else view.waiting)
        return InOrder(iter([*sequences, *sequences[:1]]))


class GivesTheOtherPool(Fcfs):
    def open(self, view, pool):
        return InOrder(iter([*view.running, *view.waiting]))


class Remembers(Fcfs):
    """Gives sequences that have ended, from an older list."""

    def __init__(self):
        self.seen = {}

    def open(self, view, pool):
        if pool is Pool.RUNNING:
            return super().open(view, pool)
        self.seen.update((sequence.id, sequence) for sequence in view.waiting)
        return InOrder(iter(self.seen.values()))


class ForgetsTheLowest(Fcfs):
    requires = frozenset({Capability.ORDER_WAITING})

    def open(self, view, pool):
        if pool is Pool.RUNNING:
            return super().open(view, pool)
        return InOrder(iter([sequence for sequence in view.waiting if sequence.priority < 2]))


class LastComeUnstated(Fcfs):
    def open(self, view, pool):
        if pool is Pool.RUNNING:
            return super().open(view, pool)
        return InOrder(iter(list(view.waiting)[::-1]))


class LastRunningUnstated(Fcfs):
    def open(self, view, pool):
        return InOrder(iter(view.running[::-1])) if pool is Pool.RUNNING else super().open(view, pool)


class SkipsUnstated(Fcfs):
    def open(self, view, pool):
        return Skipping(iter(view.running if pool is Pool.RUNNING else view.waiting))


class SortsTheView(StrictPriority):
    def open(self, view, pool):
        view.running.sort(key=lambda sequence: sequence.priority)
        return super().open(view, pool)


class LiftsUp(StrictPriority):
    def open(self, view, pool):
        for sequence in view.waiting:
            sequence.priority = 0
        return super().open(view, pool)


class DisplacesEquals(StrictPriority):
    def displaces(self, view, waiting, running):
        return waiting.priority <= running.priority


class DisplacesBothWays(StrictPriority):
    def displaces(self, view, waiting, running):
        return waiting.priority != running.priority


class DisplacesUnstated(Fcfs):
    def displaces(self, view, waiting, running):
        return waiting.priority < running.priority


class DisplacesOne(StrictPriority):
    """Only those one class below, though lower ones rank behind them."""

    def displaces(self, view, waiting, running):
        return waiting.priority == running.priority - 1


class DisplacingWithoutCapability(StrictPriority):
    requires = frozenset({Capability.ORDER_WAITING, Capability.ORDER_RUNNING})


class ByName(Fcfs):
    requires = frozenset({"magic"})


class Own(Fcfs):
    requires = frozenset({Capability.ORDER_WAITING, Capability.ORDER_RUNNING})
    running_order = "own"

    def open(self, view, pool):
        sequences = list(view.running if pool is Pool.RUNNING else view.waiting)
        return InOrder(iter(sorted(sequences, key=lambda sequence: self.rank(view, sequence))))


class ByTheClockOnTheWall(Own):
    def rank(self, view, sequence):
        return time.perf_counter_ns() % 1009


class ByChance(Own):
    def rank(self, view, sequence):
        return random.random()


class ByTheDateOfRelease(Own):
    def rank(self, view, sequence):
        return sequence.queue_position if view.now < 10**12 else -sequence.queue_position


class LeastServedByItsOwnCount(Own):
    """Charges in its cursor, which hears nothing of the steps that are repeated, and does not say so."""

    repeatable = True

    def __init__(self):
        self.served = {}

    def open(self, view, pool):
        cursor = super().open(view, pool)
        served = self.served

        class Charging(InOrder):
            def granted(self, sequence, num_tokens):
                served[sequence.priority] = served.get(sequence.priority, 0) + num_tokens

        return Charging(cursor._sequences)

    def rank(self, view, sequence):
        return self.served.get(sequence.priority, 0), sequence.id


BROKEN_ORDERS = {
    GivesTwice: "twice",
    GivesTheOtherPool: "not among them",
    Remembers: "not among them",
    ForgetsTheLowest: "starves|unfinished",
    LastComeUnstated: "does not state",
    LastRunningUnstated: "does not state",
    SkipsUnstated: "skips",
    SortsTheView: "law 13",
    LiftsUp: "law 13",
    DisplacesEquals: "law 14",
    DisplacesBothWays: "law 14",
    DisplacesUnstated: "displacing is False",
    DisplacesOne: "displaces",
    DisplacingWithoutCapability: "does not require it",
    ByName: "Capability values",
    ByTheClockOnTheWall: "law 8",
    ByChance: "law 8",
    ByTheDateOfRelease: "law 8: at another time",
    LeastServedByItsOwnCount: "law 15",
}


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize("broken", BROKEN_ORDERS)
def test_a_broken_order_is_caught(broken):
    with pytest.raises((LawBroken, StarvationError), match=BROKEN_ORDERS[broken]):
        check_order_policy(broken, max_examples=300)


# --- broken batches ---------------------------------------------------------------------------------------------------


class GrantsNothing(VllmDefault):
    def plan(self, draft, order):
        pass


class NeverAdmitsASecond(VllmDefault):
    def plan(self, draft, order):
        if len(draft.view.running):
            for sequence in list(draft.view.running):
                draft.grant(sequence, sequence.num_pending_tokens)
        else:
            fill(draft, order, self.shape)


class HalfServes(VllmDefault):
    def plan(self, draft, order):
        running = draft.view.running
        for sequence in running[: max(1, len(running) // 2)]:
            draft.grant(sequence, sequence.num_pending_tokens)
        if not running:
            fill(draft, order, self.shape)


class AnotherShapeThanItSays(VllmDefault):
    def plan(self, draft, order):
        fill(draft, order, BatchShape(decodes_first=True))


class OverItsOwnBudget(StallFreeChunks):
    def __init__(self):
        super().__init__(chunk_size=4)

    def plan(self, draft, order):
        fill(draft, order, BatchShape(decodes_first=True))


class ShapeWithoutCapability(VllmDefault):
    shape = BatchShape(admit_before_running=True)


class FreeWithoutCapability(VllmDefault):
    shape = None


class GrantsTwice(VllmDefault):
    def plan(self, draft, order):
        fill(draft, order, self.shape)
        for sequence in draft.view.running:
            draft.grant(sequence, 1)


class ReachesBehindTheDraft(VllmDefault):
    def plan(self, draft, order):
        draft.grants.clear()


class WritesToSequences(VllmDefault):
    def plan(self, draft, order):
        for sequence in draft.view.running:
            sequence.num_computed_tokens = max(0, sequence.num_computed_tokens - 1)
        fill(draft, order, self.shape)


class ChunksByChance(VllmDefault):
    requires = frozenset({Capability.FREE_BATCH})
    shape = None

    def plan(self, draft, order):
        for pool in Pool:
            cursor = order.open(draft.view, pool)
            while draft.token_budget and not draft.num_preempted and (sequence := cursor.next()) is not None:
                if not isinstance(draft.grant(sequence, random.randint(1, sequence.num_pending_tokens)), int):
                    break


BROKEN_BATCHES = {
    GrantsNothing: "law 7",
    NeverAdmitsASecond: "law 7|another batch",
    HalfServes: "law 7",
    AnotherShapeThanItSays: "composes another batch|law 7",
    OverItsOwnBudget: "law 4",
    ShapeWithoutCapability: "does not require it",
    FreeWithoutCapability: "does not require it",
    GrantsTwice: "twice",
    ReachesBehindTheDraft: "does not offer",
    WritesToSequences: "law 13",
    ChunksByChance: "law 8",
}


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize("broken", BROKEN_BATCHES)
def test_a_broken_batch_is_caught(broken):
    with pytest.raises((LawBroken, StarvationError, PolicyError), match=BROKEN_BATCHES[broken]):
        check_batch_policy(broken, max_examples=300)


# --- broken memories --------------------------------------------------------------------------------------------------


class NamesTheNeedy(RecomputeLowest):
    """Also when it is not among the candidates any more, or waits."""

    seen = None

    def victim(self, view, candidates, needy):
        before, self.seen = self.seen, candidates[0]
        return before or candidates[-1]


class NamesNobody(RecomputeLowest):
    def victim(self, view, candidates, needy):
        return None


class NamesTheFirst(RecomputeLowest):
    def victim(self, view, candidates, needy):
        return candidates[0]


class NamesTheFirstFreely(NamesTheFirst):
    """Which it may. But then two that do not fit together preempt each other for ever."""

    requires = frozenset({Capability.PREEMPT_RECOMPUTE, Capability.CHOOSE_VICTIM})
    victim_order = "chosen"


class ChoosesAndDoesNotSaySo(RecomputeLowest):
    victim_order = "chosen"


class NamesAnotherInEachRun(RecomputeLowest):
    """Not by chance: two runs of few choices may agree by chance, and then another law is the first to break."""

    requires = frozenset({Capability.PREEMPT_RECOMPUTE, Capability.CHOOSE_VICTIM})
    victim_order = "chosen"
    runs = itertools.count()

    def __init__(self):
        super().__init__()
        self.first = next(self.runs)

    def victim(self, view, candidates, needy):
        first, self.first = self.first, None
        return super().victim(view, candidates, needy) if first is None else candidates[first % len(candidates)]


class TakesFromTheList(RecomputeLowest):
    def victim(self, view, candidates, needy):
        return candidates.pop()


class AnnouncesNothing(RecomputeLowest):
    victim_order = "whoever"


BROKEN_MEMORIES = {
    NamesTheNeedy: "not among the candidates|law 13|victim_order",
    NamesNobody: "starves",
    NamesTheFirst: "victim_order",
    NamesTheFirstFreely: "law 6",
    ChoosesAndDoesNotSaySo: "does not go with",
    NamesAnotherInEachRun: "law 8",
    TakesFromTheList: "law 13",
    AnnouncesNothing: "victim_order",
}


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize("broken", BROKEN_MEMORIES)
def test_a_broken_memory_is_caught(broken):
    with pytest.raises((LawBroken, StarvationError), match=BROKEN_MEMORIES[broken]):
        check_memory_policy(broken, max_examples=300)
