"""A profile that is written is the profile that is read, whatever is in it."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.calibration.fabricated import ENGINE, facts, straight

from rota.serving.calibration.calibrate import Origin, calibrate
from rota.serving.calibration.profile_file import profile_text, write_profile
from rota.serving.calibration.steps import steps_of
from rota.serving.predictors.step_time.fitted import FrontEnd
from rota.serving.predictors.step_time.profiles import Profile, load_profile

RECORDS = facts(straight, noise=0.05)
STEPS = steps_of(RECORDS, "facts")
ORIGIN = Origin(source="made up", date="2026-01-01", host="a host", accelerator="none")
PROFILE = calibrate(STEPS, RECORDS, ENGINE, ORIGIN, front_end=FrontEnd(4.25, 2.5, 9))


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    write_profile(PROFILE, path)
    assert load_profile(str(path)) == PROFILE
    assert [each.name for each in tmp_path.iterdir()] == ["p.toml"]
    assert PROFILE.front_end_ms == 6.75
    assert "held_out" in path.read_text()


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=20), st.floats(0, 1e5, allow_nan=False))
def test_any_text_and_any_number(text: str, overhead: float) -> None:
    profile = msgspec.structs.replace(PROFILE, source=text, step_overhead_ms=overhead)
    assert msgspec.toml.decode(profile_text(profile), type=Profile) == profile


def test_the_same_facts_give_the_same_bytes() -> None:
    again = calibrate(steps_of(facts(straight, noise=0.05), "facts"), RECORDS, ENGINE, ORIGIN)
    assert profile_text(again) == profile_text(calibrate(STEPS, RECORDS, ENGINE, ORIGIN))


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="nan"):
        profile_text(msgspec.structs.replace(PROFILE, tensor_parallel=float("nan")))
