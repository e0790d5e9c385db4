"""Swap to host memory: no block leaks, no token is lost or doubled, and nobody reads what has not arrived."""

from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.command_line import rota

from rota.base.config import load_toml
from rota.base.errors import CapabilityError, ConfigError, LawBroken
from rota.base.instant import Instant
from rota.runtime.simulation import SimulationLoop
from rota.serving.engines.vllm.hosting import VLLM_CAPABILITIES
from rota.serving.instance.host_memory import HostMemory
from rota.serving.model.commands import RunStep, SwapIn, SwapOut
from rota.serving.model.events import SequenceResumed
from rota.serving.model.instance import InstanceLimits
from rota.serving.model.request import Request, RequestId
from rota.serving.model.swapping import SwapRules
from rota.serving.policies.batch.stall_free_chunks import StallFreeChunks
from rota.serving.policies.batch.vllm_default import VllmDefault
from rota.serving.policies.memory.recompute_cheapest import RecomputeCheapest
from rota.serving.policies.memory.recompute_lowest import RecomputeLowest
from rota.serving.policies.order.fcfs import Fcfs
from rota.serving.policies.order.strict_priority import StrictPriority
from rota.serving.sim.run import SimulationConfig, simulate
from rota.serving.sim.swap import Swapping
from rota.serving.stack import EnginePolicies, StackConfig, engine_policies
from rota.serving.workload.generator import SyntheticWorkload
from rota.testing.worlds import Job, Workload, play, seeded_workload, workloads

RULES = SwapRules(host_blocks=40, block_group=3, group_latency_us=300.0, gigabytes_per_second=0.5)
MIXED = Path(__file__).parents[2] / "examples" / "mixed.toml"


def stack(order=StrictPriority, batch=VllmDefault, memory=RecomputeLowest):
    return EnginePolicies(order(), batch(), memory())


def check_books(played):
    """What is copied in had been copied out, nobody computes meanwhile, and of one copy no block is copied twice."""
    out, away = Counter(), set()
    for row in played.rows:
        if isinstance(row.event, SequenceResumed):
            away.discard(row.event.request_id)
        for command in row.commands:
            if isinstance(command, SwapOut):
                assert command.num_blocks > 0
                out[command.request_id] = command.num_valid + command.num_blocks
            elif isinstance(command, SwapIn):
                assert 0 < command.num_blocks <= out[command.request_id]
                away.add(command.request_id)
            elif isinstance(command, RunStep):
                assert not away & {request_id for request_id, _ in command.grants}


@settings(max_examples=25, deadline=None)
@given(
    workload=workloads(),
    order=st.sampled_from([Fcfs, StrictPriority]),
    batch=st.sampled_from([VllmDefault, lambda: StallFreeChunks(chunk_size=8)]),
    memory=st.sampled_from([RecomputeLowest, RecomputeCheapest]),
    host_blocks=st.integers(1, 40),
    reuse=st.booleans(),
    asynchronous=st.booleans(),
)
def test_every_law_holds_with_swap(workload, order, batch, memory, host_blocks, reuse, asynchronous):
    """`play` audits blocks, host blocks and tokens after every event, ends included."""
    rules = msgspec.structs.replace(RULES, host_blocks=host_blocks, reuse=reuse, asynchronous=asynchronous)
    check_books(play(workload, stack(order, batch, memory), swap=rules))


def commands(played, kind):
    return [command for row in played.rows for command in row.commands if isinstance(command, kind)]


def without_cache(seed):
    workload = seeded_workload(seed, load=4.0)
    return Workload(msgspec.structs.replace(workload.limits, enable_prefix_caching=False), workload.jobs)


def test_a_valid_copy_is_not_copied_again():
    """With reuse each block of a request travels out once at most; without, whenever it goes."""
    moved = {}
    for reuse in (True, False):
        rules = msgspec.structs.replace(RULES, host_blocks=10_000, reuse=reuse)
        played = play(without_cache(1), stack(), swap=rules)
        check_books(played)
        assert len(commands(played, SwapIn)) > 5
        moved[reuse] = Counter()
        for command in commands(played, SwapOut):
            moved[reuse][command.request_id] += command.num_blocks
            if reuse:
                assert moved[reuse][command.request_id] == command.num_valid + command.num_blocks
    assert moved[True].total() < moved[False].total()


def test_with_room_for_all_only_the_last_block_is_computed_twice():
    workload = without_cache(2)
    rules = msgspec.structs.replace(RULES, host_blocks=10_000)
    played = play(workload, stack(), swap=rules)
    num_computed = sum(tokens for step in played.steps() for _, tokens in step.grants)
    num_preempted = sum(len(step.preempted) for step in played.steps())
    once = sum(job.request.num_prompt_tokens + job.num_output_tokens - 1 for job in workload.jobs)
    assert num_preempted > 5
    assert num_computed <= once + num_preempted * (workload.limits.block_size - 1)
    again = play(workload, stack())
    assert sum(tokens for step in again.steps() for _, tokens in step.grants) > num_computed


class Engine:
    """As much of a machine and an instance as the link looks at."""

    num_free_blocks = 0

    def __init__(self):
        self.resumed = []

    def tell(self, event):
        self.resumed.append(event.request_id)


def test_a_step_waits_for_blocks_that_have_not_left_if_it_takes_them():
    """10 blocks at 2 ms each leave from 0 on; 7 are free, so 3 of them must have left."""
    rules = SwapRules(
        host_blocks=99, block_group=1, group_latency_us=0.0, gigabytes_per_second=1.0, kv_bytes_per_token=125_000
    )
    loop, engine = SimulationLoop(), Engine()
    link = Swapping(rules, loop, engine, 16, None, None)
    for name in "abcde":
        link.on_answer(engine, SwapOut(RequestId(name), 2), Instant(0))
    engine.num_free_blocks = 10
    assert link.waited() == 0
    engine.num_free_blocks = 7
    assert link.waited() == 2 * 4_000_000
    link.on_answer(engine, SwapIn(RequestId("e"), 2), Instant(0))
    loop.run()
    assert (engine.resumed, loop.now) == (["e"], 24_000_000)
    engine.num_free_blocks = 0
    assert link.waited() == 0


def test_nobody_preempted_is_the_same_as_no_swap():
    limits = InstanceLimits(num_blocks=400, block_size=4)
    jobs = tuple(Job(Request(RequestId(f"r{n}"), Instant(n * 1000), 20, 30), 30) for n in range(8))
    workload = Workload(limits, jobs)
    assert play(workload, stack(), swap=RULES).ends == play(workload, stack(), leap=False).ends


def test_what_waits_for_copies_takes_longer_and_groups_take_less():
    def end(**changes):
        rules = msgspec.structs.replace(RULES, host_blocks=10_000, gigabytes_per_second=5.0, **changes)
        played = play(without_cache(1), stack(), swap=rules)
        return max(each.at for each in played.ends.values())

    one_by_one = end(block_group=1, asynchronous=False, group_latency_us=2_000.0)
    assert end(block_group=60, asynchronous=False, group_latency_us=2_000.0) < one_by_one


def test_host_memory_is_bounded_and_prefers_those_who_wait():
    host = HostMemory(10, reuse=True)
    a, b, c = RequestId("a"), RequestId("b"), RequestId("c")
    assert host.keep(a, 6) == 6
    assert host.keep(b, 5) == 0
    host.came_back(a)
    assert host.keep(a, 8) == 2
    host.came_back(a)
    assert host.keep(b, 5) == 5
    assert (host.num_kept(a), host.num_kept(b)) == (0, 5)
    host.check({a, b, c})
    with pytest.raises(LawBroken, match="ended"):
        host.check({a, c})


def test_a_leak_is_seen(monkeypatch):
    monkeypatch.setattr(HostMemory, "forget", lambda self, request_id: None)
    with pytest.raises(LawBroken, match="host"):
        play(without_cache(1), stack(), swap=RULES)


def test_only_an_engine_that_has_it_and_moves_nothing_swaps():
    swapping = StackConfig(swap=RULES)
    with pytest.raises(CapabilityError, match="swaps"):
        engine_policies(swapping, VLLM_CAPABILITIES, "vLLM 0.32")
    moving = msgspec.structs.replace(swapping, migration="balance_load")
    with pytest.raises(ConfigError, match="swaps"):
        simulate(SimulationConfig(trace=MIXED, stack=moving))


def test_a_journal_with_swaps_replays(tmp_path):
    """Each copy is in a row, and machines built from the journal's header decide the same."""
    limits = InstanceLimits(num_blocks=2000, enable_prefix_caching=False)
    config = SimulationConfig(
        trace=MIXED,
        workload=load_toml(MIXED, SyntheticWorkload),
        stack=StackConfig(swap=SwapRules(host_blocks=3000)),
        num_requests=60,
        limits=limits,
    )
    path = tmp_path / "journal.jsonl"
    simulate(config, journal_path=path)
    text = path.read_text()
    assert text.count('"SwapOut"') >= text.count('"SwapIn"') > 0
    assert rota("replay", path).code == 0
