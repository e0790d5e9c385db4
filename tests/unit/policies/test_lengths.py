"""Predictors of output length, what is kept of their errors, and what predictions cost a simulated engine."""

import msgspec
import pytest

from rota.base.errors import ConfigError
from rota.base.instant import Duration, Instant
from rota.serving.assemble import SystemConfig, build
from rota.serving.metrics.length_errors import NUM_RANKED_MAX, LengthErrors, kendall_tau
from rota.serving.model.instance import InstanceId, InstanceLimits, InstanceSpec
from rota.serving.model.request import ProgramId, Request, RequestId, TenantId
from rota.serving.predictors.length.declared import Declared
from rota.serving.predictors.length.history import History
from rota.serving.sim.cluster import SimulatedCluster, WorldOptions
from rota.serving.stack import Parameters, StackConfig
from rota.serving.waiting import WaitingQueue

MS = 1_000_000


def request(name="r", *, tenant="a", prompt=100, max_tokens=1000, program=None, at=0):
    return Request(
        RequestId(name),
        Instant(at),
        prompt,
        max_tokens,
        tenant=TenantId(tenant),
        program=None if program is None else ProgramId(program),
    )


# --- predictors -------------------------------------------------------------------------------------------------------


def test_declared_is_what_the_client_allows():
    assert Declared().predict(request(max_tokens=77)) == 77


def test_history_goes_by_the_finest_group_of_which_enough_have_ended():
    history = History(num_least=3)
    assert history.predict(request()) == 1000, "nothing is known, but what the client allows"
    for length in (10, 20, 30):
        history.request_ended(request(tenant="b"), length)
    assert history.predict(request()) == 20, "anybody"
    for length in (100, 200, 300):
        history.request_ended(request(prompt=5000), length)
    assert history.predict(request()) == 200, "the tenant"
    for length in (1, 2, 3):
        history.request_ended(request(), length)
    assert history.predict(request()) == 2, "the tenant's prompts of that length"
    for length in (7, 8, 9):
        history.request_ended(request(program="p", tenant="c"), length)
    assert history.predict(request(program="p")) == 8, "the program"
    assert history.predict(request(program="p", max_tokens=4)) == 4, "never more than is allowed"


def test_history_learns_nothing_of_those_that_did_not_finish():
    history = History(num_least=1)
    history.request_ended(request(), None)
    assert history.predict(request()) == 1000


def test_history_says_the_quantile_of_the_last_answers():
    history = History(quantile=0.9, num_least=1, num_kept=11)
    for length in (*range(500, 600), *range(11)):
        history.request_ended(request(), length)
    assert history.predict(request()) == 9


def test_history_is_bounded_and_keeps_what_is_used():
    history = History(quantile=0.0, num_least=4, num_groups=6, num_kept=4)
    for number in range(1000):
        history.request_ended(request(tenant=f"t{number}"), 5)
        history.request_ended(request(tenant="steady"), 7)
    assert len(history._groups) == 6
    assert all(len(lately.sorted) == len(lately.by_time) <= 4 for lately in history._groups.values())
    assert history.predict(request(tenant="steady")) == 7


@pytest.mark.parametrize("wrong", [{"quantile": 1.5}, {"num_least": 9, "num_kept": 8}, {"num_groups": 0}])
def test_constants_of_history_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ConfigError, match="history"):
        History(**wrong)


def test_the_oracle_is_refused_where_nobody_knows_the_truth():
    stack = StackConfig(order="shortest_predicted_first", length="oracle")
    system = SystemConfig(stack, (InstanceSpec(InstanceId("i0"), InstanceLimits(num_blocks=10)),))
    with pytest.raises(ConfigError, match="true output lengths"):
        build(system)


def test_an_unknown_predictor_is_refused_by_name():
    stack = StackConfig(order="shortest_predicted_first", length="historic")
    with pytest.raises(ConfigError, match="stack: length: unknown length predictor 'historic'"):
        build(SystemConfig(stack, (InstanceSpec(InstanceId("i0"), InstanceLimits(num_blocks=10)),)))


def test_a_stack_that_says_nothing_of_lengths_is_written_as_before():
    assert "length" not in msgspec.to_builtins(StackConfig())


# --- errors -----------------------------------------------------------------------------------------------------------


def test_errors_by_hand():
    errors = LengthErrors()
    assert (errors.mean_absolute_error, errors.bias, errors.kendall_tau) == (None, None, None)
    for predicted, true in ((10, 20), (30, 10), (50, 60)):
        errors.add(predicted, true)
    assert errors.mean_absolute_error == pytest.approx(40 / 3)
    assert errors.bias == pytest.approx(0)
    assert errors.kendall_tau == pytest.approx(1 / 3)


def test_tau_counts_ties_as_tau_b_does():
    # By hand: one pair agrees, two are tied on the left, one is tied on the right.
    assert kendall_tau([1, 1, 2], [1, 2, 2]) == pytest.approx(1 / 2)
    assert kendall_tau([1, 1, 1], [1, 2, 3]) is None
    assert kendall_tau([3, 2, 1], [1, 2, 3]) == -1


def test_errors_of_a_long_run_are_kept_in_bounds_and_spread_over_it():
    errors = LengthErrors()
    for number in range(10 * NUM_RANKED_MAX):
        errors.add(number, number)
    assert len(errors._kept) <= NUM_RANKED_MAX
    assert errors._kept[-1][1] > 9 * NUM_RANKED_MAX
    assert errors.kendall_tau == 1


# --- in a simulation --------------------------------------------------------------------------------------------------


class Constant:
    def step_time(self, *, prefills, num_decodes, decode_kv_tokens, now=Instant(0)):
        return MS


def world(length, **parameters):
    stack = StackConfig(
        order="shortest_predicted_first",
        length=length,
        dispatch="round_robin",
        parameters=Parameters(length=parameters),
    )
    limits = InstanceLimits(num_blocks=100, block_size=4, max_num_seqs=1)
    arrivals = [(request(f"r{number}", prompt=1, max_tokens=50, at=1), 5 + number) for number in range(4)]
    cluster = SimulatedCluster(
        SystemConfig(stack, (InstanceSpec(InstanceId("i0"), limits),)),
        arrivals,
        Constant(),
        WorldOptions(report_interval=Duration(0)),
    )
    cluster.run()
    return cluster


def test_the_world_keeps_the_books():
    (facts,) = world("oracle").predictions.facts()
    assert (facts.predictor, facts.is_oracle, facts.num_predictions, facts.num_finished) == ("oracle", True, 4, 4)
    assert (facts.mean_absolute_error, facts.bias, facts.kendall_tau) == (0, 0, 1)
    (facts,) = world("declared").predictions.facts()
    assert (facts.is_oracle, facts.mean_absolute_error, facts.bias, facts.kendall_tau) == (False, 43.5, 43.5, None)


def test_a_prediction_takes_the_time_that_it_costs():
    def took(cluster):
        return max(record.finished_at for record in cluster.records)

    free, costly = world("oracle"), world("oracle", cost_us=250)
    assert took(costly) - took(free) == 4 * 250_000


def test_without_predictions_nothing_is_said_of_them():
    stack = StackConfig(dispatch="round_robin")
    system = SystemConfig(stack, (InstanceSpec(InstanceId("i0"), InstanceLimits(num_blocks=100)),))
    cluster = SimulatedCluster(system, [(request(), 5)], Constant())
    cluster.run()
    assert cluster.predictions.facts() == ()


# --- the queue that stays sorted --------------------------------------------------------------------------------------


class Waiting:
    def __init__(self, name, rank, priority=0):
        self.id = RequestId(name)
        self.rank = rank
        self.priority = priority
        self.tenant = TenantId("a")
        self.queue_position = 0


def test_ranks_are_asked_once_each_time_that_somebody_comes_to_wait():
    queue, asked = WaitingQueue(), []

    def rank(sequence):
        asked.append(sequence.id)
        return sequence.rank

    def walked():
        return [each.id for each in queue.ranked(rank)]

    some = [Waiting("c", 3), Waiting("a", 1), Waiting("low", 0, priority=1), Waiting("b", 2), Waiting("a2", 1)]
    for each in some:
        queue.append(each)
    assert walked() == walked() == ["a", "a2", "b", "c", "low"]
    assert len(asked) == 5
    queue.remove(some[3])
    some[3].rank = 0
    queue.prepend(some[3])
    assert walked() == ["b", "a", "a2", "c", "low"]
    assert asked[5:] == ["b"]
    gone = Waiting("gone", 0)
    queue.append(gone)
    queue.remove(gone)
    assert walked() == ["b", "a", "a2", "c", "low"]
    assert len(asked) == 6
