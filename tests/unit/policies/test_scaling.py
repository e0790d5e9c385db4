"""What scaling policies wish for, by hand."""

import math

import pytest

from rota.base.errors import ConfigError
from rota.base.instant import Instant, milliseconds, seconds
from rota.base.random_streams import RandomStreams
from rota.serving.api import (
    Heard,
    InstanceId,
    Outcome,
    Request,
    RequestId,
    Start,
    StartingInstance,
    StartOffer,
    StartSource,
    Stop,
    WorkTotals,
)
from rota.serving.policies.scaling.forecast import Forecast
from rota.serving.policies.scaling.freeness_band import FreenessBand
from rota.serving.policies.scaling.queue_reactive import QueueReactive
from rota.serving.policies.scaling.slo_attainment import SloAttainment
from rota.serving.predictors.demand.holt_winters import HoltWinters
from rota.serving.predictors.demand.seasonal_naive import SeasonalNaive
from rota.serving.stack import StackConfig, cluster_policies
from rota.testing.dispatch import InstanceSample
from rota.testing.scaling import FleetSample


def views(*num_requests, num_blocks=100, num_free=None):
    return [
        InstanceSample(
            InstanceId(f"i{number}"),
            num,
            num,
            num_running=num,
            num_blocks=num_blocks,
            num_free_blocks=num_blocks if num_free is None else num_free,
            observed_at=Instant(0),
        )
        for number, num in enumerate(num_requests)
    ]


def at(num_seconds, instances, **more):
    return FleetSample(Instant(seconds(num_seconds)), instances, **more)


def test_the_queue_is_counted_and_must_hold():
    policy = QueueReactive(target_requests=4, upscale_delay_seconds=30, downscale_delay_seconds=60)
    assert not policy.plan(at(0, views(9, 3)))
    assert not policy.plan(at(20, views(4, 4)))
    assert not policy.plan(at(30, views(9, 3)))
    (wish,) = policy.plan(at(60, views(9, 3)))
    assert wish == Start("12 ongoing requests want 3 instances at 4 each")
    assert not policy.plan(at(70, views(9, 3), starting=[StartingInstance(InstanceId("s"), None, Instant(0))]))
    assert not policy.plan(at(100, views(2, 1, 1)))
    stops = policy.plan(at(160, views(2, 1, 1)))
    assert [wish.instance_id for wish in stops] == ["i2", "i1"], "those with the fewest, the youngest first"


def test_freeness_is_kept_within_its_band_and_one_less_must_do():
    # 100 blocks of 16 tokens, of which 11 are free: 176 tokens less what was not seen, for 10 requests.
    policy = FreenessBand(min_steps=20, max_steps=60, below_seconds=10, above_seconds=10)
    full = views(10, 10, num_free=11)
    assert not policy.plan(at(0, full))
    (wish,) = policy.plan(at(10, full))
    assert isinstance(wish, Start)
    assert "17 steps" in wish.reason
    # 96 blocks free for 8 requests: 191 steps, and one alone would have more than the least.
    ample = views(8, 7, num_free=96)
    assert not policy.plan(at(20, ample))
    (wish,) = policy.plan(at(30, ample))
    assert wish.instance_id == "i1"
    # Half is free, 66 steps for each: but one alone would have nothing left.
    half = views(12, 11, num_free=50)
    assert not policy.plan(at(40, half))
    assert not policy.plan(at(60, half))


def heard(what, took, slo_tpot=None):
    request = Request(RequestId("r"), Instant(0), 10, max_tokens=5)
    return Outcome(request, what, took)


def test_promises_that_were_broken_call_for_more_and_spare_ones_for_less():
    policy = SloAttainment(ttft_seconds=1.0, tpot_seconds=0.1, target=0.9, calm_seconds=20.0)
    kept = [heard(Heard.FIRST_TOKEN, milliseconds(400)), heard(Heard.END, milliseconds(40))] * 4
    assert not policy.plan(at(0, views(1, 1), outcomes=kept))
    broken = [heard(Heard.END, milliseconds(150)), heard(Heard.LOST, None)]
    (wish,) = policy.plan(at(10, views(1, 1), outcomes=broken))
    assert wish == Start("80.0% of 10 promises kept in 60 s, to be 90.0%")
    late = policy.plan(at(20, views(1, 1), waits=[seconds(2)] * 100))
    assert len(late) == 2, "those who are late and still wait count, and much missing calls for more"
    on_its_way = [StartingInstance(InstanceId(name), None, Instant(0)) for name in ("s", "t")]
    assert not policy.plan(at(30, views(1, 1), waits=[seconds(2)] * 100, starting=on_its_way))
    for number in range(10, 13):
        assert not policy.plan(at(10 * number, views(1, 1), outcomes=kept)), "0.4 of a promise is too near to halve"
    easy = [heard(Heard.FIRST_TOKEN, milliseconds(100))] * 4
    assert isinstance(policy.plan(at(300, views(1, 1), outcomes=easy))[0], Stop)
    wishes = [policy.plan(at(300 + 10 * number, views(1, 1), outcomes=easy)) for number in range(1, 4)]
    assert [bool(each) for each in wishes] == [False, False, True], (
        "one at a time, and then it is seen what comes of it"
    )


class Told:
    """Says what it is told to say."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def forecast(self, history, num_ahead):
        self.asked.append((list(history), num_ahead))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def arrivals(policy, num_seconds, num_arrived, num_instances=1, **more):
    totals = WorkTotals(num_arrived)
    return policy.plan(at(num_seconds, views(*[0] * num_instances), totals=totals, max_instances=20, **more))


def test_the_forecast_looks_as_far_as_a_start_takes():
    told = Told([60.0] * 3 + [600.0] + [0.0] * 99, [60.0] * 3 + [600.0] + [0.0] * 99)
    policy = Forecast(predictor=told, rate_per_instance=1.0, headroom=1.0)
    assert not arrivals(policy, 0, 0)
    quick = [StartOffer(StartSource.SPARE, seconds(1))]
    assert not arrivals(policy, 60, 60, offers=quick), "in two minutes it is as now"
    slow = [StartOffer(StartSource.COLD, seconds(100))]
    assert len(arrivals(policy, 120, 120, offers=slow)) == 9, "ten times as much when a cold start would be over"
    assert told.asked[0] == ([60.0], 4 * 3)
    assert told.asked[1] == ([60.0, 60.0], 4 * 4)


def test_a_forecast_that_errs_goes_on_with_the_last_good_one():
    good = [60.0, 180.0, 300.0, 420.0, 540.0]
    told = Told(good, ValueError("no"), [math.nan], [], [-1.0], ValueError("no"), ValueError("no"))
    policy = Forecast(predictor=told, rate_per_instance=1.0, headroom=1.0)
    offers = [StartOffer(StartSource.SPARE, seconds(1))]
    arrivals(policy, 0, 0, 20)
    wanted = []
    for number in range(1, 7):
        wishes = arrivals(policy, 60 * number, 60 * number, 1, offers=offers)
        wanted.append(1 + len(wishes))
        assert number == 1 or ("last good" in wishes[0].reason if wishes else True)
    assert wanted == [5, 7, 9, 9, 9, 1], "as far as it reaches, and then what came last"


def test_history_is_filled_where_nobody_asked():
    told = Told([1.0], [1.0])
    policy = Forecast(predictor=told, rate_per_instance=1.0)
    arrivals(policy, 0, 0)
    arrivals(policy, 60, 30)
    arrivals(policy, 240, 90)
    assert told.asked[1][0] == [30.0, 20.0, 20.0, 20.0]


def test_seasons_come_back():
    day = [float(number % 6) for number in range(18)]
    assert list(SeasonalNaive(season_bins=6).forecast(day[:14], 4)) == [2.0, 3.0, 4.0, 5.0]
    assert list(SeasonalNaive(season_bins=60).forecast(day[:14], 2)) == [1.0, 1.0]


def test_holt_winters_learns_a_season_and_never_tells_less_than_nothing():
    season = [50 + 40 * math.sin(2 * math.pi * number / 24) for number in range(24)]
    predictor = HoltWinters(season_bins=24, refit_every=3)
    assert list(predictor.forecast(season[:3], 2)) == [season[2]] * 2
    history = season * 4
    for end in (72, 73, 74, 75):
        told = predictor.forecast(history[:end], 6)
        assert told == pytest.approx(history[end : end + 6], abs=5.0)
    assert all(
        value >= 0.0 for value in HoltWinters(season_bins=0).forecast([20.0 - number for number in range(20)], 30)
    )


def test_a_stack_that_forecasts_gets_its_predictor_and_others_need_none():
    config = StackConfig(scaling="forecast", demand="seasonal_naive")
    with pytest.raises(ConfigError, match="rate_per_instance"):
        cluster_policies(config, RandomStreams(0))
    unknown = StackConfig(demand="nobody")
    cluster_policies(unknown, RandomStreams(0))
