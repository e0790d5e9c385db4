"""What is promised is kept where step times are exact, refusals say why, and the sheddable go first."""

import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rota.base.errors import ConfigError
from rota.base.instant import Duration, Instant, milliseconds, seconds
from rota.serving.api import Admission, InstanceId, Request, RequestId, StepTimePredictor
from rota.serving.assemble import SystemConfig
from rota.serving.cluster.machine import ClusterMachine
from rota.serving.model.events import FirstTokenSeen, InstanceStarted, RequestArrived, RequestFailed
from rota.serving.model.instance import InstanceLimits, InstanceSpec
from rota.serving.model.request import SLO
from rota.serving.policies.admission.deadline_admission import DeadlineAdmission
from rota.serving.policies.dispatch.least_outstanding_tokens import LeastOutstandingTokens
from rota.serving.predictors.step_time.affine import AffineStepTime
from rota.serving.predictors.step_time.profiles import load_profile
from rota.serving.sim.cluster import SimulatedCluster
from rota.serving.stack import Parameters, StackConfig
from rota.testing.dispatch import ClusterSample, InstanceSample

STEPS = AffineStepTime(base_ms=10.0, token_us=100.0, kv_token_ns=100.0, seq_us=10.0)
A, B = InstanceId("a"), InstanceId("b")
SLOW = InstanceSample(A, max_num_batched_tokens=100)


def asked(number: int = 0, num_prompt_tokens: int = 100, max_tokens: int = 10, **more: Any) -> Request:
    return Request(RequestId(f"r{number}"), Instant(0), num_prompt_tokens, max_tokens, **more)


def policy(**parameters: Any) -> DeadlineAdmission:
    return DeadlineAdmission(**{"step_time": STEPS, "ttft_seconds": 1.0, **parameters})


def ask(asking: DeadlineAdmission, request: Request, *instances: InstanceSample, now: float = 0) -> Admission:
    return asking.admit(request, ClusterSample(Instant(seconds(now)), instances or (SLOW,)), 0)


def filled(asking: DeadlineAdmission, num: int, **of_request: Any) -> list[Admission]:
    return [ask(asking, asked(number, **of_request)) for number in range(num)]


def play(asking: StackConfig, arrivals: list[tuple[Request, int]], steps: StepTimePredictor = STEPS) -> list[Any]:
    limits = InstanceLimits(num_blocks=2000, max_num_seqs=64, max_num_batched_tokens=256)
    instances = tuple(InstanceSpec(each, limits) for each in (A, B))
    cluster = SimulatedCluster(SystemConfig(asking, instances), arrivals, steps)
    # The world's step times are those that the policy is told of.
    cluster.cluster._door._policy._step_time = STEPS  # type: ignore[attr-defined]
    cluster.cluster._door._policy._step_overhead = Duration(0)  # type: ignore[attr-defined]
    cluster.run()
    cluster.cluster.check()
    return cluster.records


def stack(admission: str, **parameters: Any) -> StackConfig:
    return StackConfig(
        admission=admission, dispatch="least_outstanding_tokens", parameters=Parameters(admission=parameters)
    )


SERIES = st.lists(
    st.tuples(st.integers(0, 120), st.integers(1, 900), st.integers(1, 60), st.sampled_from([300, 800, 3000])),
    min_size=1,
    max_size=60,
)


@settings(max_examples=30)
@given(series=SERIES)
def test_with_exact_step_times_and_lengths_every_promise_is_kept(series: list[tuple[int, int, int, int]]) -> None:
    now, arrivals = 0, []
    for number, (passed, num_prompt, num_output, ttft) in enumerate(series):
        now += milliseconds(passed)
        slo = SLO(ttft=milliseconds(ttft), tpot=milliseconds(80))
        arrivals.append(
            (Request(RequestId(f"r{number:02}"), Instant(now), num_prompt, num_output, slo=slo), num_output)
        )
    records = {each.id: each for each in play(stack("deadline_admission"), arrivals)}
    for request, num_output in arrivals:
        record = records[request.id]
        assert record.status in ("finished", "rejected")
        if record.status == "finished":
            assert record.first_token_at - request.arrived_at <= request.slo.ttft
            assert record.finished_at - record.first_token_at <= request.slo.tpot * (num_output - 1)


class AskedEverywhere(DeadlineAdmission):
    """What it must agree with: every instance is forecast, and what waits there is counted each time."""

    def _best(self, request, instances, share, now):  # type: ignore[no-untyped-def]
        best = None
        for place in self._places.values():
            waiting = [each for each in place.promises.values() if each.is_waiting]
            place.num_waiting = sum(each.num_own for each in waiting)
            place.num_weighted = sum(each.num_own * each.num_prompt_tokens for each in waiting)
        for view in instances:
            forecast = self._forecast(request, view, now)
            is_later = best is not None and forecast.ttft >= best.ttft
            if not is_later and self._obstacle(request, view, forecast, share) is None:
                best = forecast
        return best


def arrivals_at_a_fleet(draw: random.Random) -> Iterator[tuple[Request, tuple[InstanceSample, ...], Instant]]:
    """Requests of unlike lengths, classes and targets to instances of unlike limits and prefixes."""
    ids = [InstanceId(f"i{number}") for number in range(draw.randint(1, 12))]
    alike, now = draw.random() < 0.5, 0
    scale = draw.choice([100, 3000, 30_000])
    limits = [draw.choice([(256, 40_000, 2048), (6, 40_000, 2048), (256, 9000, 512)]) for _ in ids]
    for number in range(40):
        now += milliseconds(draw.choice([0, 20, 500]))
        views = []
        for each, (max_num_seqs, num_blocks, budget) in zip(
            ids, limits[:1] * len(ids) if alike else limits, strict=True
        ):
            views.append(
                InstanceSample(
                    each,
                    max_num_seqs=max_num_seqs,
                    num_blocks=num_blocks,
                    max_num_batched_tokens=budget,
                    num_cached_blocks=draw.choice([0, 0, 3, 100]),
                )
            )
        slo = SLO(
            ttft=draw.choice([None, milliseconds(300), seconds(3), seconds(60)]),
            tpot=draw.choice([None, None, milliseconds(30), milliseconds(300)]),
        )
        num_prompt = draw.choice([scale, draw.randint(1, 2 * scale)])
        hashes = tuple(range(num_prompt // 16)) if draw.random() < 0.7 else ()
        fact = asked(number, num_prompt, draw.randint(1, 500), slo=slo, priority=draw.choice([0, 0, 1]))
        yield msgspec.structs.replace(fact, block_hashes=hashes), tuple(views), Instant(now)


# So steep that the floor of a cell is far below the steps in it.
STEEP = AffineStepTime(base_ms=0.001, token_us=0.0, kv_token_ns=10_000.0)
PROFILE = load_profile("llama-3.1-8b-a100").predictor()


@pytest.mark.parametrize("seed", [*range(60), 375, 588])
def test_asks_of_few_instances_and_answers_as_if_it_had_asked_of_all(seed: int) -> None:
    draw = random.Random(seed)
    given: dict[str, Any] = {"ttft_seconds": draw.choice([1.0, 30.0])}
    given["step_time"] = draw.choice([STEPS, STEEP, PROFILE])
    given |= {"step_overhead": milliseconds(draw.choice([0, 2])), "step_tokens": draw.choice([None, None, 300])}
    few, all_ = DeadlineAdmission(**given), AskedEverywhere(**given)
    unfinished: list[Request] = []
    for request, views, now in arrivals_at_a_fleet(draw):
        cluster = ClusterSample(now, views)
        answer = few.admit(request, cluster, 0)
        assert answer == all_.admit(request, cluster, 0)
        unfinished += [request] if answer.admitted else []
        for seen in draw.sample(unfinished, draw.randint(0, min(2, len(unfinished)))):
            few.first_token_seen(seen)
            all_.first_token_seen(seen)
        while unfinished and draw.random() < 0.4:
            ended, num_output = unfinished.pop(draw.randrange(len(unfinished))), draw.choice([None, 5, 100])
            few.request_ended(ended, num_output)
            all_.request_ended(ended, num_output)


def test_the_predictor_is_asked_of_few_instances() -> None:
    class Counted(AffineStepTime):
        num_asked = 0

        def step_time(self, **what: Any) -> int:
            self.num_asked += 1
            return super().step_time(**what)

    steps, draw = Counted(base_ms=10.0, token_us=100.0, kv_token_ns=100.0), random.Random(0)
    asking = policy(step_time=steps, ttft_seconds=1e6)
    views = tuple(InstanceSample(InstanceId(f"i{number:02}"), num_blocks=10**6) for number in range(64))
    for number in range(640):
        steps.num_asked = steps.num_asked if number > 320 else 0
        assert asking.admit(asked(number, draw.randint(1, 2000)), ClusterSample(Instant(number), views), 0).admitted
    assert steps.num_asked < 320 * 64 / 2


def flood() -> list[tuple[Request, int]]:
    slo = SLO(ttft=milliseconds(800), tpot=milliseconds(80))
    return [(Request(RequestId(f"r{n:03}"), Instant(n * milliseconds(20)), 400, 40, slo=slo), 40) for n in range(200)]


def test_under_overload_promises_are_kept_that_a_router_without_them_breaks() -> None:
    def num_late(records: list[Any]) -> int:
        done = [each for each in records if each.status == "finished"]
        assert len(done) > 20
        return sum(each.first_token_at - each.arrived_at > milliseconds(800) for each in done)

    assert num_late(play(stack("deadline_admission"), flood())) == 0
    limits = InstanceLimits(num_blocks=2000, max_num_seqs=64, max_num_batched_tokens=256)
    instances = tuple(InstanceSpec(each, limits) for each in (A, B))
    free = SimulatedCluster(SystemConfig(stack("bounded_queue"), instances), flood(), STEPS)
    free.run()
    assert num_late(free.records) > 50


def test_an_engine_that_is_slower_than_predicted_breaks_promises_and_a_margin_saves_them() -> None:
    slower = AffineStepTime(base_ms=20.0, token_us=200.0, kv_token_ns=200.0, seq_us=20.0)

    def num_late(margin: float) -> int:
        records = play(stack("deadline_admission", margin=margin), flood(), slower)
        done = [each for each in records if each.status == "finished"]
        return sum(each.first_token_at - each.arrived_at > milliseconds(800) for each in done)

    assert num_late(0.0) > 0
    assert num_late(1.5) == 0


def test_a_refusal_says_what_was_predicted_and_when_to_come_back() -> None:
    answers = filled(policy(), 60)
    refused = [each for each in answers if not each.admitted]
    assert answers[0].admitted
    assert refused
    assert refused[0].status == 503
    assert "1 s is the target" in refused[0].reason
    assert refused[0].retry_after_seconds is not None
    assert answers[0].instance_ids == (A,)


def test_targets_that_an_empty_instance_misses_can_never_be_kept() -> None:
    answer = ask(policy(), asked(slo=SLO(ttft=milliseconds(1))))
    assert (answer.admitted, answer.status, answer.retry_after_seconds) == (False, 400, None)
    assert ask(policy(), asked(slo=SLO(tpot=milliseconds(5)))).status == 400


def test_a_newcomer_may_not_slow_down_who_was_promised_a_pace() -> None:
    asking = policy()
    wide = InstanceSample(A, max_num_batched_tokens=1000)
    assert ask(asking, asked(0, 1000, slo=SLO(tpot=milliseconds(200))), wide).admitted
    longer = asked(1, 10_000, slo=SLO(ttft=seconds(60)))
    asking.first_token_seen(asked(0))
    one = InstanceSample(A, max_num_batched_tokens=1000, num_blocks=10**6)
    assert ask(asking, longer, one).admitted
    crowd = asked(2, 10**6, slo=SLO(ttft=seconds(600)))
    answer = ask(asking, crowd, InstanceSample(A, max_num_batched_tokens=1000, num_blocks=10**6, max_model_len=10**7))
    assert "were promised" in answer.reason


def test_the_sheddable_are_refused_first() -> None:
    def num_in(priority: int) -> int:
        return sum(each.admitted for each in filled(policy(), 100, priority=priority))

    assert 0 < num_in(1) < num_in(0) == num_in(-3)
    assert "shed first" in filled(policy(), 100, priority=1)[-1].reason
    assert sum(each.admitted for each in filled(policy(sheddable_from=5), 100, priority=1)) == num_in(0)


def test_the_best_instance_is_promised_and_remembered_until_the_end() -> None:
    asking = policy()
    views = (InstanceSample(A, max_num_batched_tokens=100), InstanceSample(B, max_num_batched_tokens=100))
    places = [ask(asking, asked(number), *views).instance_ids for number in range(4)]
    assert places == [(A,), (B,), (A,), (B,)] or len(set(places)) == 2
    for number in range(4):
        asking.request_ended(asked(number), 5)
    assert not asking._place_of
    assert not asking._places
    assert asking.admit(asked(9), ClusterSample(Instant(0), ()), 0).instance_ids == ()


def test_prompts_wait_until_their_first_token_was_seen_and_no_longer() -> None:
    asking = policy(ttft_seconds=60.0)
    alone = ask(asking, asked(0, 1000))
    behind = ask(asking, asked(1, 1000))
    asking.first_token_seen(asked(0, 1000))
    asking.first_token_seen(asked(0, 1000))  # Again, since it was resumed.
    asking.request_ended(asked(1, 1000), None)
    after = ask(asking, asked(2, 1000))
    told = [float(each.reason.split("predicted in ")[1].split(" s")[0]) for each in (alone, behind, after)]
    assert told[0] <= told[2] < told[1]
    for number in (0, 2):
        asking.request_ended(asked(number), None)
    assert ask(asking, asked(3, 1000)).reason == alone.reason
    asking.first_token_seen(asked(7))  # Of one who was promised nothing.


def test_the_machine_tells_of_first_tokens_once_for_each_time_that_a_prompt_is_computed() -> None:
    class Heard(DeadlineAdmission):
        def __init__(self) -> None:
            super().__init__(step_time=STEPS)
            self.ids: list[RequestId] = []

        def first_token_seen(self, request: Request) -> None:
            self.ids.append(request.id)
            super().first_token_seen(request)

    heard, now = Heard(), Instant(0)
    machine = ClusterMachine(LeastOutstandingTokens(), heard, max_resumptions=1)
    machine.handle(InstanceStarted(InstanceSpec(A, InstanceLimits(num_blocks=1000))), now)
    for number in range(2):
        machine.handle(RequestArrived(asked(number, movable=True)), now)
    first, second = asked(0).id, asked(1).id
    machine.handle(FirstTokenSeen(first, A), now)
    machine.handle(FirstTokenSeen(first, A), now)
    machine.handle(FirstTokenSeen(second, B), now)  # Of an attempt that is over.
    assert heard.ids == [first]
    machine.handle(RequestFailed(first, A, "broke off", retryable=True, num_output_tokens=3), now)
    machine.handle(FirstTokenSeen(first, A), now)
    assert heard.ids == [first, first]


@pytest.mark.parametrize(
    "parameters",
    [
        {"margin": -0.1},
        {"ttft_seconds": 0},
        {"tpot_ms": 0},
        {"step_tokens": 0},
        {"sheddable_share": 0},
        {"fit_slack": -1},
    ],
)
def test_bad_parameters_are_named(parameters: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(parameters))):
        policy(**parameters)
