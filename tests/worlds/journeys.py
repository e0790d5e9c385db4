"""Worlds in which requests are moved at random, and an account of every token that is kept from the rows alone."""

from collections import Counter
from dataclasses import dataclass, field
from unittest import mock

from rota.base.instant import Duration, Instant, milliseconds
from rota.base.journal import Journal
from rota.base.random_streams import RandomStreams
from rota.runtime.faults import FaultKind, FaultPlan, random_plan
from rota.serving.api import NOTHING, Move
from rota.serving.assemble import CLUSTER, SystemConfig
from rota.serving.cluster.machine import ClusterMachine
from rota.serving.cluster.migration import MigrationLimits
from rota.serving.cluster.prefix_index import PrefixIndex
from rota.serving.model.capabilities import EVERYTHING, Capability
from rota.serving.model.commands import (
    AbortMigration,
    Commit,
    CopyOut,
    HandOver,
    Migrate,
    RejectSequence,
    RoomKept,
    RoomRefused,
    RunStep,
    SequenceStopped,
)
from rota.serving.model.events import (
    CopyStarted,
    RoomGivenUp,
    SequenceAborted,
    SequenceAdopted,
    SequenceArrived,
    SequenceLeft,
    SequenceResumed,
    StepFinished,
)
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.model.request import Request, RequestId
from rota.serving.sim.cluster import SimulatedCluster, WorldOptions
from rota.serving.sim.migration import Transfer
from rota.serving.stack import Parameters, StackConfig, cluster_policies
from rota.testing.faults import cluster_faults
from rota.testing.worlds import Pace, seeded_arrivals

LIMITS = InstanceLimits(num_blocks=32, block_size=4, max_num_seqs=5, max_num_batched_tokens=32)
ROOMY = InstanceLimits(num_blocks=80, block_size=4, max_num_seqs=12, max_num_batched_tokens=32)
TIMEOUTS = MigrationLimits(
    max_migrations=2,
    reserve_timeout=milliseconds(9),
    copy_start_timeout=milliseconds(10),
    copy_timeout=milliseconds(11),
    hand_over_timeout=milliseconds(12),
)
# Slow enough that a copy takes as long as some steps, with stages that can catch up.
TRANSFER = Transfer(
    latency=Duration(200_000), bytes_per_second=5e8, kv_bytes_per_token=65_536, last_stage_max_blocks=1, max_stages=3
)
WAYS = {
    "copy": EVERYTHING,
    "hand_off": EVERYTHING - {Capability.COPY_KV},
    "replay": EVERYTHING - {Capability.COPY_KV, Capability.HAND_OVER_KV},
}


class MovesAtRandom:
    """Moves whoever it comes upon to wherever, and now and then somebody who is not there."""

    requires = NOTHING

    def __init__(self, interval_seconds: float = 0.002, seed: int = 0, num_moves: int = 3) -> None:
        self.interval_seconds = interval_seconds
        self._stream = RandomStreams(seed).stream("moves")
        self._num_moves = num_moves

    def plan(self, cluster, moving):
        stream = self._stream
        instances = list(cluster.instances)
        moves = []
        for source in instances:
            for report in source.running:
                if stream.random() < 0.5:
                    request_id = "nobody" if stream.random() < 0.02 else report.request_id
                    moves.append(Move(request_id, source.id, stream.choice(instances).id, "at random"))
        stream.shuffle(moves)
        return moves[: self._num_moves]


@dataclass
class Account:
    """What an instance knows and has computed of a request, by its rows."""

    num_prompt: int
    num_known: int
    num_computed: int
    state: str


@dataclass
class Journey(Journal):
    """Checks each row as it is written; `wrong` would be raised at once, as an `AssertionError`."""

    limits: InstanceLimits
    allowed: dict
    """How long each state of a migration may last."""
    cluster: object = None
    accounts: dict = field(default_factory=dict)
    rooms: dict = field(default_factory=dict)
    steps: dict = field(default_factory=dict)
    given: Counter = field(default_factory=Counter)
    """Tokens that each client has got."""
    first_at: dict = field(default_factory=dict)
    last_at: dict = field(default_factory=dict)
    moves: dict = field(default_factory=dict)
    """Open migrations: `(state, since)`."""
    num_committed: Counter = field(default_factory=Counter)
    aborted_in: Counter = field(default_factory=Counter)
    ways: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)
    commands: Counter = field(default_factory=Counter)
    rows: list = field(default_factory=list)

    def append(self, machine, at, kind, event, commands):
        self.rows.append((machine, at, kind, event, tuple(commands)))
        for command in commands:
            self.commands[type(command).__name__] += 1
        if machine == CLUSTER:
            self.take_cluster(at, event, commands)
        else:
            self.take_instance(machine, at, event, commands)

    # --- the instances ----------------------------------------------------------------------------------------------

    def take_instance(self, machine, at, event, commands):
        accounts = self.accounts.setdefault(machine, {})
        rooms = self.rooms.setdefault(machine, {})
        match event:
            case StepFinished():
                self.finish(machine, accounts, at, event)
            case SequenceArrived():
                if not any(isinstance(command, RejectSequence) for command in commands):
                    self.enter(machine, event.request, event.num_output_tokens, 0, "waiting")
            case SequenceAdopted():
                num_known = event.request.num_prompt_tokens + event.num_output_tokens
                assert rooms.pop(event.request.id, 0) >= num_known - 1, f"{event} came without room"
                self.enter(machine, event.request, event.num_output_tokens, num_known - 1, "running")
            case SequenceAborted():
                accounts.pop(event.request_id, None)
            case SequenceLeft():
                if event.request_id in accounts:
                    assert accounts.pop(event.request_id).state == "resting", f"{event}, and it did not rest"
            case SequenceResumed():
                if event.request_id in accounts and accounts[event.request_id].state == "resting":
                    accounts[event.request_id].state = "running"
            case RoomGivenUp():
                rooms.pop(event.request_id, None)
        for command in commands:
            match command:
                case RoomKept():
                    rooms[command.request_id] = command.num_tokens
                case RoomRefused():
                    rooms.pop(command.request_id, None)
                case SequenceStopped():
                    account = accounts[command.request_id]
                    assert account.state in ("running", "resting")
                    assert account.num_known == command.num_tokens == account.num_computed + 1
                    account.state = "resting"
                case RunStep():
                    self.count_step(machine, accounts, rooms, command)

    def enter(self, machine, request, num_output, num_computed, state):
        elsewhere = [name for name, accounts in self.accounts.items() if request.id in accounts]
        assert not elsewhere, f"law 1: {request.id} comes to {machine}, and is at {elsewhere}"
        given = self.given[request.id]
        assert num_output == given, f"law 2: {request.id} goes on from token {num_output}, its client has {given}"
        prompt = request.num_prompt_tokens
        self.accounts[machine][request.id] = Account(prompt, prompt + num_output, num_computed, state)

    def finish(self, machine, accounts, at, event):
        step = self.steps.pop(machine)
        assert step.step_id == event.step_id
        for request_id, _ in step.grants:
            account = accounts.get(request_id)
            if account is None or account.num_computed != account.num_known:
                continue
            index = account.num_known - account.num_prompt
            assert index == self.given[request_id], f"law 2: token {index} of {request_id} comes out of turn"
            self.given[request_id] += 1
            self.first_at.setdefault(request_id, at)
            self.last_at[request_id] = at
            account.num_known += 1
        for request_id in event.finished:
            del accounts[request_id]

    def count_step(self, machine, accounts, rooms, step):
        limits = self.limits
        for request_id in step.preempted:
            assert accounts[request_id].state == "running", f"{request_id} was preempted, and does not run"
            accounts[request_id].state, accounts[request_id].num_computed = "waiting", 0
        for request_id, num_tokens in step.grants:
            account = accounts[request_id]
            assert account.state != "resting", f"law 2: {request_id} rests, and was granted {num_tokens} tokens"
            if account.state == "waiting":
                account.state = "running"
                account.num_computed = self.num_cached(machine, request_id, num_tokens)
                assert 0 <= account.num_computed < account.num_known
            account.num_computed += num_tokens
            assert account.num_computed <= account.num_known, f"law 2: {request_id} computes what nobody knows"
        active = [account for account in accounts.values() if account.state != "waiting"]
        assert len(active) + len(rooms) <= limits.max_num_seqs, f"law 4: {active} and {rooms} at {machine}"
        if not limits.enable_prefix_caching:
            counts = [account.num_computed for account in active] + list(rooms.values())
            num_held = sum(-(-count // limits.block_size) for count in counts)
            assert num_held + step.num_free_blocks == limits.num_blocks, f"law 3: {num_held} blocks at {machine}"
        self.steps[machine] = step

    def num_cached(self, machine, request_id, num_tokens):
        """The one thing that rows do not tell."""
        if not self.limits.enable_prefix_caching:
            return 0
        sequence = self.cluster.loop._slots[machine].machine.sequence(request_id)
        return sequence.num_computed_tokens - num_tokens

    # --- the cluster ------------------------------------------------------------------------------------------------

    def take_cluster(self, at, event, commands):
        if isinstance(event, CopyStarted) and self.moves.get(event.migration_id, ("",))[0] == "reserved":
            self.go(event.migration_id, "copying", at)
        for command in commands:
            match command:
                case Migrate():
                    assert command.migration_id not in self.moves
                    self.moves[command.migration_id] = ("proposed", at)
                    self.ways[command.way] += 1
                case CopyOut():
                    self.go(command.migration_id, "reserved", at)
                case HandOver():
                    self.go(command.migration_id, "handover", at)
                case Commit():
                    assert self.go(command.migration_id, "committed", at) == "handover"
                    self.num_committed[command.request_id] += 1
                case AbortMigration():
                    self.aborted_in[self.go(command.migration_id, "aborted", at)] += 1
                    self.reasons[command.reason] += 1

    def go(self, migration_id, state, at):
        """Enter a state; returns the one that it was in, which must have been left in time."""
        assert migration_id in self.moves, f"migration {migration_id} is {state}, and was over"
        before, since = self.moves.pop(migration_id)
        allowed = self.allowed[before]
        assert at - since <= allowed, (
            f"migration {migration_id} was {before} for {at - since} ns, {allowed} are allowed"
        )
        if state not in ("committed", "aborted"):
            self.moves[migration_id] = (state, at)
        return before


def check_end(cluster, journey, arrivals):
    """What must hold when all is over."""
    limits = journey.limits
    truth = {request.id: (request, num_output) for request, num_output in arrivals}
    assert sorted(record.id for record in cluster.records) == sorted(truth), "law 1"
    for record in cluster.records:
        request, num_output = truth[record.id]
        assert record.first_token_at == journey.first_at.get(record.id), "first token"
        assert record.num_migrations == journey.num_committed[record.id]
        if record.status == "finished":
            owed = min(
                num_output, request.max_tokens, limits.num_blocks * limits.block_size - request.num_prompt_tokens
            )
            assert owed == journey.given[record.id] == record.num_output_tokens, f"law 2: {record}"
            assert record.finished_at == journey.last_at[record.id]
        else:
            assert record.reason
    assert not journey.moves, "a migration never ended"
    assert not len(cluster.moves)
    for machine in cluster.machines():
        machine.check()
        assert not machine.unfinished()
        assert not machine.moving.rooms, "room is kept for nobody"
        assert machine.num_free_blocks == limits.num_blocks, "law 3: blocks are held for nobody"
    assert not any(journey.accounts.values())
    router = cluster.loop._slots[CLUSTER].machine
    router.check()
    assert not router.unfinished()


def message_faults(stream, instance_ids, horizon):
    kinds = [
        FaultKind("late_messages", (milliseconds(1), milliseconds(40)), (0.0005, 0.02)),
        FaultKind("doubled_messages", (milliseconds(1), milliseconds(40)), (0.0, 0.02)),
        FaultKind("lost_messages", (milliseconds(1), milliseconds(10))),
    ]
    return list(random_plan(stream, kinds, instance_ids, horizon, 8))


def random_faults(seed, instance_ids, arrivals, horizon):
    stream = RandomStreams(seed).stream("faults")
    faults = cluster_faults(stream, instance_ids, [request.id for request, _ in arrivals], horizon, num_crashes=3)
    return FaultPlan([*faults, *message_faults(stream, instance_ids, horizon)])


def play(
    seed,
    *,
    way="copy",
    num_requests=60,
    num_instances=3,
    gap=milliseconds(3),
    faults=None,
    limits=LIMITS,
    order="fcfs",
    batch="vllm_default",
    policy="tests.worlds.journeys:MovesAtRandom",
    interval=0.002,
    **options,
):
    """A world to its end, with all that must hold of it checked on the way and afterwards."""
    arrivals = seeded_arrivals(seed, num_requests, gap)
    instance_ids = [InstanceId(f"i{number}") for number in range(num_instances)]
    if faults is None:
        faults = random_faults(seed, instance_ids, arrivals, Duration(num_requests * gap))
    moves = {} if policy == "none" else {"seed": seed, "interval_seconds": interval}
    stack = StackConfig(order=order, batch=batch, migration=policy, parameters=Parameters(migration=moves))
    specs = tuple(InstanceSpec(instance_id, limits, capabilities=WAYS[way]) for instance_id in instance_ids)
    return play_arrivals(arrivals, SystemConfig(stack=stack, instances=specs, seed=seed), faults, **options)


def play_alone(way, num_prompt, transfer, policy):
    """One request of 300 tokens, alone with two instances, that comes to the first."""
    limits = InstanceLimits(num_blocks=2_000, max_num_batched_tokens=4_096)
    specs = tuple(InstanceSpec(InstanceId(f"i{number}"), limits, capabilities=WAYS[way]) for number in range(2))
    stack = StackConfig(dispatch="round_robin", migration=policy)
    arrivals = [(Request(RequestId("r"), Instant(0), num_prompt, 300), 300)]
    config = SystemConfig(stack=stack, instances=specs)
    return play_arrivals(arrivals, config, FaultPlan(), transfer=transfer, timeouts=MigrationLimits())


def play_arrivals(
    arrivals,
    config,
    faults,
    *,
    resume=True,
    leap=True,
    timeouts=TIMEOUTS,
    granted=None,
    transfer=TRANSFER,
    keeps_journal=True,
):
    """`granted` are the deadlines that the machine keeps, where they are to be others than those that it should."""
    options = WorldOptions(
        report_interval=milliseconds(2),
        report_delay=milliseconds(1),
        restart_after=milliseconds(20),
        resume=resume,
        transfer=transfer,
        leap=leap,
    )
    allowed = {
        "proposed": timeouts.reserve_timeout,
        "reserved": timeouts.copy_start_timeout,
        "copying": timeouts.copy_timeout,
        "handover": timeouts.hand_over_timeout,
    }
    journey = Journey(config.instances[0].limits, allowed) if keeps_journal else None

    def build(stack, seed):
        policies = cluster_policies(stack, RandomStreams(seed))
        return ClusterMachine(
            policies.dispatch,
            policies.admission,
            prefix_index=PrefixIndex(),
            migration=policies.migration,
            migration_limits=granted or timeouts,
            # A world that stands still is to be noticed soon.
            patience=milliseconds(500),
        )

    with mock.patch("rota.serving.sim.cluster.build_cluster", build):
        cluster = SimulatedCluster(config, arrivals, Pace(), options, journal=journey, faults=faults)
    if journey is not None:
        journey.cluster = cluster
    cluster.run()
    if journey is not None:
        check_end(cluster, journey, arrivals)
    return cluster, journey
