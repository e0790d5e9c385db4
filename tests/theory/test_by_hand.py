"""Schedules worked out by hand, to the nanosecond. A step takes 1 ms and 10 µs a token, and 100 ns a token of context
that its sequences read."""

from rota.base.instant import Duration, Instant
from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import Request, RequestId
from rota.serving.policies.batch.prefill_first import PrefillFirst
from rota.serving.policies.batch.stall_free_chunks import StallFreeChunks
from rota.serving.policies.batch.vllm_default import VllmDefault
from rota.serving.policies.memory.recompute_last import RecomputeLast
from rota.serving.policies.memory.recompute_lowest import RecomputeLowest
from rota.serving.policies.order.fcfs import Fcfs
from rota.serving.policies.order.strict_priority import StrictPriority
from rota.serving.predictors.step_time.affine import AffineStepTime
from rota.serving.stack import EnginePolicies
from rota.testing.worlds import End, Job, Workload, play

PACE = AffineStepTime(base_ms=1.0, token_us=10.0, kv_token_ns=100.0)
US = 1_000


def step(num_tokens, num_context_tokens):
    return 1_000_000 + 10_000 * num_tokens + 100 * num_context_tokens


def job(number, at, num_prompt, num_output, priority=0, family=None, leaves_after=None):
    hashes = tuple((family, block) for block in range(num_prompt // 4)) if family else ()
    request = Request(
        RequestId(f"r{number}"), Instant(at), num_prompt, num_output, priority=priority, block_hashes=hashes
    )
    return Job(request, num_output, None if leaves_after is None else Duration(leaves_after))


def schedule(jobs, *, order=None, batch=None, memory=None, leap=True, **limits):
    """(first token, end) of each request, in microseconds where they are whole."""
    settings = {"num_blocks": 100, "block_size": 4, **limits}
    policies = EnginePolicies(order or Fcfs(), batch or VllmDefault(), memory or RecomputeLowest())
    played = play(Workload(InstanceLimits(**settings), tuple(jobs)), policies, leap=leap, step_time=PACE)
    return played, {key: (played.first_token_at.get(key), end.at) for key, end in played.ends.items()}


def test_one_request():
    """A prompt of 10 tokens; the second and third token are steps of one token over what came before."""
    prefill = step(10, 0)
    decodes = step(1, 11) + step(1, 12)
    _, times = schedule([job(0, 500, 10, 3)])
    assert times == {"r0": (500 + prefill, 500 + prefill + decodes)}


def test_a_prompt_in_chunks():
    """10 tokens with 4 a step: 4, 4 and 2; each chunk reads the ones before it."""
    _, times = schedule([job(0, 0, 10, 1)], max_num_batched_tokens=4)
    end = step(4, 0) + step(4, 4) + step(2, 8)
    assert times == {"r0": (end, end)}


def test_who_comes_in_the_midst_of_a_step_joins_the_next():
    """r1 comes while the first of r0's decodes is under way, which ends first."""
    first = step(10, 0)
    joined_at = first + step(1, 11)
    both = step(1 + 5, 12)
    after_both = step(2, 13 + 6)
    for leap in (True, False):
        _, times = schedule([job(0, 0, 10, 5), job(1, first + 1, 5, 2)], leap=leap)
        end_of_r1 = joined_at + both + after_both
        assert times["r1"] == (joined_at + both, end_of_r1)
        assert times["r0"] == (first, end_of_r1 + step(1, 14))


def test_who_comes_at_the_very_end_of_a_step_misses_the_one_that_begins_there():
    """At one instant the step ends first, and with it the next begins. r1 has the engine to itself after that."""
    first = step(10, 0)
    for leap in (True, False):
        _, times = schedule([job(0, 0, 10, 3), job(1, first + step(1, 11), 5, 1)], leap=leap)
        assert times["r1"][0] == first + step(1, 11) + step(1, 12) + step(5, 0)


def test_prefill_first_makes_the_decode_wait():
    """r0 decodes only when r1's prompt is through, in two chunks."""
    first = step(4, 0)
    chunks = step(8, 0) + step(4, 8)
    _, times = schedule([job(0, 0, 4, 2), job(1, 1, 12, 1)], batch=PrefillFirst(), max_num_batched_tokens=8)
    assert times["r1"] == (first + chunks, first + chunks)
    assert times["r0"] == (first, first + chunks + step(1, 5))


def test_stall_free_chunks_does_not():
    """The same with chunks of 8: r0's decode takes one token of the first, and r1 gets 7 and then 5."""
    first = step(4, 0)
    mixed = step(8, 5)
    _, times = schedule([job(0, 0, 4, 2), job(1, 1, 12, 1)], batch=StallFreeChunks(chunk_size=8))
    assert times["r0"] == (first, first + mixed)
    assert times["r1"] == (first + mixed + step(5, 7),) * 2


def test_a_cached_prefix_is_not_computed_again():
    """r1 has r0's prompt: 2 of its 3 full blocks are found; the last token must be computed for its logits."""
    played, times = schedule([job(0, 0, 12, 1, family="A"), job(1, 5_000 * US, 12, 1, family="A")])
    assert times["r1"][0] == 5_000 * US + step(4, 8)
    assert played.statistics.num_cached_tokens == 8


def test_a_higher_class_displaces():
    """One slot. r1 of the higher class comes during r0's second decode. r0 goes, and comes back for the tokens that its
    last block did not hold: 6 tokens were computed, of which one full block of 4 is found again."""
    first = step(4, 0) + step(1, 5)
    comes_at = first + 1
    second = first + step(1, 6)
    served = second + step(3, 0)
    back = served + step(3, 4)
    played, times = schedule(
        [job(0, 0, 4, 5, priority=1), job(1, comes_at, 3, 1)], order=StrictPriority(), max_num_seqs=1
    )
    assert times["r1"] == (served, served)
    assert times["r0"] == (step(4, 0), back + step(1, 8))
    assert played.statistics.num_preemptions == 1


def test_memory_runs_out():
    """4 blocks of 4 slots. Both prompts take 2 blocks; when r0 has 8 tokens and needs a third block, r1 goes. It comes
    back when r0 has ended."""
    first = step(7, 0)
    both = step(1 + 7, 8)
    r0_alone = step(1, 9)
    end_of_r0 = first + both + r0_alone
    played, times = schedule(
        [job(0, 0, 7, 3), job(1, 1, 7, 2)], memory=RecomputeLast(), num_blocks=4, enable_prefix_caching=False
    )
    assert times["r0"] == (first, end_of_r0)
    assert times["r1"] == (first + both, end_of_r0 + step(8, 0))
    assert [each.preempted for each in played.steps() if each.preempted] == [("r1",)]


def test_a_client_who_leaves_frees_its_place_after_the_step():
    first = step(4, 0)
    played, times = schedule([job(0, 0, 4, 50, leaves_after=first + 10), job(1, 1, 4, 1)], max_num_seqs=1)
    assert played.ends["r0"] == End("aborted", first + 10)
    assert times["r1"][0] == first + step(1, 5) + step(4, 0)
