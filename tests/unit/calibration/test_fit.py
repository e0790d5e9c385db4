"""A fit finds an engine whose step times are known; and what it says of its own error is so."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.calibration.fabricated import ENGINE, GAP_NS, LIMITS, Truth, bent, facts, straight

from rota.base.errors import DataError
from rota.serving.calibration.calibrate import Origin, calibrate
from rota.serving.calibration.fit import fit
from rota.serving.calibration.steps import HOLDOUT_EVERY, Steps, steps_of
from rota.serving.calibration.terms import predicted
from rota.serving.engines.vllm.facts import StepRecord
from rota.serving.predictors.step_time.profiles import Profile
from rota.testing.step_time import check_step_time

ORIGIN = Origin(source="made up", date="2026-01-01", host="a host", accelerator="none")


def fitted(records: list[StepRecord]) -> Profile:
    return calibrate(steps_of(records, "facts"), records, ENGINE, ORIGIN)


def largest_error(profile: Profile, truth: Truth) -> float:
    predictor = profile.predictor()
    cases = [([], 1, 20), ([], 12, 3000), ([(150, 0)], 0, 0), ([(60, 512), (30, 0)], 10, 4000)]
    return max(
        abs(
            predictor.step_time(prefills=prefills, num_decodes=decodes, decode_kv_tokens=kv)
            / truth(prefills, decodes, kv)
            - 1
        )
        for prefills, decodes, kv in cases
    )


@pytest.mark.parametrize("truth", [straight, bent])
def test_an_engine_without_noise_is_found(truth: Truth) -> None:
    profile = fitted(facts(truth))
    assert largest_error(profile, truth) < 0.02
    assert profile.calibration is not None
    assert profile.calibration.errors[0].phase == "all"
    assert profile.calibration.errors[0].mape < 0.01


def test_the_simplest_shape_that_does_is_chosen() -> None:
    assert fitted(facts(straight, noise=0.05)).calibration.shape == "straight"  # type: ignore[union-attr]
    assert fitted(facts(bent, noise=0.05)).calibration.shape != "straight"  # type: ignore[union-attr]


def test_disturbed_steps_scale_it_and_do_not_bend_it() -> None:
    profile = fitted(facts(straight, noise=0.03, outliers=0.08))

    def disturbed(prefills: list[tuple[int, int]], num_decodes: int, decode_kv: int) -> float:
        # In the mean, as eight steps of a hundred take three times as long.
        return straight(prefills, num_decodes, decode_kv) * 1.16

    assert largest_error(profile, disturbed) < 0.04
    calibration = profile.calibration
    assert calibration is not None
    assert abs(calibration.errors[0].bias) < 0.05
    # On the wall clock the disturbed steps are errors; in CPU time they are not.
    assert calibration.errors[0].mape > 0.05
    assert calibration.cpu_mape is not None
    assert calibration.cpu_mape < 0.04


def test_a_pause_of_the_machine_is_not_the_engines() -> None:
    records = facts(straight, noise=0.02)
    spans = [(each, 10**11 if number % 400 == 399 else 0) for number, each in enumerate(records)]
    late = 0
    paused = []
    for each, pause in spans:
        paused.append(msgspec.structs.replace(each, at=each.at + late, step_ns=each.step_ns + pause))
        late += pause
    assert largest_error(fitted(paused), straight) < 0.04


def test_the_stated_error_is_that_of_steps_it_never_saw() -> None:
    records = facts(straight, noise=0.1, seed=3)
    calibration = fitted(records).calibration
    assert calibration is not None
    # The mean deviation of a normal noise of 10 % is 8 %.
    assert calibration.errors[0].mape == pytest.approx(0.08, abs=0.02)
    assert abs(calibration.errors[0].bias) < 0.03
    assert calibration.num_steps + calibration.num_held_out == len(records)

    # Held-out steps could be anything: the fit stays as it is, and its stated error does not.
    held = steps_of(records, "facts").held_out
    doubled = [
        msgspec.structs.replace(each, step_ns=each.step_ns * 2) if out else each
        for each, out in zip(records, held, strict=True)
    ]
    # Steps must not overlap: spread them out.
    doubled = [msgspec.structs.replace(each, at=each.at * 3) for each in doubled]
    profile = calibrate(_with_stretches(steps_of(doubled, "facts"), steps_of(records, "facts")), doubled, None, ORIGIN)
    assert profile.step_time == fitted(records).step_time
    assert profile.calibration is not None
    assert profile.calibration.errors[0].mape == pytest.approx(0.5, abs=0.05)


def _with_stretches(steps: Steps, like: Steps) -> Steps:
    return Steps(**{**{name: getattr(steps, name) for name in Steps.__slots__}, "stretch": like.stretch})


def test_whole_stretches_are_held_out() -> None:
    steps = steps_of(facts(straight, num_stretches=20, num_steps=30), "facts")
    held = {int(stretch) for stretch in steps.stretch[steps.held_out]}
    assert len(held) == 20 // HOLDOUT_EVERY
    assert not held & {int(stretch) for stretch in steps.stretch[~steps.held_out]}


def test_an_engine_that_was_never_idle_is_cut_by_time() -> None:
    records = [msgspec.structs.replace(each, at=number * 10**10) for number, each in enumerate(facts(straight))]
    busy = [msgspec.structs.replace(each, at=number * 10**8, step_ns=10**7) for number, each in enumerate(records)]
    steps = steps_of(busy, "facts")
    assert len(np.unique(steps.stretch)) >= 8
    assert (np.diff(steps.stretch) >= 0).all()
    assert 0.1 < steps.held_out.mean() < 0.4


def test_settings_and_overhead_are_the_engines_own() -> None:
    profile = fitted(facts(straight))
    assert profile.instance_limits() == LIMITS
    assert profile.step_overhead() == pytest.approx(GAP_NS, rel=1e-6)
    assert profile.capacity_differences() == []
    other = msgspec.structs.replace(LIMITS, num_blocks=450)
    (difference,) = profile.capacity_differences(other)
    assert difference == "num_blocks is 450 here, and the engine that was calibrated (vLLM 0.32.0) has 900"


def test_a_pause_after_clients_left_is_no_overhead() -> None:
    records = facts(straight, num_stretches=20, num_steps=30)
    late, moved = 0, []
    for number, each in enumerate(records):
        # Half way through each stretch all clients leave, and the next come a fifth of a second later.
        left = number % 30 == 15
        late += 200_000_000 if left else 0
        num_admitted = each.num_running if left else each.num_admitted
        moved.append(msgspec.structs.replace(each, at=each.at + late, num_admitted=num_admitted))
    assert fitted(moved).step_overhead() == pytest.approx(GAP_NS, rel=1e-6)


def test_without_the_engines_word_the_limits_are_those_seen() -> None:
    records = facts(straight, cpu=False)
    profile = calibrate(steps_of(records, "facts"), records, None, ORIGIN)
    assert profile.limits.num_blocks == LIMITS.num_blocks
    assert profile.calibration is not None
    assert profile.calibration.cpu_mape is None
    assert profile.calibration.limits is None


def test_what_cannot_be_fitted_is_refused_by_its_spot() -> None:
    with pytest.raises(DataError, match=r"f\.jsonl: 3 steps"):
        steps_of(facts(straight)[:3], "f.jsonl")
    broken = facts(straight)
    broken[7] = msgspec.structs.replace(broken[7], decode_kv_tokens=-1)
    with pytest.raises(DataError, match=r"f\.jsonl: step record 8 \(step 8\): a negative count"):
        steps_of(broken, "f.jsonl")
    broken[7] = msgspec.structs.replace(broken[7], decode_kv_tokens=1, prefills=((0, 4),))
    with pytest.raises(DataError, match="less than one token"):
        steps_of(broken, "f.jsonl")


@pytest.mark.parametrize("truth", [straight, bent])
def test_arrays_of_steps_are_predicted_as_single_ones(truth: Truth) -> None:
    records = facts(truth, noise=0.1)
    profile = fitted(records)
    times = predicted(profile.step_time.parameters, steps_of(records, "facts"))
    predictor = profile.predictor()
    for record, time in zip(records, times, strict=True):
        alone = predictor.step_time(
            prefills=record.prefills, num_decodes=record.num_decodes, decode_kv_tokens=record.decode_kv_tokens
        )
        assert alone == pytest.approx(time, abs=10)


def test_every_fit_is_a_predictor_by_the_book() -> None:
    for seed in range(3):
        check_step_time(fitted(facts(bent, noise=0.3, outliers=0.1, seed=seed)).predictor())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(0, 10**6))
def test_weights_are_never_negative_and_no_other_such_weights_fit_better(num_columns: int, seed: int) -> None:
    draws = np.random.default_rng(seed)
    columns = draws.random((40, num_columns))
    target = columns @ draws.normal(size=num_columns) + 5 + draws.random(40)
    target = np.maximum(target, 0.1)
    weights = fit(columns, target)
    assert (weights >= 0).all()
    # Within the bounds nothing nearby is better: each weight alone, moved either way.
    from rota.serving.calibration.fit import _not_negative

    plain = _not_negative(columns / target[:, None], np.ones(40))

    def loss(candidate: np.ndarray) -> float:
        return float((((columns @ candidate) / target - 1) ** 2).sum())

    for index in range(num_columns):
        for move in (-1e-3, 1e-3):
            other = plain.copy()
            other[index] = max(0.0, other[index] + move)
            assert loss(other) >= loss(plain) - 1e-9
