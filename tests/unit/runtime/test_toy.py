"""The gates, on the toy domain: replay, two processes, time shift, same-instant shuffle, fail the N-th, live.

Each gate first proves that there was something to get wrong, and each is shown to catch a planted leak.
"""

import os
import subprocess
import sys

import pytest

from rota.base.journal import Journal, header_for, read_journal
from rota.base.random_streams import RandomStreams
from rota.base.replay import first_difference, replay
from rota.runtime.faults import FailNth
from rota.testing.toy import bakery as toy
from rota.testing.toy import world

SEEDS = range(5)
SHIFT = 987_654_321_987


def run(seed, **changes):
    journal = Journal(header_for(None, seed), keep_rows=True)
    bakery = world.simulate(seed, journal=journal, **changes)
    return bakery, journal


def assert_congested(bakery, journal):
    """Queues formed and batches were lost: otherwise a gate that passes means nothing."""
    commands = [command for row in journal.rows for command in row.commands]
    assert sum(len(command.loaf_ids) == 3 for command in commands) > 20
    assert bakery.num_burnt > 0


def orders_given(journal):
    return [(row.at, row.commands) for row in journal.rows if row.commands]


@pytest.mark.parametrize("seed", SEEDS)
def test_everything_ends_and_the_same_seed_gives_the_same_digest(seed):
    bakery, journal = run(seed)
    assert_congested(bakery, journal)
    assert set(bakery.states.values()) == {"done"}
    assert run(seed)[1].digest == journal.digest
    assert run(seed + 100)[1].digest != journal.digest


@pytest.mark.parametrize("seed", SEEDS)
def test_a_journal_replays(seed):
    bakery, journal = run(seed)
    assert_congested(bakery, journal)
    assert replay(journal.rows, {"bakery": world.build()}) is None


@pytest.mark.parametrize("seed", SEEDS)
def test_shifted_time_gives_the_same_commands(seed):
    bakery, journal = run(seed)
    assert_congested(bakery, journal)
    assert first_difference(journal.rows, run(seed, start=SHIFT)[1].rows, shift=SHIFT) is None


@pytest.mark.parametrize("seed", SEEDS)
def test_the_order_within_an_instant_does_not_matter(seed):
    bakery, journal = run(seed)
    assert_congested(bakery, journal)
    shuffled = run(seed, shuffle=RandomStreams(seed).stream("shuffle"))[1]
    assert shuffled.digest != journal.digest, "nothing tied"
    assert orders_given(shuffled) == orders_given(journal)


SCRIPT = """
from rota.base.journal import Journal, header_for
from rota.testing.toy import world
journal = Journal(header_for(None, 3))
world.simulate(3, journal=journal, bakery=world.build({policy}))
print(journal.digest)
"""


def digest_in_a_fresh_process(hash_seed, policy=""):
    script = SCRIPT.format(policy=policy)
    if policy:
        script = SET_POLICY + script
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_two_processes_with_different_hash_seeds_agree():
    digests = {digest_in_a_fresh_process(hash_seed) for hash_seed in (1, 2)}
    assert len(digests) == 1
    assert len(digests.pop().strip()) == 64


def test_every_command_may_fail_once_and_everything_still_ends():
    num_struck = 0
    for nth in range(1, 1_000):
        fail = FailNth("BakeBatch", nth)
        bakery, _ = run(1, num_loaves=60, fail=fail)
        assert not bakery.unfinished()
        if not fail.has_struck:
            break
        num_struck += 1
    assert num_struck >= 10


def test_too_many_loaves_are_refused_and_nothing_is_lost():
    bakery, journal = run(2, bakery=world.build(max_waiting=5))
    assert set(bakery.states.values()) == {"done", "refused"}
    assert len(bakery.states) == 200
    assert replay(journal.rows, {"bakery": world.build(max_waiting=5)}) is None


@pytest.mark.asyncio
async def test_the_same_machine_runs_live_and_its_journal_replays(tmp_path):
    path = tmp_path / "live.jsonl"
    with Journal(header_for(None, 3), path=path) as journal:
        bakery = await world.run_live(3, journal=journal)
    assert set(bakery.states.values()) == {"done"}
    assert len(bakery.states) == 40
    assert bakery.num_burnt > 0
    rows = list(read_journal(path, world.ROW_TYPES))
    assert replay(rows, {"bakery": world.build(patience=world.LIVE_PATIENCE)}) is None


# --- planted leaks: each gate must go red for its own -----------------------------------------------------------------


class LooksAtAHiddenCounter:
    """State outside the machine, as a module-level random source or a wall clock is."""

    calls = 0

    def choose(self, waiting, num_loaves):
        LooksAtAHiddenCounter.calls += 1
        by_name = sorted(waiting, key=lambda loaf: loaf.loaf_id, reverse=LooksAtAHiddenCounter.calls <= 50)
        return by_name[:num_loaves]


class TrustsTheOrderOfArrival:
    def choose(self, waiting, num_loaves):
        return waiting[:num_loaves]


class ComparesNowWithAConstant(toy.Bakery):
    def expire(self, now):
        self._batch_size = 3 if now < 400 * 10**9 else 2
        return super().expire(now)


SET_POLICY = """
class IteratesOverASet:
    def choose(self, waiting, num_loaves):
        by_id = {loaf.loaf_id: loaf for loaf in waiting}
        return [by_id[loaf_id] for loaf_id in set(by_id)][:num_loaves]
"""


def test_replay_catches_hidden_state():
    journal = run(1, bakery=world.build(LooksAtAHiddenCounter()))[1]
    assert replay(journal.rows, {"bakery": world.build(LooksAtAHiddenCounter())}) is not None


def test_the_time_shift_catches_a_constant_instant():
    def bakery():
        return ComparesNowWithAConstant(toy.ShortestRecipeFirst(), patience=world.PATIENCE)

    journal, shifted = (run(1, bakery=bakery(), start=start)[1] for start in (0, SHIFT))
    assert first_difference(journal.rows, shifted.rows, shift=SHIFT) is not None


def test_the_shuffle_catches_a_trusted_order():
    journal, shuffled = (
        run(1, bakery=world.build(TrustsTheOrderOfArrival()), shuffle=shuffle)[1]
        for shuffle in (None, RandomStreams(1).stream("shuffle"))
    )
    assert orders_given(shuffled) != orders_given(journal)


def test_two_processes_catch_iteration_over_a_set():
    assert len({digest_in_a_fresh_process(hash_seed, "IteratesOverASet()") for hash_seed in (1, 2)}) == 2
