"""Each dispatch policy: its contract, its rule, and that it beats its control where it should."""

from collections import Counter

import pytest
from tests.unit.dispatch.plain_prefix_index import match

from rota.base.errors import ConfigError, LawBroken
from rota.base.instant import Instant
from rota.base.random_streams import Stream
from rota.serving.api import InstanceId, Pick, Request, RequestId
from rota.serving.cluster.machine import ClusterMachine
from rota.serving.cluster.prefix_index import PrefixIndex
from rota.serving.model.commands import Dispatch
from rota.serving.model.events import InstanceStarted, RequestArrived, RequestFinished
from rota.serving.model.instance import InstanceLimits, InstanceSpec
from rota.serving.policies.admission.bounded_queue import BoundedQueue
from rota.serving.policies.dispatch import DISPATCH
from rota.serving.policies.dispatch.least_outstanding_tokens import LeastOutstandingTokens
from rota.serving.policies.dispatch.power_of_two import PowerOfTwo
from rota.serving.policies.dispatch.prefix_then_load import PrefixThenLoad
from rota.serving.policies.dispatch.round_robin import RoundRobin
from rota.testing.dispatch import ClusterSample, InstanceSample, check_dispatch_policy

NOW = Instant(5)


def request(number=0, num_prompt_tokens=160, blocks=()):
    return Request(RequestId(f"r{number}"), Instant(0), num_prompt_tokens, 10, block_hashes=tuple(blocks))


def cluster(*instances):
    return ClusterSample(NOW, instances)


def instance(name, num_requests=0, num_tokens=0, num_cached_blocks=0):
    return InstanceSample(InstanceId(name), num_requests, num_tokens, num_cached_blocks)


class OneRandomChoice:
    """The control of the power of two choices."""

    requires = frozenset()

    def __init__(self, *, stream):
        self._stream = stream

    def pick(self, request, cluster):
        return Pick(self._stream.choice(cluster.instances).id, "drawn")


@pytest.mark.parametrize("name", DISPATCH.table)
def test_keeps_the_contract(name):
    draws = name == "power_of_two"
    check_dispatch_policy(
        lambda: DISPATCH.create(name, services={"stream": Stream(7, "dispatch")}), ties_by_id=not draws
    )


class Stranger:
    requires = frozenset()

    def pick(self, request, cluster):
        return Pick(InstanceId("elsewhere"), "I know better")


class Silent:
    requires = frozenset()

    def pick(self, request, cluster):
        return Pick(cluster.instances[0].id, "")


class LastById:
    requires = frozenset()

    def pick(self, request, cluster):
        return Pick(cluster.instances[-1].id, "the last")


class ScoresInTokens:
    requires = frozenset()

    def pick(self, request, cluster):
        first = cluster.instances[0]
        return Pick(first.id, "the first", ((first.id, float(1 + first.num_outstanding_tokens)),))


class WritesToViews:
    requires = frozenset()

    def pick(self, request, cluster):
        chosen = cluster.instances[0]
        chosen.num_outstanding_requests = 0
        return Pick(chosen.id, "emptied it")


class SharesItsMemory:
    requires = frozenset()
    turns = 0

    def pick(self, request, cluster):
        SharesItsMemory.turns += 1
        return Pick(cluster.instances[SharesItsMemory.turns % len(cluster.instances)].id, "my turn")


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        (Stranger, "not among"),
        (Silent, "law 11"),
        (LastById, "alike"),
        (ScoresInTokens, r"\[0, 1\]"),
        (WritesToViews, "law 13"),
        (SharesItsMemory, "law 8|alike"),
    ],
)
@pytest.mark.usefixtures("unshrunk")
def test_the_suite_finds_a_broken_policy(broken, what):
    with pytest.raises(LawBroken, match=what):
        check_dispatch_policy(broken)


def test_round_robin_takes_turns_and_keeps_its_turn_when_instances_come_and_go():
    policy = RoundRobin()
    a, b, c = instance("a"), instance("b"), instance("c")
    picks = [policy.pick(request(), cluster(a, b, c)).instance_id for _ in range(4)]
    assert picks == ["a", "b", "c", "a"]
    assert policy.pick(request(), cluster(a, c)).instance_id == "c"
    assert policy.pick(request(), cluster(a, b, c)).instance_id == "a"


def test_least_outstanding_tokens_counts_tokens_and_not_requests():
    pick = LeastOutstandingTokens().pick(request(), cluster(instance("a", 1, 4000), instance("b", 9, 90)))
    assert pick.instance_id == "b"
    assert dict(pick.scores) == {"a": 0.0, "b": 1.0}
    assert "90" in pick.reason


def test_power_of_two_takes_the_less_loaded_of_the_two_that_it_drew():
    shown = cluster(*(instance(f"i{number}", 1, number) for number in range(5)))
    policy = PowerOfTwo(stream=Stream(3, "dispatch"))
    picks = Counter(policy.pick(request(), shown).instance_id for _ in range(500))
    assert picks["i4"] == 0, "the fullest of all loses every draw"
    assert picks["i0"] > picks["i1"] > picks["i2"] > picks["i3"] > 0


BLOCKS = range(10)


@pytest.mark.parametrize(
    ("shown", "expected", "because"),
    [
        ([instance("a", 0, 0, 4), instance("b", 9, 900, 6)], "b", "prefix cached"),
        ([instance("a", 0, 0, 4), instance("b", 9, 900, 4)], "a", "no prefix long enough"),
        ([instance("a", 2, 800, 8), instance("b", 1, 700, 8)], "b", "prefix cached"),
        ([instance("a", 2, 700, 8), instance("b", 1, 700, 8)], "a", "prefix cached"),
        ([instance("a", 32, 9000, 8), instance("b", 0, 0, 0)], "a", "prefix cached"),
        ([instance("a", 33, 9000, 8), instance("b", 0, 0, 0)], "b", "no prefix long enough"),
        ([instance("a", 90, 9000, 8), instance("b", 40, 90, 6), instance("c", 30, 9, 0)], "b", "prefix cached"),
    ],
    ids=[
        "the longest prefix wins over load",
        "too short a prefix does not",
        "load decides among equal prefixes",
        "the id decides among equals",
        "not overloaded yet",
        "an overloaded instance is left out",
        "the next best prefix stands in for an overloaded one",
    ],
)
def test_prefix_then_load(shown, expected, because):
    pick = PrefixThenLoad().pick(request(blocks=BLOCKS), cluster(*shown))
    assert pick.instance_id == expected
    assert pick.reason.startswith(because)


def test_prefix_then_load_tolerates_imbalance_in_proportion():
    shown = cluster(instance("a", 140, 900, 8), instance("b", 100, 90, 0))
    assert PrefixThenLoad().pick(request(blocks=BLOCKS), shown).instance_id == "b"
    assert PrefixThenLoad(balance_relative=1.5).pick(request(blocks=BLOCKS), shown).instance_id == "a"


@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("prefix_then_load", {"match_min": 1.1}, "match_min"),
        ("prefix_then_load", {"match_min": float("nan")}, "match_min"),
        ("prefix_then_load", {"balance_absolute": -1}, "balance_absolute"),
        ("prefix_then_load", {"balance_relative": 0.9}, "balance_relative"),
        ("prefix_then_load", {"balance_relativ": 1.5}, "balance_relativ"),
        ("round_robin", {"weight": 1}, "weight"),
        ("power_of_two", {}, "stream"),
    ],
)
def test_bad_parameters_are_named(name, parameters, says):
    with pytest.raises(ConfigError, match=says):
        DISPATCH.create(name, parameters)


def hit_rate(policy, num_families=12, num_instances=4, num_requests=600):
    """Share of prompt blocks that were on the chosen instance before. Caches hold a third of the families each."""
    index = PrefixIndex()
    machine = ClusterMachine(policy, BoundedQueue(), prefix_index=index)
    limits = InstanceLimits(num_blocks=4 * 24)
    for number in range(num_instances):
        machine.handle(InstanceStarted(InstanceSpec(InstanceId(f"i{number}"), limits)), NOW)
    stream = Stream(11, "families")
    num_hits = num_blocks = 0
    for number in range(num_requests):
        family = stream.integers(0, num_families)
        blocks = [*((family, block) for block in range(20)), *((family, number, block) for block in range(4))]
        arrived = request(number, 24 * 16, blocks)
        known = match(index, arrived)
        (command,) = machine.handle(RequestArrived(arrived), NOW)
        assert isinstance(command, Dispatch)
        num_hits += known.get(command.instance_id, 0)
        num_blocks += 24
        machine.handle(RequestFinished(arrived.id, command.instance_id), NOW)
    machine.check()
    return num_hits / num_blocks


def test_prefix_then_load_finds_caches_that_round_robin_misses():
    with_affinity, control = hit_rate(PrefixThenLoad()), hit_rate(RoundRobin())
    assert with_affinity > 0.75, with_affinity
    assert control < 0.5, control


def fullest(policy, num_instances=64, num_requests=64 * 8):
    """Most outstanding requests on any instance after that many arrivals of equal size and no end."""
    machine = ClusterMachine(policy, BoundedQueue())
    for number in range(num_instances):
        spec = InstanceSpec(InstanceId(f"i{number:02}"), InstanceLimits(num_blocks=1000))
        machine.handle(InstanceStarted(spec), NOW)
    for number in range(num_requests):
        machine.handle(RequestArrived(request(number, 100)), NOW)
    machine.check()
    return max(view.num_outstanding_requests for view in machine.instance_views())


@pytest.mark.parametrize("seed", range(5))
def test_two_choices_balance_better_than_one(seed):
    mean = 8
    assert fullest(LeastOutstandingTokens()) == mean
    two, one = fullest(PowerOfTwo(stream=Stream(seed, "two"))), fullest(OneRandomChoice(stream=Stream(seed, "one")))
    assert two <= mean + 3
    assert one >= mean + 5
