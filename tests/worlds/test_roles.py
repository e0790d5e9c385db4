"""Requests that are prefilled at one instance and decode at another, with faults in every state: nothing is lost,
nobody has two owners, and where a move fails the request goes on where it is."""

from collections import Counter

import pytest
from msgspec import structs
from tests.worlds.journeys import LIMITS, ROOMY, WAYS, play_arrivals, random_faults

from rota.base.errors import ConfigError, RotaError
from rota.base.instant import Duration, Instant, milliseconds
from rota.base.random_streams import RandomStreams
from rota.runtime.faults import FaultPlan
from rota.serving.api import NOTHING, Admission, Flip, Pick
from rota.serving.assemble import SystemConfig, build
from rota.serving.cluster.ledger import InstanceLedger
from rota.serving.cluster.machine import ClusterMachine
from rota.serving.cluster.migration import MigrationLimits
from rota.serving.model.commands import Dispatch, DrainInstance, RunStep, SetRole, Stay
from rota.serving.model.events import (
    InstanceDraining,
    InstanceLost,
    InstanceReported,
    InstanceStarted,
    RequestArrived,
    RequestFinished,
)
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceReport, InstanceSpec, Role
from rota.serving.model.request import Request, RequestId
from rota.serving.policies.migration.drain import Drain
from rota.serving.sim.cluster import SimulatedCluster
from rota.serving.sim.migration import Moves, Transfer
from rota.serving.stack import Parameters, StackConfig
from rota.testing.worlds import Pace, seeded_arrivals

ROLES = {
    "apart": (Role.PREFILL, Role.DECODE, Role.DECODE),
    "with a mixed one": (Role.PREFILL, Role.MIXED, Role.DECODE),
}


class SplitsAtRandom:
    """Sends prompts anywhere, and has them decode anywhere: chosen with the dispatch, later, or not at all."""

    requires = NOTHING
    reads_roles = True

    def __init__(self, seed: int = 0) -> None:
        self._stream = RandomStreams(seed).stream("splits")

    def pick(self, request, cluster):
        drawn, other = (self._stream.choice(list(cluster.instances)).id for _ in range(2))
        kind = self._stream.integers(0, 3)
        return Pick(drawn, "at random", prefill_only=kind == 1, decode_at=other if kind == 2 else None)

    def pick_decode(self, request, at, cluster):
        return Pick(self._stream.choice(list(cluster.instances)).id, "at random")


class FlipsAtRandom(SplitsAtRandom):
    """And now and then wants somebody to have another role."""

    def flip(self, cluster):
        if not cluster.instances or self._stream.random() < 0.7:
            return None
        view = self._stream.choice(list(cluster.instances))
        return Flip(view.id, self._stream.choice([role for role in Role if role is not view.role]), "at random")


def world(
    seed, dispatch, roles, *, way="hand_off", limits=LIMITS, migration="none", faults=None, num_requests=60, **options
):
    gap = milliseconds(3)
    arrivals = seeded_arrivals(seed, num_requests, gap)
    instance_ids = [InstanceId(f"i{number}") for number in range(len(roles))]
    if faults is None:
        faults = random_faults(seed, instance_ids, arrivals, Duration(num_requests * gap))
    parameters = {
        "dispatch": {"seed": seed} if ":" in dispatch else SMALL[dispatch],
        "migration": {} if migration == "none" else {"seed": seed},
    }
    stack = StackConfig(dispatch=dispatch, migration=migration, parameters=Parameters(**parameters))
    specs = tuple(
        InstanceSpec(instance_id, limits, role, WAYS[way])
        for instance_id, role in zip(instance_ids, roles, strict=True)
    )
    return play_arrivals(arrivals, SystemConfig(stack, specs, seed), faults, **options)


# The requests of these worlds are as small as their engines.
SMALL = {
    "pools": {"expected_output_tokens": 8},
    "power_of_two_by_class": {"guess_tokens": 8, "bucket_tokens": 8},
    "prefill_or_together": {"guess_tokens": 1},
}
FLIPPING = "tests.worlds.test_roles:FlipsAtRandom"
AT_RANDOM = "tests.worlds.test_roles:SplitsAtRandom"


def test_nothing_is_lost_whoever_decodes_where():
    ways, aborted, commands, statuses = Counter(), Counter(), Counter(), Counter()
    num_committed = 0
    for seed in range(12):
        way = ("hand_off", "copy", "replay")[seed % 3]
        migration = "none" if seed % 2 else "tests.worlds.journeys:MovesAtRandom"
        limits = (LIMITS, ROOMY)[seed % 4 // 2]
        cluster, journey = world(seed, AT_RANDOM, ROLES["apart"], way=way, migration=migration, limits=limits)
        ways += journey.ways
        aborted += journey.aborted_in
        commands += journey.commands
        num_committed += sum(journey.num_committed.values())
        statuses.update(record.status for record in cluster.records)
    assert num_committed > 250
    assert commands["Stay"] > 25, "nobody stayed"
    assert min(aborted[state] for state in ("proposed", "reserved", "copying", "handover")) > 0, aborted
    assert statuses["finished"] > 20 * statuses["failed"]


@pytest.mark.parametrize("dispatch", ["pools", "power_of_two_by_class", "prefill_or_together"])
@pytest.mark.parametrize("roles", ROLES.values(), ids=ROLES)
def test_each_policy_splits_and_loses_nothing(dispatch, roles):
    num_split, num_done_elsewhere = 0, 0
    for seed in range(4):
        _, journey = world(seed, dispatch, roles, limits=ROOMY)
        num_split += sum(isinstance(each, Dispatch) and each.prefill_only for row in journey.rows for each in row[4])
        num_done_elsewhere += sum(journey.num_committed.values())
    assert num_split > 20 and num_done_elsewhere > 10


def test_nothing_is_lost_while_instances_change_their_roles():
    commands, statuses, num_flipped = Counter(), Counter(), 0
    for seed in range(8):
        migration = "none" if seed % 2 else "tests.worlds.journeys:MovesAtRandom"
        limits = (LIMITS, ROOMY)[seed % 4 // 2]
        cluster, journey = world(seed, FLIPPING, ROLES["apart"], limits=limits, migration=migration)
        commands += journey.commands
        statuses.update(record.status for record in cluster.records)
        roles = {}
        for row in journey.rows:
            if row[0] == "cluster" and isinstance(row[3], InstanceStarted):
                spec = row[3].spec
                num_flipped += roles.get(spec.id, spec.role) is not spec.role
                roles[spec.id] = spec.role
    assert num_flipped > 25 and commands["SetRole"] >= num_flipped
    assert statuses["finished"] > 20 * statuses["failed"]


def test_an_idle_prefill_instance_becomes_a_decode_instance():
    """Long answers to short prompts: two prefill instances have nothing to do, and one of them is enough."""
    limits = InstanceLimits(num_blocks=800, block_size=4, max_num_batched_tokens=512)
    roles = (Role.PREFILL, Role.PREFILL, Role.DECODE)
    specs = tuple(InstanceSpec(InstanceId(f"i{number}"), limits, role) for number, role in enumerate(roles))
    parameters = Parameters(dispatch={"flip_after_seconds": 0.05, "reserve": "greedy"})
    config = SystemConfig(StackConfig(dispatch="power_of_two_by_class", parameters=parameters), specs)
    arrivals = [(Request(RequestId(f"r{number}"), Instant(number * 10**6), 40, 200), 200) for number in range(12)]
    cluster, journey = play_arrivals(arrivals, config, FaultPlan(), timeouts=MigrationLimits())
    heard = [row[3].spec for row in journey.rows if row[0] == "cluster" and isinstance(row[3], InstanceStarted)]
    flipped = [spec for spec in heard if spec.role is not roles[int(spec.id[1])]]
    assert [spec.role for spec in flipped] == [Role.DECODE], "one of them, since the other is the last"
    assert all(record.status == "finished" for record in cluster.records)


def test_an_instance_has_its_new_role_when_it_has_nothing_left():
    """Drained first: whoever runs there ends there, or moves, and only then is the role ordered."""
    for migration in ("none", "drain"):
        policies = ClusterMachine(FlipsTheFirst(), AdmitsAll(), migration=Drain() if migration == "drain" else None)
        specs = [InstanceSpec(InstanceId(f"i{number}"), InstanceLimits(num_blocks=64)) for number in range(2)]
        for spec in specs:
            policies.handle(InstanceStarted(spec), Instant(0))
        policies.handle(RequestArrived(Request(RequestId("r"), Instant(0), 8, 8)), Instant(0))
        assert policies.owner(RequestId("r")) == "i0"
        (drained,) = policies.handle(reported("i1", 1), Instant(1))
        assert isinstance(drained, DrainInstance) and drained.instance_id == "i0"
        assert policies.handle(reported("i1", 2), Instant(2)) == []
        assert policies.instance_states()["i0"] == "draining"
        policies.handle(RequestFinished(RequestId("r"), InstanceId("i0"), 8), Instant(3))
        assert policies.instance_states()["i0"] == "draining", "it is not forgotten"
        assert policies.handle(reported("i1", 4), Instant(4)) == [SetRole(InstanceId("i0"), Role.DECODE, "a test")]
        assert policies.handle(reported("i1", 5), Instant(5)) == [], "ordered once"
        policies.handle(InstanceStarted(structs.replace(specs[0], role=Role.DECODE)), Instant(6))
        assert [view.role for view in policies.instance_views()] == [Role.DECODE, Role.MIXED]
        policies.check()


@pytest.mark.parametrize("event", [InstanceLost(InstanceId("i0")), InstanceDraining(InstanceId("i0"))])
def test_one_that_is_lost_or_drained_meanwhile_is_not_flipped(event):
    machine = ClusterMachine(FlipsTheFirst(), AdmitsAll())
    for number in range(2):
        machine.handle(
            InstanceStarted(InstanceSpec(InstanceId(f"i{number}"), InstanceLimits(num_blocks=64))), Instant(0)
        )
    machine.handle(RequestArrived(Request(RequestId("r"), Instant(0), 8, 8)), Instant(0))
    machine.handle(reported("i1", 1), Instant(1))
    machine.handle(event, Instant(2))
    machine.handle(RequestFinished(RequestId("r"), InstanceId("i0"), 8), Instant(3))
    assert "i0" not in machine.instance_states(), "forgotten, as any"
    for at in (4, 5):
        assert machine.handle(reported("i1", at), Instant(at)) == []
    machine.check()


class FlipsTheFirst:
    requires = NOTHING
    reads_roles = True

    def pick(self, request, cluster):
        return Pick(cluster.instances[0].id, "the first")

    def flip(self, cluster):
        first = cluster.instances[0]
        return None if first.role is Role.DECODE or first.id != "i0" else Flip(first.id, Role.DECODE, "a test")


class AdmitsAll:
    requires = NOTHING

    def admit(self, request, cluster, num_unfinished):
        return Admission(True, "all")


def reported(instance_id, at):
    return InstanceReported(InstanceReport(InstanceId(instance_id), Instant(at), 0, 0, 64, 64))


def test_a_prefill_instance_computes_prompts_and_one_token_of_each():
    """Its steps hold no decode: who has a first token rests, and goes on elsewhere with the second."""
    _, journey = world(1, "pools", ROLES["apart"], limits=ROOMY, faults=FaultPlan(), num_requests=20)
    num_prompt = {row[3].request.id: row[3].request.num_prompt_tokens for row in journey.rows if is_arrival(row)}
    computed = Counter()
    for machine, _, _, _, commands in journey.rows:
        for command in commands:
            if machine == "instance/i0" and isinstance(command, RunStep):
                computed.update(dict(command.grants))
    assert computed and all(tokens <= num_prompt[request_id] for request_id, tokens in computed.items())
    assert not journey.commands["Stay"] and not journey.aborted_in
    assert sum(journey.num_committed.values()) == sum(journey.given[each] > 1 for each in num_prompt)


def is_arrival(row):
    return row[0] == "cluster" and isinstance(row[3], RequestArrived)


def test_who_may_not_move_is_answered_where_its_prompt_was_computed():
    limits = InstanceLimits(num_blocks=64, block_size=4)
    specs = tuple(InstanceSpec(InstanceId(f"i{number}"), limits, role) for number, role in enumerate(ROLES["apart"]))
    arrivals = [
        (Request(RequestId("pinned"), Instant(0), 20, 9, movable=False), 9),
        (Request(RequestId("one token"), Instant(0), 20, 1), 1),
        (Request(RequestId("may move"), Instant(0), 20, 9), 9),
    ]
    config = SystemConfig(StackConfig(dispatch="pools"), specs)
    cluster, journey = play_arrivals(arrivals, config, FaultPlan())
    assert journey.num_committed == {"may move": 1}
    assert {record.id: record.instance_id for record in cluster.records} == {
        "pinned": "i0",
        "one token": "i0",
        "may move": "i1",
    }


def test_where_the_place_is_known_most_blocks_are_there_when_the_prompt_is():
    """The same request over the same link: the place is chosen with the dispatch, or once the first token has come."""
    limits = InstanceLimits(num_blocks=2_000, block_size=4, max_num_batched_tokens=4_096)
    specs = tuple(InstanceSpec(InstanceId(f"i{number}"), limits, role) for number, role in enumerate(ROLES["apart"]))
    transfer = Transfer(latency=Duration(0), bytes_per_second=1e9, kv_bytes_per_token=10**6)
    downtimes = {}
    for dispatch in ("pools", "power_of_two_by_class"):
        arrivals = [(Request(RequestId("r"), Instant(0), 400, 9), 9)]
        config = SystemConfig(StackConfig(dispatch=dispatch), specs)
        cluster, _ = play_arrivals(
            arrivals, config, FaultPlan(), transfer=transfer, timeouts=MigrationLimits(), keeps_journal=False
        )
        counts = cluster.cluster.migration_counts()
        assert counts.num_committed == 1 and counts.num_bytes == 400 * 10**6
        downtimes[dispatch] = counts.downtime
    assert downtimes == {"power_of_two_by_class": milliseconds(400), "pools": milliseconds(40)}


def test_a_full_decode_instance_leaves_the_request_where_it_is():
    limits = InstanceLimits(num_blocks=64, block_size=4, max_num_seqs=8)
    tight = InstanceLimits(num_blocks=64, block_size=4, max_num_seqs=1)
    specs = (
        InstanceSpec(InstanceId("i0"), limits, Role.PREFILL),
        InstanceSpec(InstanceId("i1"), tight, Role.DECODE),
    )
    arrivals = [(Request(RequestId(f"r{number}"), Instant(number), 20, 9), 9) for number in range(4)]
    stack = StackConfig(dispatch="pools", parameters=Parameters(dispatch={"expected_output_tokens": 0}))
    cluster, _ = play_arrivals(arrivals, SystemConfig(stack, specs), FaultPlan(), keeps_journal=False)
    counts = cluster.cluster.migration_counts()
    assert all(record.status == "finished" for record in cluster.records)
    assert counts.num_committed >= 1 and sum(counts.num_aborted.values()) >= 1


def test_roles_need_a_policy_that_looks_at_them_and_an_engine_that_lets_go():
    limits = InstanceLimits(num_blocks=64)
    specs = (InstanceSpec(InstanceId("i0"), limits, Role.PREFILL), InstanceSpec(InstanceId("i1"), limits, Role.DECODE))
    with pytest.raises(ConfigError, match="i0 is for prefill only, and dispatch policy 'round_robin'") as raised:
        build(SystemConfig(StackConfig(dispatch="round_robin"), specs))
    assert "pools" in raised.value.hint
    with pytest.raises(ConfigError, match="cannot let requests go, as dispatch policy 'pools' would"):
        SimulatedCluster(SystemConfig(StackConfig(dispatch="pools"), specs), [], Pace(), engine="vllm")


# --- planted bugs -----------------------------------------------------------------------------------------------------


def found(seeds=range(6), dispatch=AT_RANDOM):
    """What the account says is wrong, if anything."""
    for seed in seeds:
        try:
            world(seed, dispatch, ROLES["apart"], limits=(LIMITS, ROOMY)[seed % 2])
        except (AssertionError, RotaError, KeyError) as error:
            return str(error) or repr(error)
    return None


def test_a_host_that_never_says_stay_is_caught(monkeypatch):
    carry_out = SimulatedCluster._carry_out
    monkeypatch.setattr(
        SimulatedCluster,
        "_carry_out",
        lambda self, name, command, now: None if isinstance(command, Stay) else carry_out(self, name, command, now),
    )
    assert found() is not None


def test_a_move_that_fails_and_leaves_the_request_resting_is_caught(monkeypatch):
    drop = Moves._drop

    def forgets(self, move):
        move.rests = False
        drop(self, move)

    monkeypatch.setattr(Moves, "_drop", forgets)
    assert found() is not None


def test_a_booking_that_is_never_given_back_is_caught(monkeypatch):
    expect = InstanceLedger.expect

    def keeps(self, request, sign=1):
        if sign > 0:
            expect(self, request)

    monkeypatch.setattr(InstanceLedger, "expect", keeps)
    assert "law 1" in found()
