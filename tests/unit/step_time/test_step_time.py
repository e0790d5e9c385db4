"""Step times: positive, pure, rising with work, equal in runs, and near the tables that they were made of."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rota.base.errors import ConfigError, DataError
from rota.base.instant import Instant
from rota.serving.predictors.step_time import STEP_TIMES
from rota.serving.predictors.step_time.affine import AffineStepTime
from rota.serving.predictors.step_time.grid import GridStepTime
from rota.serving.predictors.step_time.profiles import DEFAULT_PROFILE, load_profile, profile_names
from rota.serving.predictors.step_time.runs import decode_run
from rota.serving.predictors.step_time.surface import Curve, Surface
from rota.serving.predictors.step_time.table import COLUMNS, StepRow, read_table, shipped_tables
from rota.testing.step_time import check_step_time

DATA = Path(os.environ.get("ROTA_DATA", Path(__file__).parents[4] / "shared")) / "profiles" / "aiconfigurator"
THEIRS = {
    "llama-3.1-8b-a100": "Meta-Llama-3.1-8B_a100_sxm_vllm_tp1",
    "llama-3.1-8b-h100": "Meta-Llama-3.1-8B_h100_sxm_vllm_tp1",
    "llama-3.1-8b-l40s": "Meta-Llama-3.1-8B_l40s_vllm_tp1",
    "llama-3.1-70b-h100-tp4": "Meta-Llama-3.1-70B_h100_sxm_vllm_tp4",
    "qwen3-32b-h100-tp2": "Qwen3-32B_h100_sxm_vllm_tp2",
}
MS = 1_000_000


def their_table(name: str) -> str:
    path = DATA / f"{name}.csv"
    assert path.exists(), f"{path} is absent; set ROTA_DATA to the folder that holds profiles/"
    return str(path)


def predict(grid: GridStepTime | AffineStepTime, row: StepRow) -> int:
    prefills = [(row.new_tokens, row.prefix_tokens)] if row.num_prefills else []
    kv_tokens = row.num_decodes * row.decode_kv
    return grid.step_time(prefills=prefills, num_decodes=row.num_decodes, decode_kv_tokens=kv_tokens)


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", shipped_tables())
def test_grid_conforms(table: str) -> None:
    check_step_time(GridStepTime(table=table))


@pytest.mark.parametrize("name", [*THEIRS.values(), "Meta-Llama-3.1-8B_rtx_pro_6000_server_vllm_tp1"])
def test_grid_of_a_table_of_others_conforms(name: str) -> None:
    check_step_time(GridStepTime(table=their_table(name)))


@pytest.mark.parametrize("parameters", [{}, {"base_ms": 0.001, "token_us": 0, "kv_token_ns": 0.3, "seq_us": 0}])
def test_affine_conforms(parameters: dict[str, float]) -> None:
    check_step_time(AffineStepTime(**parameters))


class Stepwise:
    """Offers no runs, and dips: what the suite must find."""

    def __init__(self, rule: Callable[[int, int, int], float]) -> None:
        self.rule = rule

    def step_time(
        self, *, prefills: Sequence[tuple[int, int]], num_decodes: int, decode_kv_tokens: int, now: Instant = Instant(0)
    ) -> int:
        return int(self.rule(sum(new for new, _ in prefills), num_decodes, decode_kv_tokens))


def test_a_predictor_without_runs_is_stepped() -> None:
    predictor = Stepwise(lambda new, decodes, kv: 100 + new + decodes + kv)
    check_step_time(predictor)
    assert decode_run(predictor, 3, 10, 4) == [113, 116, 119, 122]


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        (lambda new, decodes, kv: new, "positive"),
        (lambda new, decodes, kv: 10**9 - decodes, "decodes more"),
        (lambda new, decodes, kv: 10**9 - kv % 7, "context tokens more|decodes more"),
        (lambda new, decodes, kv: 10**9 + new % 10, "new tokens more|prefill"),
    ],
)
def test_the_suite_finds_what_breaks_its_rules(rule: Callable[[int, int, int], float], complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_step_time(Stepwise(rule))


def test_the_suite_finds_a_run_that_is_not_its_steps() -> None:
    predictor = AffineStepTime()
    honest = predictor.decode_run
    predictor.decode_run = lambda *arguments: [time + (i == 7) for i, time in enumerate(honest(*arguments))]  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="step 7 took"):
        check_step_time(predictor)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 600), st.integers(0, 3_000_000), st.integers(1, 400))
def test_a_run_equals_its_steps(num_decodes: int, kv_tokens: int, num_steps: int) -> None:
    stepped = [
        GRID.step_time(prefills=(), num_decodes=num_decodes, decode_kv_tokens=kv_tokens + step * num_decodes)
        for step in range(num_steps)
    ]
    assert GRID.decode_run(num_decodes, kv_tokens, num_steps) == stepped


GRID = GridStepTime(table=DEFAULT_PROFILE)

cells = st.lists(st.lists(st.integers(0, 1000), min_size=3, max_size=3), min_size=2, max_size=4)


@given(cells, st.integers(0, 60), st.integers(0, 90), st.integers(0, 9), st.integers(0, 9))
def test_surfaces_never_fall(values: list[list[float]], x: int, y: int, more_x: int, more_y: int) -> None:
    surface = Surface([1 + 10 * i for i in range(len(values))], [0, 7, 30], values, below=3.3, beyond=1.7)
    assert surface(x, y) <= surface(x + more_x, y + more_y)
    assert surface(x, 7) == surface.row(x)[1]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6), st.integers(0, 80), st.integers(0, 9))
def test_curves_never_fall(values: list[float], x: int, more: int) -> None:
    curve = Curve([5 + 10 * i for i in range(len(values))], values)
    assert curve(x) <= curve(x + more)


def test_a_surface_without_dips_keeps_its_points() -> None:
    surface = Surface([1, 5], [0, 10], [[3, 5], [4, 9]], below=1, beyond=1)
    assert [surface(1, 0), surface(1, 10), surface(5, 0), surface(5, 10), surface(3, 5)] == [3, 5, 4, 9, 5]


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_grid_is_near_its_own_table_and_mixed_rows_are_predicted() -> None:
    """Prefill and decode rows are what the grid is made of; mixed rows are all left out. Prints the errors that the
    docstring of `GridStepTime` states, of its rule and of the two that lost. Kernels of 8-bit tables jump more."""
    errors: dict[str, list[float]] = {}
    for table in shipped_tables():
        if "fp8" in table:
            grid = GridStepTime(table=table)
            errors.setdefault("8 bit", []).extend(
                predict(grid, row) / (row.latency_ms * MS) - 1 for row in read_table(table)
            )
            continue
        grid = GridStepTime(table=table)
        empty = grid.step_time(prefills=(), num_decodes=1, decode_kv_tokens=0)
        for row in read_table(table):
            time = row.latency_ms * MS
            errors.setdefault(row.phase, []).append(predict(grid, row) / time - 1)
            if row.phase == "mixed":
                kv_tokens = row.num_decodes * row.decode_kv
                prefill = grid.step_time(prefills=[(row.new_tokens, 0)], num_decodes=0, decode_kv_tokens=0)
                decode = grid.step_time(prefills=(), num_decodes=row.num_decodes, decode_kv_tokens=kv_tokens)
                errors.setdefault("sum", []).append((prefill + decode - empty) / time - 1)
                errors.setdefault("max", []).append(max(prefill, decode) / time - 1)
    mean = {rule: fmean(map(abs, values)) for rule, values in errors.items()}
    most = {rule: max(map(abs, values)) for rule, values in errors.items()}
    for rule in errors:
        print(f"{rule}: mean {mean[rule]:.1%}, largest {most[rule]:.1%}, of {len(errors[rule])}")
    assert len(errors["mixed"]) == 360
    assert mean["8 bit"] < 0.03 and most["8 bit"] < 0.2
    assert mean["prefill"] < 0.006 and most["prefill"] < 0.06
    assert mean["decode"] < 0.011 and most["decode"] < 0.07
    assert mean["mixed"] < 0.015 and most["mixed"] < 0.09
    assert mean["mixed"] < mean["sum"] / 3 < mean["max"]


@pytest.mark.parametrize("ours", THEIRS)
def test_grid_agrees_with_a_table_made_apart(ours: str) -> None:
    """Points of another table of the same source, most of which ours lacks: the error of interpolating between ours."""
    grid = GridStepTime(table=ours)
    errors: dict[str, list[float]] = {}
    for row in read_table(their_table(THEIRS[ours])):
        if (
            row.phase != "mixed"
        ):  # Their mixed rows cut the prefill to the decodes' context; see the script's docstring.
            errors.setdefault(row.phase, []).append(abs(predict(grid, row) / (row.latency_ms * MS) - 1))
    assert len(errors["prefill"]) == 77 and len(errors["decode"]) == 96
    for phase, values in errors.items():
        assert fmean(values) < 0.02, (phase, fmean(values))
        assert max(values) < 0.11, (phase, max(values))


def test_decode_kv_is_of_each_sequence() -> None:
    """256 sequences of 16,384 tokens read 550 GB at 131,072 bytes a token: 340 ms at an A100's 1.6 TB/s, not 1.3."""
    rows = read_table(their_table(THEIRS["llama-3.1-8b-a100"]))
    (row,) = [row for row in rows if (row.num_decodes, row.decode_kv) == (256, 16384)]
    assert 340 < row.latency_ms < 400


def test_several_prefills_cost_less_than_one_of_all_their_tokens() -> None:
    """They share the matrix products, and each attends to itself only."""
    one = GRID.step_time(prefills=[(2048, 0)], num_decodes=0, decode_kv_tokens=0)
    four = GRID.step_time(prefills=[(512, 0)] * 4, num_decodes=0, decode_kv_tokens=0)
    assert 0.9 * one < four < one


def test_affine_defaults_are_as_near_as_they_say() -> None:
    rows = [row for row in read_table("llama-3.1-8b-a100") if row.new_tokens <= 2304 and row.prefix_tokens <= 4096]
    affine = AffineStepTime()
    errors = [abs(predict(affine, row) / (row.latency_ms * MS) - 1) for row in rows]
    assert fmean(errors) < 0.075 and max(errors) < 0.225


def test_affine_adds_up() -> None:
    affine = AffineStepTime(base_ms=2, token_us=3, kv_token_ns=5, seq_us=7)
    time = affine.step_time(prefills=[(10, 100), (20, 0)], num_decodes=4, decode_kv_tokens=900)
    assert time == 2 * MS + 34 * 3000 + 1000 * 5 + 6 * 7000
    assert affine.step_time(prefills=(), num_decodes=0, decode_kv_tokens=0) == 0


# --- profiles and bad input -------------------------------------------------------------------------------------------


def test_profiles_that_are_shipped() -> None:
    assert DEFAULT_PROFILE in profile_names() and len(profile_names()) == 5
    for name in profile_names():
        profile = load_profile(name)
        limits = profile.instance_limits()
        check_step_time(profile.predictor(), num_steps=20)
        assert limits.num_blocks * limits.block_size >= limits.max_model_len, f"{name} cannot hold its longest sequence"
        assert profile.step_overhead() == 2 * MS
        assert (limits.max_num_seqs, limits.max_num_batched_tokens) == (256, 2048)


def test_profile_of_a_user_finds_its_table_beside_it(tmp_path: Path) -> None:
    rows = ["prefill,1,16,0,0,0,10", "prefill,1,512,0,0,0,30", "decode,0,0,0,1,100,9", "decode,0,0,0,8,100,9.5"]
    (tmp_path / "mine.csv").write_text("\n".join([",".join(COLUMNS), *rows]))
    (tmp_path / "mine.toml").write_text(
        'model = "m"\naccelerator = "a"\nsource = "s"\nlimits = {num_blocks = 100}\n'
        'step_time = {name = "grid", parameters = {table = "mine.csv"}}\n'
    )
    profile = load_profile(str(tmp_path / "mine.toml"))
    check_step_time(profile.predictor())
    assert profile.predictor().step_time(prefills=[(512, 0)], num_decodes=0, decode_kv_tokens=0) == 30 * MS


HEADER = ",".join(COLUMNS)
BAD_TABLES = [
    ("", ":1:1: expected the header"),
    ("phase,tokens", ":1:1: expected the header"),
    (HEADER, ": no rows of phase prefill"),
    (f"{HEADER}\nprefill,1,16,0,0,0,10", ": no rows of phase decode"),
    (f"{HEADER}\nprefill,1,16,0,0,10", ":2:1: 6 columns"),
    (f"{HEADER}\nprefil,1,16,0,0,0,10", ":2:1: phase: unknown"),
    (f"{HEADER}\nprefill,1,-16,0,0,0,10", ":2:11: new_tokens: expected"),
    (f"{HEADER}\nprefill,1,16,0.5,0,0,10", ":2:14: prefix_tokens: expected"),
    (f"{HEADER}\nprefill,1,16,0,0,0,nan", ":2:20: latency_ms: expected"),
    (f"{HEADER}\nprefill,1,16,0,0,0,0", ":2:20: latency_ms: expected"),
    (f"{HEADER}\nprefill,1,0,0,0,0,10", ":2:11: new_tokens: expected"),
    (f"{HEADER}\ndecode,0,0,0,0,128,10", ":2:14: n_decode: expected"),
    (f"{HEADER}\ndecode,0,0,0,{'9' * 5000},128,10", ":2:14: n_decode: expected"),
]


@pytest.mark.parametrize(("text", "expected"), BAD_TABLES)
def test_bad_table_is_answered_with_its_spot(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        GridStepTime(table=str(path))
    assert caught.value.message.startswith(f"{path}{expected}"), caught.value.message


def test_names_that_are_not_known_hint() -> None:
    for load in (load_profile, read_table):
        with pytest.raises(ConfigError) as caught:
            load("llama-3.1-8b-a10")
        assert "llama-3.1-8b-a100" in (caught.value.hint or "")
    with pytest.raises(DataError, match=r"absent\.csv: cannot be read"):
        read_table("absent.csv")


@pytest.mark.parametrize(
    ("name", "parameters", "complaint"),
    [
        ("affine", {"base_ms": 0}, "base_ms must be positive"),
        ("affine", {"token_us": -1}, "token_us must be at least 0"),
        ("affine", {"kv_token_ns": float("nan")}, "kv_token_ns"),
        ("grid", {}, "'table' is missing"),
        ("grid", {"table": DEFAULT_PROFILE, "overhead": 1}, "unknown parameter 'overhead'"),
    ],
)
def test_bad_parameters_are_refused(name: str, parameters: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        STEP_TIMES.create(name, parameters)
