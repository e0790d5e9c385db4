"""The instance machine, case by case: each of these went wrong once, or would where a line of it is left out."""

import pytest

from rota.base.errors import LawBroken, PolicyError, StarvationError
from rota.base.instant import Instant
from rota.serving.api import EVERYTHING
from rota.serving.instance.machine import InstanceMachine
from rota.serving.model.commands import RejectSequence
from rota.serving.model.events import SequenceAborted, SequenceArrived, StepFinished
from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import Request, RequestId
from rota.serving.policies.batch.prefill_first import PrefillFirst
from rota.serving.policies.batch.vllm_default import VllmDefault
from rota.serving.policies.memory.recompute_last import RecomputeLast
from rota.serving.policies.memory.recompute_lowest import RecomputeLowest
from rota.serving.policies.order.fcfs import Fcfs
from rota.serving.policies.order.strict_priority import StrictPriority
from rota.serving.stack import EnginePolicies
from rota.testing.worlds import Job, Workload, check_same_rows, play

MS = 1_000_000


def request(number, at, num_prompt, num_output, priority=0, family=None):
    """With a family, prompts are hashed in blocks of 4 and agree as far as they go."""
    hashes = tuple((family, block) for block in range(num_prompt // 4)) if family else ()
    return Request(RequestId(f"r{number}"), Instant(at), num_prompt, num_output, priority=priority, block_hashes=hashes)


def job(number, at, num_prompt, num_output, priority=0, family=None):
    return Job(request(number, at, num_prompt, num_output, priority, family), num_output)


def machine_with(limits, batch=None, order=None):
    return InstanceMachine(limits, order=order or Fcfs(), batch=batch or VllmDefault(), memory=RecomputeLowest())


def grants(played):
    return [dict(step.grants) for step in played.steps()]


def test_ageing_is_asked_for_every_step():
    """Two end in one step, in an order that ageing turns round on the way there. Whose blocks leave the cache first
    follows from it."""
    jobs = (
        job(0, 0, 8, 30, priority=2, family="A"),
        job(1, 1, 8, 29, family="B"),
        job(2, 100 * MS, 40, 1),
        job(3, 200 * MS, 9, 2, family="A"),
    )
    workload = Workload(InstanceLimits(num_blocks=20, block_size=4), jobs)

    def policies():
        return EnginePolicies(StrictPriority(ageing_seconds=0.01), VllmDefault(), RecomputeLowest())

    check_same_rows(play(workload, policies()), play(workload, policies(), steady=False), "leap")


class PrefillsThenQueueThenDecodes:
    requires = EVERYTHING
    shape = None

    def plan(self, draft, order):
        running = list(draft.view.running)
        waiting = list(draft.view.waiting)
        for sequence in [each for each in running if each.num_pending_tokens > 1] + waiting:
            if not draft.num_preempted:
                draft.grant(sequence, 4)
        for sequence in [each for each in running if each.num_pending_tokens == 1]:
            draft.grant(sequence, 1)


def test_nobody_is_preempted_whose_blocks_were_just_shared():
    """r1 is to fill a block in this step, r2 is admitted upon it, and then r0 lacks one."""
    limits = InstanceLimits(num_blocks=6, block_size=4, reserve_full_prompt=False)
    jobs = (job(0, 0, 1, 12), job(1, 1, 20, 3, family="A"), job(2, 3_300_000, 20, 3, family="A"))
    played = play(Workload(limits, jobs), EnginePolicies(Fcfs(), PrefillsThenQueueThenDecodes(), RecomputeLowest()))
    assert played.statistics.num_preemptions


def test_a_sequence_that_has_ended_is_not_granted():
    class Keeps(VllmDefault):
        shape = None
        kept = None

        def plan(self, draft, order):
            self.kept = self.kept or next(iter(draft.view.waiting))
            draft.grant(self.kept, 1)

    machine = machine_with(InstanceLimits(num_blocks=10), Keeps())
    machine.handle(SequenceArrived(request(0, 0, 1, 5)), Instant(0))
    machine.handle(StepFinished(1, finished=(RequestId("r0"),)), Instant(2))
    with pytest.raises(PolicyError, match="has ended"):
        machine.handle(SequenceArrived(request(1, 0, 5, 5)), Instant(3))


def test_nobody_ends_who_does_not_run():
    machine = machine_with(InstanceLimits(num_blocks=10))
    machine.handle(SequenceArrived(request(0, 0, 1, 5)), Instant(0))
    machine.handle(SequenceAborted(RequestId("r0")), Instant(1))
    machine.handle(SequenceArrived(request(0, 1, 1, 5)), Instant(1))
    with pytest.raises(LawBroken, match="law 2"):
        machine.handle(StepFinished(1, finished=(RequestId("r0"),)), Instant(2))


def test_nobody_is_displaced_for_blocks_that_are_only_passed_on():
    """r2 outranks r0 and shares five blocks with it; what r0 gives back is what r2 takes again, which is too little."""
    jobs = (job(0, 0, 21, 3, 2, "A"), job(1, 1, 13, 3), job(2, 2, 29, 3, family="A"))
    played = play(
        Workload(InstanceLimits(num_blocks=10, block_size=4), jobs),
        EnginePolicies(StrictPriority(), VllmDefault(), RecomputeLowest()),
    )
    assert played.statistics.num_preemptions == 0


def test_blocks_that_only_victims_share_are_room():
    """r0 and r1 share all but their last block. Each alone gives back one, both together all of them."""
    jobs = (job(0, 0, 21, 9, 2, "A"), job(1, MS, 21, 9, 2, "A"), job(2, 3 * MS, 36, 3))
    played = play(
        Workload(InstanceLimits(num_blocks=10, block_size=4), jobs),
        EnginePolicies(StrictPriority(), VllmDefault(), RecomputeLowest()),
    )
    displacing = next(step for step in played.steps() if step.preempted)
    assert set(displacing.preempted) == {"r0", "r1"}
    assert displacing.grants == (("r2", 36),)


def test_a_prefill_in_chunks_leaves_tokens_to_start_with():
    limits = InstanceLimits(num_blocks=100, block_size=4, max_num_batched_tokens=20, long_prefill_token_threshold=8)
    jobs = (job(0, 0, 100, 2, 1), job(1, 1, 5, 2))
    played = play(Workload(limits, jobs), EnginePolicies(StrictPriority(), VllmDefault(), RecomputeLowest()))
    assert played.statistics.num_preemptions == 0


def test_nobody_is_displaced_for_tokens_that_go_to_another():
    """r1 starts beside r0 and takes all tokens that are left, and would take the one that r0 gave up as well; so r0
    need not go for r2."""
    limits = InstanceLimits(num_blocks=100, block_size=4, max_num_batched_tokens=8)
    jobs = (job(0, 0, 4, 20, 1), job(1, 1, 20, 2), job(2, 2, 20, 2))
    played = play(Workload(limits, jobs), EnginePolicies(StrictPriority(), VllmDefault(), RecomputeLowest()))
    assert played.statistics.num_preemptions == 0
    assert grants(played)[1] == {"r0": 1, "r1": 7}


def test_the_lowest_class_is_displaced_first():
    """r0 is of class 2, and r1, admitted after it, of class 1; r2 needs one slot."""
    limits = InstanceLimits(num_blocks=100, block_size=4, max_num_seqs=2)
    jobs = (job(0, 0, 4, 20, 2), job(1, 1, 4, 20, 1), job(2, 5 * MS, 4, 2))
    played = play(Workload(limits, jobs), EnginePolicies(StrictPriority(), VllmDefault(), RecomputeLowest()))
    assert [step.preempted for step in played.steps() if step.preempted] == [("r0",)]


def test_prefills_and_decodes_do_not_preempt_each_other_for_ever():
    limits = InstanceLimits(
        num_blocks=6,
        block_size=16,
        max_num_seqs=2,
        max_num_batched_tokens=3,
        enable_prefix_caching=False,
        reserve_full_prompt=False,
    )
    jobs = (job(0, 0, 1, 1), job(1, 0, 1, 19), job(2, 0, 49, 19))
    play(Workload(limits, jobs), EnginePolicies(Fcfs(), PrefillFirst(), RecomputeLowest()))


def test_who_preempts_itself_does_not_hold_up_those_behind():
    """r1 of the higher class was admitted last and so is the victim of its own growth; r0 decodes on."""
    limits = InstanceLimits(num_blocks=6, block_size=4, enable_prefix_caching=False)
    jobs = (job(0, 0, 6, 12, 1), job(1, 1, 7, 12))
    played = play(Workload(limits, jobs), EnginePolicies(StrictPriority(), VllmDefault(), RecomputeLast()))
    preempting = next(step for step in played.steps() if step.preempted)
    assert preempting.preempted == ("r1",)
    assert dict(preempting.grants)["r0"] == 1


def test_what_can_never_run_is_refused_with_a_reason():
    machine = machine_with(InstanceLimits(num_blocks=4, block_size=4))
    for bad in (request(0, 0, 16, 1), request(1, 0, 0, 1), request(2, 0, 1, 0)):
        (command,) = machine.handle(SequenceArrived(bad), Instant(0))
        assert isinstance(command, RejectSequence)
        assert command.reason
    assert machine.handle(SequenceArrived(request(3, 0, 15, 99)), Instant(0))
    (command,) = machine.handle(SequenceArrived(request(3, 0, 15, 99)), Instant(0))
    assert "already" in command.reason


def test_the_longest_sequence_ends_with_its_last_slot():
    played = play(
        Workload(InstanceLimits(num_blocks=4, block_size=4), (job(0, 0, 15, 99),)),
        EnginePolicies(Fcfs(), VllmDefault(), RecomputeLowest()),
    )
    assert played.ends[RequestId("r0")].num_output_tokens == 1


def test_granting_nothing_names_who_starves():
    class Nothing(VllmDefault):
        shape = None

        def plan(self, draft, order):
            pass

    machine = machine_with(InstanceLimits(num_blocks=4), Nothing())
    with pytest.raises(StarvationError, match="r7 starves"):
        machine.handle(SequenceArrived(request(7, 0, 5, 5)), Instant(0))


@pytest.mark.parametrize("num_granted", [1, 2])
def test_a_policy_that_fails_leaves_no_trace(num_granted):
    class Fails(VllmDefault):
        shape = None
        is_broken = False

        def plan(self, draft, order):
            for sequence in [*draft.view.running, *draft.view.waiting][:num_granted]:
                draft.grant(sequence, 3)
            if self.is_broken:
                raise RuntimeError("a bug of the policy's own")

    batch = Fails()
    machine = machine_with(InstanceLimits(num_blocks=10, block_size=4), batch)
    machine.handle(SequenceArrived(request(0, 0, 9, 5, family="A")), Instant(0))
    machine.handle(SequenceArrived(request(1, 0, 9, 5, family="A")), Instant(0))
    before = machine.statistics(), [repr(each) for each in (*machine.running, *machine.waiting)]
    batch.is_broken = True
    with pytest.raises(RuntimeError):
        machine.handle(StepFinished(1), Instant(1))
    machine.check()
    after = machine.statistics(), [repr(each) for each in (*machine.running, *machine.waiting)]
    assert before[0].num_free_blocks == after[0].num_free_blocks
    assert before[1] == after[1]


@pytest.mark.parametrize(
    ("event", "law"),
    [
        (StepFinished(2), "step 2 finished, but 1"),
        ("a word", "cannot handle str"),
    ],
)
def test_a_host_that_breaks_its_side_is_told(event, law):
    machine = machine_with(InstanceLimits(num_blocks=10))
    machine.handle(SequenceArrived(request(0, 0, 9, 5)), Instant(0))
    with pytest.raises(LawBroken, match=law):
        machine.handle(event, Instant(0))


def test_time_does_not_go_back():
    machine = machine_with(InstanceLimits(num_blocks=10))
    machine.handle(SequenceArrived(request(0, 0, 9, 5)), Instant(5))
    with pytest.raises(LawBroken, match="law 5"):
        machine.handle(SequenceAborted(RequestId("r0")), Instant(4))
