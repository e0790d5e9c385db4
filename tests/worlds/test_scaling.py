"""Fleets that grow and shrink without rest, with faults on: no drain loses a request, and the fleet keeps its rules."""

from collections import Counter
from itertools import pairwise

import pytest
from msgspec import structs
from tests.worlds.test_simulated_cluster import CheckingJournal

from rota.base.errors import ConfigError
from rota.base.instant import Instant, milliseconds, seconds
from rota.base.random_streams import RandomStreams
from rota.base.replay import replay
from rota.cli.journals import FreshMachines, open_journal
from rota.runtime.faults import Fault, FaultKind, FaultPlan, random_plan
from rota.serving.api import NOTHING, FleetRules, Start, Stop
from rota.serving.assemble import CLUSTER, SystemConfig, header_of
from rota.serving.cluster.ledger import InstanceLedger
from rota.serving.cluster.scaling import FleetBook
from rota.serving.model.commands import Dispatch, DrainInstance, KeepInstance, StartInstance, StopInstance
from rota.serving.model.events import InstanceStarted, StartFailed
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.sim.cluster import SimulatedCluster, WorldOptions
from rota.serving.sim.fleet import FLEET, StartUp
from rota.serving.stack import Parameters, StackConfig
from rota.testing.worlds import Pace, seeded_arrivals

LIMITS = InstanceLimits(num_blocks=24, block_size=4, max_num_seqs=5, max_num_batched_tokens=32)
COOL_DOWN = 0.03
RULES = FleetRules(min_instances=1, max_instances=5, cool_down_seconds=COOL_DOWN, retry_seconds=0.02)
OPTIONS = WorldOptions(
    report_interval=milliseconds(20),
    report_delay=milliseconds(3),
    restart_after=milliseconds(60),
    start_up=StartUp(cold=milliseconds(40), page_cache=milliseconds(20), spare=milliseconds(2), num_spares=1),
)
HORIZON = milliseconds(800)


class Restless:
    """Grows, and shrinks, and changes its mind, as a stream says."""

    requires = NOTHING

    def __init__(self, *, seed: int = 0, interval_seconds: float = 0.004) -> None:
        self.interval_seconds = interval_seconds
        self._stream = RandomStreams(seed).stream("restless")

    def plan(self, fleet):
        draw = self._stream
        if draw.random() < 0.4:
            return [Start("more")] * draw.integers(1, 3)
        return [Stop(view.id, "fewer") for view in fleet.instances if draw.random() < 0.5]


def stack(seed=0, migration="none"):
    return StackConfig(
        dispatch="least_outstanding_tokens",
        migration=migration,
        scaling="tests.worlds.test_scaling:Restless",
        fleet=RULES,
        parameters=Parameters(scaling={"seed": seed}),
    )


def arrivals(seed):
    """Hashes are strings, so that they come back from a file as they were."""
    return [
        (structs.replace(request, block_hashes=tuple(map(str, request.block_hashes))), num_output)
        for request, num_output in seeded_arrivals(seed, 120, milliseconds(6))
    ]


def play(seed, *, migration="none", faults=FaultPlan(), options=OPTIONS, path=None):
    config = SystemConfig(stack=stack(seed, migration), instances=(InstanceSpec(InstanceId("i0"), LIMITS),), seed=seed)
    coming = arrivals(seed)
    journal = CheckingJournal(header_of(config), keep_rows=True, path=path)
    cluster = SimulatedCluster(config, coming, Pace(), options, journal=journal, faults=faults)
    journal.cluster = cluster
    cluster.run()
    journal.close()
    check(cluster, journal, coming)
    return cluster, journal


def check(cluster, journal, coming):
    assert sorted(record.id for record in cluster.records) == sorted(request.id for request, _ in coming), "law 1"
    for machine in cluster.machines():
        machine.check()
        assert not machine.unfinished()
    rows = [row for row in journal.rows if row.machine == CLUSTER]
    check_commands(rows)


def check_commands(rows):
    """From the rows alone: nothing goes to one that drains, is stopped or not ready; the fleet turns as seldom as it
    says."""
    members, turns, is_growing, last_grown = {"i0": "ready"}, [], True, -(10**18)
    for row in rows:
        if isinstance(row.event, InstanceStarted):
            assert members.get(row.event.spec.id) not in ("stopped", "failed"), f"{row.event.spec.id} came back"
            members[row.event.spec.id] = "draining" if members[row.event.spec.id] == "draining" else "ready"
            last_grown = row.at if row.event.spec.id != "i0" or row.at == 0 else last_grown
        elif isinstance(row.event, StartFailed):
            members[row.event.instance_id] = "failed"
        for command in row.commands:
            match command:
                case Dispatch():
                    assert members[command.instance_id] == "ready", f"{command} to one that is not ready"
                case StartInstance():
                    assert command.instance_id not in members, "an id is used again"
                    members[command.instance_id], is_growing = "starting", True
                    alive = [each for each in members.values() if each not in ("stopped", "failed")]
                    assert len(alive) <= RULES.max_instances
                case DrainInstance():
                    assert members[command.instance_id] == "ready"
                    if is_growing:
                        turns.append(row.at)
                    members[command.instance_id], is_growing = "draining", False
                case KeepInstance():
                    assert members[command.instance_id] == "draining"
                    members[command.instance_id], is_growing = "ready", True
                case StopInstance():
                    assert members[command.instance_id] in ("draining", "starting")
                    members[command.instance_id] = "stopped"
    gaps = [later - earlier for earlier, later in pairwise(turns)]
    assert all(gap >= seconds(COOL_DOWN) for gap in gaps), f"turned twice within a cool-down: {min(gaps)}"


def faults(seed, num_faults=40):
    kinds = [
        FaultKind("crash", (milliseconds(1), milliseconds(80))),
        FaultKind("slow", (milliseconds(5), milliseconds(60)), (1.5, 6.0)),
    ]
    targets = ["i0", *(f"scaled-{number}" for number in range(1, 16))]
    plan = random_plan(RandomStreams(seed).stream("faults"), kinds, targets, HORIZON, num_faults)
    at_start = [FaultKind("start_fails", (milliseconds(5), milliseconds(90)))]
    at_start += [FaultKind("start_slow", (milliseconds(5), milliseconds(90)), (2.0, 8.0))]
    more = random_plan(RandomStreams(seed).stream("starts"), at_start, [FLEET], HORIZON, 6)
    return FaultPlan([*plan, *more])


@pytest.mark.parametrize("migration", ["none", "drain", "balance_load"])
def test_no_drain_loses_a_request(migration):
    seen = Counter()
    for seed in range(6):
        cluster, _ = play(seed, migration=migration)
        truth = {request.id: num_output for request, num_output in arrivals(seed)}
        for record in cluster.records:
            assert record.status == "finished", record
            assert record.num_output_tokens == truth[record.id]
        counts = cluster.cluster.fleet.counts(cluster.loop.now)
        seen.update(
            drained=counts.num_drained, kept=counts.num_kept, stopped=counts.num_stopped, turns=counts.num_turns
        )
        seen.update(moved=sum(record.num_migrations for record in cluster.records))
    assert seen["drained"] > 50 and seen["stopped"] > 30 and seen["kept"] > 5 and seen["turns"] > 30, seen
    assert bool(seen["moved"]) == (migration != "none"), seen


@pytest.mark.parametrize("resume", [False, True])
def test_whatever_dies_while_it_starts_or_drains_every_request_ends_once(resume):
    seen = Counter()
    options = WorldOptions(**{name: getattr(OPTIONS, name) for name in OPTIONS.__slots__} | {"resume": resume})
    for seed in range(10):
        cluster, journal = play(seed, migration="drain", faults=faults(seed), options=options)
        counts = cluster.cluster.fleet.counts(cluster.loop.now)
        seen.update(failed=counts.num_failed, drained=counts.num_drained)
        seen.update(type(command).__name__ for row in journal.rows for command in row.commands)
        seen.update(record.status for record in cluster.records)
        seen["lost draining"] += sum(
            "lost while it drained" in getattr(command, "reason", "")
            for row in journal.rows
            for command in row.commands
        )
        for record in cluster.records:
            assert record.status == "finished" or "crashed" in record.reason or "no instance" in record.reason, record
    assert seen["failed"] > 15 and seen["drained"] > 60 and seen["lost draining"] > 1, seen
    if resume:
        assert seen["finished"] > 10 * 115, seen


def test_a_journal_of_a_fleet_replays(tmp_path):
    path = tmp_path / "fleet.jsonl"
    play(3, migration="drain", faults=faults(3), path=path)
    machines = FreshMachines(open_journal(path))
    assert replay(machines.rows(), machines.by_name) is None
    assert any(name.startswith("instance/scaled-") for name in machines.by_name)


def test_the_same_seed_makes_the_same_fleet():
    digests = [play(5, faults=faults(5))[1].digest for _ in range(2)]
    assert digests[0] == digests[1]


def test_leaps_change_nothing():
    stepping = WorldOptions(**{name: getattr(OPTIONS, name) for name in OPTIONS.__slots__} | {"leap": False})
    assert play(7)[1].digest == play(7, options=stepping)[1].digest


def test_a_start_takes_as_long_as_its_source_says():
    _, journal = play(1)
    ordered, took = {}, {}
    for row in journal.rows:
        for command in row.commands:
            if isinstance(command, StartInstance):
                ordered[command.instance_id] = (row.at, command.source)
        if isinstance(row.event, InstanceStarted) and row.event.spec.id in ordered:
            at, source = ordered[row.event.spec.id]
            took.setdefault(source, set()).add(row.at - at)
    assert took == {"spare": {milliseconds(2)}, "page_cache": {milliseconds(20)}, "cold": {milliseconds(40)}}


def test_what_is_told_may_be_wrong():
    wrong = WorldOptions(start_up=StartUp(told_wrong=seconds(-60)))
    config = SystemConfig(stack=stack(), instances=(InstanceSpec(InstanceId("i0"), LIMITS),))
    offers = SimulatedCluster(config, [], Pace(), wrong)._fleet.offers()
    assert [offer.start_up for offer in offers] == [seconds(40)]


def test_a_fault_that_nobody_knows_is_refused():
    with pytest.raises(ConfigError, match="unknown instance"):
        play(1, faults=FaultPlan([Fault("start_fails", "i0", Instant(0), seconds(1))]))


PLANTED = {
    "one that drains is stopped at once": (
        FleetBook,
        "heard",
        lambda planted: (
            lambda self, event, now: [
                *planted(self, event, now),
                *(StopInstance(each.id, "now") for each in self._of("leaving") if each.move("empty") is None),
            ]
        ),
    ),
    "there is no cool-down": (FleetBook, "_drain", lambda planted: _without_cool_down(planted)),
    "one that drains is given more": (InstanceLedger, "move", lambda planted: _never_drains(planted)),
}


def _without_cool_down(planted):
    def drain(self, wish, now):
        self._grown_at = None
        return planted(self, wish, now)

    return drain


def _never_drains(planted):
    def move(self, event):
        if event != "draining":
            planted(self, event)

    return move


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(name, monkeypatch):
    owner, attribute, plant = PLANTED[name]
    monkeypatch.setattr(owner, attribute, plant(getattr(owner, attribute)))
    with pytest.raises(Exception):  # noqa: B017 - whichever law notices first
        for seed in range(10):
            play(seed)
