"""Step times from Splitwise's measurements: conformance, the measured points, and files that are none."""

import os
from pathlib import Path

import pytest

from rota.base.errors import ConfigError, DataError
from rota.serving.predictors.step_time import STEP_TIMES
from rota.serving.predictors.step_time.phases import PhasesStepTime
from rota.testing.step_time import check_step_time

DATA = Path(os.environ.get("ROTA_DATA", Path(__file__).parents[4] / "shared"))
TABLE = DATA / "profiles" / "splitwise" / "perf_model.csv"
HEADER = "model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel\n"


def predictor(model="bloom-176b", hardware="a100-80gb", **others):
    return PhasesStepTime(table=str(TABLE), model=model, hardware=hardware, **others)


def prompts(measured, *sizes, context=0, num_decodes=0):
    prefills = [(size, context) for size in sizes]
    return measured.step_time(prefills=prefills, num_decodes=num_decodes, decode_kv_tokens=500 * num_decodes) / 1e6


def decodes(measured, number):
    return measured.step_time(prefills=(), num_decodes=number, decode_kv_tokens=500 * number) / 1e6


@pytest.mark.parametrize("model", ["bloom-176b", "llama2-70b"])
@pytest.mark.parametrize("hardware", ["a100-80gb", "h100-80gb", "h100-80gb-pcap"])
def test_conforms(model, hardware):
    created = STEP_TIMES.create("phases", {"table": str(TABLE), "model": model, "hardware": hardware})
    check_step_time(created, num_steps=100)


def test_says_what_was_measured():
    measured = predictor()
    assert prompts(measured, 1024) == pytest.approx(287, abs=3)  # medians of 1 x 1024 (289) and 2 x 512 (287)
    assert prompts(measured, 512) == pytest.approx(174, abs=1)
    assert decodes(measured, 1) == pytest.approx(49.3, abs=0.1)
    assert decodes(measured, 64) == pytest.approx(96.6, abs=0.1)
    assert decodes(predictor(hardware="h100-80gb"), 64) == pytest.approx(63.8, abs=0.1)


def test_chunks_take_together_what_the_whole_prompt_takes():
    measured = predictor()
    chunks = prompts(measured, 2048) + prompts(measured, 2048, context=2048)
    assert chunks == pytest.approx(prompts(measured, 4096), rel=0.02)
    chunks += prompts(measured, 2048, context=4096) + prompts(measured, 2048, context=6144)
    assert chunks == pytest.approx(prompts(measured, 8192), rel=0.02)


def test_a_step_of_both_costs_a_tenth_more_and_no_less_than_its_decodes():
    measured = predictor()
    assert prompts(measured, 1000, num_decodes=24) == pytest.approx(1.1 * prompts(measured, 1024), rel=1e-6)
    assert prompts(measured, 1, num_decodes=300) >= decodes(measured, 300)


def test_other_tensor_parallel_degrees_are_other_rows():
    assert prompts(predictor("llama2-70b", tensor_parallel=2), 512) > 1.5 * prompts(predictor("llama2-70b"), 512)


def test_what_the_table_does_not_have_is_named():
    with pytest.raises(ConfigError, match="no rows of bloom-176b a100-80gb tp4") as raised:
        predictor(tensor_parallel=4)
    assert "bloom-176b a100-80gb tp8" in raised.value.hint


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a,b\n1,2\n", "1:1: no column batch_size, hardware"),
        (HEADER + "m,h,512,1,128,-3,40,8\n", "2: prompt_time: expected a positive number, got '-3'"),
        (HEADER + "m,h,512,one,128,3,40,8\n", "2: batch_size"),
        (HEADER + "m,h,512\n", "2: batch_size"),
        ("", "no column"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, text, what):
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=what):
        PhasesStepTime(table=str(path), model="m", hardware="h")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        PhasesStepTime(table=str(tmp_path / "none.csv"), model="m", hardware="h")
