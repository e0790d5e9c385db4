"""Layer tables: read in place, exact at their points, straight between them, and refused where they are broken."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rota.base.errors import ConfigError, DataError
from rota.serving.predictors.step_time.attention import DecodeAttention, MixedAttention
from rota.serving.predictors.step_time.layer_tables import is_layer_folder, read_layer_tables
from rota.serving.predictors.step_time.layerwise import LayerwiseStepTime
from rota.serving.predictors.step_time.runs import decode_run
from rota.serving.predictors.step_time.surface import interpolated
from rota.testing.step_time import check_step_time

DATA = Path(os.environ.get("ROTA_DATA", Path(__file__).parents[4] / "shared")) / "profiles" / "layerwise"
CARDS = ("RTX4090", "RTXPRO6000")
LAYERS = 32


def tables(card: str) -> str:
    path = DATA / card
    assert path.exists(), f"{path} is absent; set ROTA_DATA to the folder that holds profiles/"
    return str(path)


@pytest.fixture(scope="module", params=CARDS)
def card(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skew", [True, False])
def test_layerwise_conforms(card: str, skew: bool) -> None:
    check_step_time(LayerwiseStepTime(tables=tables(card), skew=skew), is_measured=True)


PRO = LayerwiseStepTime(tables=tables("RTXPRO6000"))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 600), st.integers(0, 3_000_000), st.integers(1, 400))
def test_a_run_equals_its_steps(num_decodes: int, kv_tokens: int, num_steps: int) -> None:
    stepped = [
        PRO.step_time(prefills=(), num_decodes=num_decodes, decode_kv_tokens=kv_tokens + step * num_decodes)
        for step in range(num_steps)
    ]
    assert decode_run(PRO, num_decodes, kv_tokens, num_steps) == stepped


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4000), st.integers(0, 20_000), st.integers(0, 200), st.integers(0, 20_000), st.data())
def test_a_chunk_beside_decodes_never_takes_less_for_more_of_anything(
    chunk: int, before: int, num: int, each: int, draw: st.DataObject
) -> None:
    time = PRO._mixed(chunk, before, num, each)
    for axis in range(4):
        more = [chunk, before, num, each]
        more[axis] += draw.draw(st.integers(1, 500))
        assert PRO._mixed(*more) >= time


# --- exact at the points ----------------------------------------------------------------------------------------------


def test_points_without_dips_are_read_back_as_they_are(card: str) -> None:
    """A dip lies between a larger point below it and a smaller one above it; only such points are moved."""
    points = {point: time * 1000 for point, time in read_layer_tables(tables(card)).attention.items()}
    mixed, alone = MixedAttention(points), DecodeAttention(points)
    errors = []
    for (chunk, before, num, each), time in points.items():
        if chunk == 0:
            read = interpolated(*alone.row(num), num * each)
        elif num == 0:
            read = mixed.prefill(chunk, before)
        else:
            read = mixed(chunk, before, num, each)
        errors.append(abs(read / time - 1))
    errors.sort()
    # The few points far off are spikes: three times their neighbours, in the one table that was made in two sessions.
    assert errors[len(errors) // 2] < 0.005 and errors[int(0.95 * len(errors))] < 0.05, errors[:: len(errors) // 20]


def test_a_table_without_dips_is_exact_and_straight_between_its_points() -> None:
    points = {(0, 0, n, k): 10.0 * n + 2.0 * n * k for n in (1, 4) for k in (16, 64)}
    points |= {
        (c, b, n, k): 100.0 * c + 7.0 * b + 10.0 * n + 3.0 * n * k
        for c in (16, 64)
        for b in (0, 32)
        for n, k in [(0, 0), (1, 16), (1, 64), (4, 16), (4, 64)]
    }
    mixed, alone = MixedAttention(points), DecodeAttention(points)
    for (chunk, before, num, each), time in points.items():
        read = mixed(chunk, before, num, each) if chunk else interpolated(*alone.row(num), num * each)
        assert read == time
    assert mixed(40, 16, 4, 40) == 100 * 40 + 7 * 16 + 10 * 4 + 3 * 4 * 40
    assert interpolated(*alone.row(4), 4 * 40) == 10 * 4 + 2 * 4 * 40


def test_a_step_is_its_layers_added_up() -> None:
    read = read_layer_tables(tables("RTX4090"))
    model = LayerwiseStepTime(tables=tables("RTX4090"))
    dense = {name: points[512] for name, points in read.dense.items()}
    once = dense["embedding"] + dense["final_layernorm"]
    expected_us = once + LAYERS * (sum(dense.values()) - once + dense["layernorm"])
    expected_us += sum(points[1] for points in read.per_sequence.values())
    expected_us += LAYERS * read.attention[512, 0, 0, 0]
    time = model.step_time(prefills=[(512, 0)], num_decodes=0, decode_kv_tokens=0)
    assert time == pytest.approx(expected_us * 1000, rel=0.002)


def test_a_mixed_step_is_read_off_the_point_that_was_measured() -> None:
    read = read_layer_tables(tables("RTX4090"))
    model = LayerwiseStepTime(tables=tables("RTX4090"))
    attention = {}
    for before in (0, 1024):
        step = model.step_time(prefills=[(512, before)], num_decodes=32, decode_kv_tokens=32 * 1024)
        around = step - LAYERS * 1000 * read.attention[512, before, 32, 1024]
        attention[before] = around
    # What is around attention is the same for both, and is that of a step of as many tokens and sequences.
    assert attention[0] == pytest.approx(attention[1024], rel=0.005)
    alone = model.step_time(prefills=[(543, 0), (1, 0)], num_decodes=0, decode_kv_tokens=0)
    assert attention[0] == pytest.approx(alone - LAYERS * 1000 * read.attention[512, 0, 0, 0], rel=0.05)


def test_unlike_decodes_cost_a_straight_line_of_the_excess_of_the_longest() -> None:
    """The slope is that of the table's own skewed batches, scaled from three iterations to one."""
    model = LayerwiseStepTime(tables=tables("RTX4090"), skew=True)
    near, far = (model.skew_time(0, 64, 64 * 1000, 1000 + excess) for excess in (1000, 3000))
    assert far == pytest.approx(3 * near, rel=1e-5)
    assert near / LAYERS == pytest.approx(64.15e3 / 3, rel=0.05)
    assert LayerwiseStepTime(tables=tables("RTX4090")).skew_time(0, 64, 64 * 1000, 4000) == 0, "meta.yaml turns it off"


# --- broken folders ---------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A small folder that is whole, for a test to break."""
    shutil.copytree(Path(tables("RTX4090")) / "meta-llama" / "Llama-3.1-8B" / "bf16", tmp_path / "t")
    for path in (tmp_path / "t").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (tmp_path / "t" / "tp1" / "skew.csv").unlink()
    return tmp_path / "t"


def edit(name: str, change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        path = folder / "tp1" / name
        path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")

    return do


def line(number: int, text: str) -> Callable[[list[str]], list[str]]:
    return lambda lines: [*lines[: number - 1], text, *lines[number:]]


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (edit("dense.csv", line(1, "layer,token,time_us")), r"dense\.csv:1:1: expected the header"),
        (edit("dense.csv", line(7, "act_fn,6,-3.0")), r"dense\.csv:7:10: time_us: expected a positive number"),
        (edit("dense.csv", line(7, "act_fn,x,3.0")), r"dense\.csv:7:8: tokens: expected a whole number"),
        (edit("dense.csv", line(7, "act_fn,6")), r"dense\.csv:7:1: 2 columns"),
        (edit("dense.csv", line(7, "act_fn,5,3.0")), r"dense\.csv:7:8: tokens: expected each number once"),
        (edit("dense.csv", lambda lines: lines[:1]), r"dense\.csv: no rows"),
        (edit("dense.csv", lambda lines: [one for one in lines if "o_proj" not in one]), "lacks the layer 'o_proj'"),
        (edit("dense.csv", lambda lines: [*lines, "moe,1,4.0"]), "the layer 'moe', of which it is not known"),
        (edit("per_sequence.csv", lambda lines: [one for one in lines if "lm_head" not in one]), "lacks .* 'lm_head'"),
        (edit("attention.csv", line(3, "0,0,1,32,nan")), r"attention\.csv:3:10: time_us"),
        (edit("attention.csv", line(3, "0,0,0,32,9.0")), r"attention\.csv:3:5: n_decode: expected at least 1"),
        (
            edit("attention.csv", line(3, "0,0,1,16,9.0")),
            r"attention\.csv:3:1: prefill_chunk: expected each point once",
        ),
        (edit("attention.csv", lambda lines: lines[:90]), "needs rows of decodes alone and of a prefill alone"),
        (lambda folder: (folder / "tp1" / "attention.csv").write_bytes(b"prefill_chunk\xff"), "is not UTF-8"),
        (lambda folder: (folder / "tp1" / "dense.csv").unlink(), r"dense\.csv: cannot be read"),
        (lambda folder: (folder / "meta.yaml").unlink(), "no folder of layer tables"),
    ],
)
def test_a_broken_folder_is_refused_by_file_line_and_column(
    broken: Path, breakage: Callable[[Path], None], message: str
) -> None:
    LayerwiseStepTime(tables=str(broken))
    breakage(broken)
    with pytest.raises(DataError, match=message):
        LayerwiseStepTime(tables=str(broken))


def test_what_the_tables_lack_is_asked_for(broken: Path) -> None:
    with pytest.raises(DataError, match="no tables for tensor_parallel = 2"):
        LayerwiseStepTime(tables=str(broken), tensor_parallel=2)
    shutil.copytree(broken / "tp1", broken / "tp2")
    with pytest.raises(ConfigError, match="hold no communication"):
        LayerwiseStepTime(tables=str(broken), tensor_parallel=2)
    alone, two = (
        LayerwiseStepTime(tables=str(broken), tensor_parallel=n, all_reduce_us=10, all_reduce_gb_per_s=20)
        for n in (1, 2)
    )
    reduce_us = 64 * (10 + 1000 * 4096 * 2 / 20e3)
    more = [one.step_time(prefills=[(1000, 0)], num_decodes=0, decode_kv_tokens=0) for one in (alone, two)]
    assert more[1] - more[0] == pytest.approx(reduce_us * 1000, rel=0.001)
    with pytest.raises(DataError, match=r"no skew\.csv"):
        LayerwiseStepTime(tables=str(broken), skew=True)
    meta = broken / "meta.yaml"
    meta.write_text(meta.read_text().replace("meta-llama/Llama-3.1-8B", "acme/Nothing-7B"))
    with pytest.raises(ConfigError, match="unknown model 'acme/Nothing-7B'"):
        LayerwiseStepTime(tables=str(broken))
    assert LayerwiseStepTime(tables=str(broken), num_layers=32).model == "acme/Nothing-7B"


def test_a_folder_is_known_by_the_one_meta_below_it(broken: Path) -> None:
    assert is_layer_folder(broken) and is_layer_folder(broken.parent)
    shutil.copytree(broken, broken.parent / "u")
    assert not is_layer_folder(broken.parent)
