"""A description fitted to a trace draws what the trace is like; distances say how far off it is."""

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rota.base.config import parse_toml
from rota.base.errors import ConfigError
from rota.base.random_streams import RandomStreams
from rota.serving.workload.arrival_process import ArrivalProcess, RateWindows
from rota.serving.workload.arrivals import Arrival
from rota.serving.workload.conversations import Conversations
from rota.serving.workload.description import describe
from rota.serving.workload.distributions import Amounts, Lengths
from rota.serving.workload.fitting import fit, normal_correlation
from rota.serving.workload.formats import read_trace
from rota.serving.workload.generator import RequestClass, SharedPrefixes, SyntheticWorkload, generate, sized
from rota.serving.workload.goodness import Columns, compare, distance
from rota.serving.workload.reuse import PrefixReuse, ReuseBand
from rota.serving.workload.shaping import split_at_random, split_in_time
from rota.serving.workload.sorting import groups
from rota.serving.workload.toml_text import toml_of

DATA = Path(os.environ.get("ROTA_DATA", Path(__file__).parents[4] / "shared")) / "traces"
PROMPT = Lengths({"0": 16, "0.5": 512, "0.9": 2048, "1": 4096})
OUTPUT = Lengths({"0": 1, "0.5": 128, "1": 1024})
HALF = Amounts({"0": 0.5, "1": 0.5})
FLAT = ArrivalProcess(rate=5.0)


def base(**changes: object) -> SyntheticWorkload:
    fields: dict[str, object] = {"num_requests": 6000, "arrivals": FLAT, "prompt": PROMPT, "output": OUTPUT}
    return SyntheticWorkload(**fields | changes)  # type: ignore[arg-type]


SESSIONS = (
    Conversations(Lengths({"0": 1, "1": 9}), Amounts({"0": 0.0, "1": 20.0}), Lengths({"0": 10, "1": 90}), share=2.0),
    Conversations(
        turns=Lengths({"0": 3, "1": 3}),
        wait_seconds=HALF,
        new_tokens=Lengths({"0": 5, "1": 5}),
        continues=0.5,
        kept=HALF,
        tenant="b",
        prompt=Lengths({"0": 99, "1": 99}),
    ),
)
REUSE = PrefixReuse(
    64,
    (
        ReuseBand(600, 0.3, HALF, Amounts({"0": 1, "1": 5})),
        ReuseBand(4096, 0.9, Amounts({"0": 0.1, "1": 0.9}), Amounts({"0": 1, "1": 400}), 0.7),
    ),
)
KINDS = {
    "plain": base(),
    "bursty": base(arrivals=ArrivalProcess(rate=5.0, cv=3.0)),
    "moving": base(arrivals=ArrivalProcess(rate=5.0, windows=RateWindows(60.0, (0.5, 2.0, 0.0, 1.5)))),
    "batches": base(
        arrivals=ArrivalProcess(rate=5.0, gaps=Amounts({"0": 3, "1": 3}), batch=Lengths({"0": 1, "1": 20}))
    ),
    "correlated": base(length_correlation=0.8),
    "classes": base(classes=(RequestClass(1.0, -1, "gold"), RequestClass(3.0))),
    "reuse": base(reuse=REUSE),
    "sessions": base(sessions=SESSIONS),
}


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[Arrival]]:
    return {name: list(generate(workload, RandomStreams(5))) for name, workload in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
def test_a_fit_to_what_was_drawn_draws_the_like(name: str, drawn: dict[str, list[Arrival]]) -> None:
    workload = fit(drawn[name])
    assert parse_toml(toml_of(workload), SyntheticWorkload, "x") == workload
    again = Columns(generate(workload, RandomStreams(6)))
    seen = Columns(drawn[name])
    comparison = compare(seen, seen, again)
    bound = 0.12 if name == "sessions" else 0.06
    assert {what: each.ks for what, each in comparison.distances.items() if each.ks > bound} == {}
    for what, value in comparison.holdout.items():
        got = comparison.drawn[what]
        assert (value is None) == (got is None), what
        if value is None or got is None:
            continue
        if what.startswith("prefix"):
            assert got == pytest.approx(value, abs=0.08), what
        elif what == "length correlation":
            assert got == pytest.approx(value, abs=0.06 if name != "sessions" else 0.2), what
        elif what.startswith("dispersion"):
            assert got == pytest.approx(value, rel=0.6, abs=0.3), what
        else:  # a few gaps of a minute make up most of the variance of the process that moves
            assert got == pytest.approx(value, rel=0.3 if name == "moving" else 0.15), what


@pytest.mark.parametrize("name", KINDS)
def test_same_seed_same_draws_and_fewer_are_a_beginning(name: str, drawn: dict[str, list[Arrival]]) -> None:
    assert list(generate(KINDS[name], RandomStreams(5))) == drawn[name]
    assert list(generate(sized(KINDS[name], 50), RandomStreams(5))) == drawn[name][:50]
    assert list(generate(sized(KINDS[name], 50), RandomStreams(6))) != drawn[name][:50]


def test_the_rate_moves_as_its_windows_say(drawn: dict[str, list[Arrival]]) -> None:
    at = np.asarray([row.at / 1e9 for row in drawn["moving"]])
    counts = np.histogram(at, np.arange(0, 960, 60))[0].reshape(-1)[:16]
    assert [round(count / 300, 1) for count in counts[:4]] == pytest.approx([0.5, 2.0, 0.0, 1.5], abs=0.2)
    assert counts[2::4].sum() == 0


def test_batches_come_at_one_instant_at_the_rate(drawn: dict[str, list[Arrival]]) -> None:
    rows = drawn["batches"]
    assert len(rows) / (rows[-1].at / 1e9) == pytest.approx(5.0, rel=0.05)
    moments = sorted({row.at for row in rows})
    assert {round((b - a) / 1e9, 6) for a, b in pairwise(moments)} == {round(10.5 / 5.0, 6)}


def test_the_copula_leaves_the_distributions_alone(drawn: dict[str, list[Arrival]]) -> None:
    for name in ("num_prompt_tokens", "num_output_tokens"):
        plain, tied = (np.asarray([getattr(row, name) for row in drawn[kind]]) for kind in ("plain", "correlated"))
        assert distance(tied, plain).ks < 0.03
    prompts, outputs = (
        np.asarray([getattr(row, name) for row in drawn["correlated"]])
        for name in ("num_prompt_tokens", "num_output_tokens")
    )
    assert normal_correlation(prompts, outputs) == pytest.approx(0.8, abs=0.02)


def test_sessions_follow_the_rule_of_rows_and_keep_what_they_should(drawn: dict[str, list[Arrival]]) -> None:
    for group in groups(drawn["sessions"]):
        assert [row.id for row in group] == [str(number) for number in range(len(group))]
        assert all(row.after == (before.id,) for before, row in pairwise(group))
        assert len({row.session for row in group}) == len({row.tenant for row in group}) == 1
        for before, row in pairwise(group):
            if row.tenant == "default":
                assert 10 <= row.num_prompt_tokens - before.num_prompt_tokens <= 90
                kept = before.num_prompt_tokens // 16
                assert row.prefix_hashes[:kept] == before.prefix_hashes[:kept]
    turns = [len(group) for group in groups(drawn["sessions"]) if group[0].tenant == "b"]
    assert set(turns[:-1]) == {3}


def test_reuse_hits_as_often_as_the_bands_say(drawn: dict[str, list[Arrival]]) -> None:
    rows = drawn["reuse"]
    assert all(len(row.prefix_hashes) == -(-row.num_prompt_tokens // 64) for row in rows)
    seen: set[int] = set()
    found: dict[bool, list[bool]] = {True: [], False: []}
    for row in rows:
        found[row.num_prompt_tokens <= 600].append(bool(row.prefix_hashes) and row.prefix_hashes[0] in seen)
        seen.update(row.prefix_hashes)
    assert np.mean(found[True]) == pytest.approx(0.3, abs=0.04)
    assert np.mean(found[False]) == pytest.approx(0.9, abs=0.04)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RateWindows(0.0, (1.0,)),
        lambda: RateWindows(1.0, ()),
        lambda: RateWindows(1.0, (0.0, 0.0)),
        lambda: RateWindows(1.0, (1.0, -1.0)),
        lambda: ArrivalProcess(1.0, gaps=Amounts({"0": 0, "1": 0})),
        lambda: Amounts({"0": -1.0, "1": 0.0}),
        lambda: Amounts({"0": 2.0, "1": 1.0}),
        lambda: ReuseBand(10, 1.5, HALF, Amounts({"0": 1, "1": 1})),
        lambda: ReuseBand(10, 0.5, Amounts({"0": 0, "1": 2}), Amounts({"0": 1, "1": 1})),
        lambda: ReuseBand(10, 0.5, HALF, Amounts({"0": 0, "1": 1})),
        lambda: ReuseBand(10, 0.5, HALF, Amounts({"0": 1, "1": 1}), 2.0),
        lambda: PrefixReuse(16, ()),
        lambda: PrefixReuse(16, (REUSE.bands[1], REUSE.bands[0])),
        lambda: base(length_correlation=1.5),
        lambda: base(reuse=REUSE, prefix=SharedPrefixes(1, 16)),
        lambda: base(sessions=SESSIONS, classes=(RequestClass(1.0),)),
        lambda: Conversations(PROMPT, HALF, PROMPT, continues=2.0),
        lambda: Conversations(PROMPT, HALF, PROMPT, kept=Amounts({"0": 0, "1": 2})),
        lambda: Conversations(PROMPT, HALF, PROMPT, tenant=""),
    ],
)
def test_what_is_out_of_range_is_refused(make: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()  # type: ignore[operator]


def test_a_gap_longer_than_many_windows_takes_no_time() -> None:
    process = ArrivalProcess(rate=1e-6, windows=RateWindows(0.001, (2.0, 0.0)))
    instants = process.instants(RandomStreams(0).stream("x"))
    first = [next(instants) for _ in range(50)]
    assert first == sorted(first) and first[-1] / 50 == pytest.approx(1e6, rel=0.5)


# --- distances --------------------------------------------------------------------------------------------------------

values = st.lists(st.integers(0, 50), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(values, values.filter(any))
def test_distances_are_what_their_definitions_say(first: list[int], second: list[int]) -> None:
    got = distance(np.asarray(first), np.asarray(second))
    at = range(52)
    apart = [abs(sum(v <= x for v in first) / len(first) - sum(v <= x for v in second) / len(second)) for x in at]
    assert got.ks == pytest.approx(max(apart))
    assert got.wasserstein == pytest.approx(sum(apart) / (sum(second) / len(second)))
    assert distance(np.asarray(second), np.asarray(second)).ks == 0


# --- the traces in hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "within"),
    [
        # KS beyond the distance of the two parts of the trace, hit rate without end, hit rate of 10,000 blocks
        ("azure2023/AzureLLMInferenceTrace_conv.csv", (0.03, 0.0, 0.0)),
        ("mooncake/conversation_trace.jsonl", (0.10, 0.05, 0.05)),
        ("agents/agent_calls.csv", (0.35, 0.25, 0.25)),
    ],
)
def test_a_fit_is_about_as_near_to_the_holdout_as_the_trace_itself(name: str, within: tuple[float, ...]) -> None:
    path = DATA / name
    assert path.exists(), f"{path} is absent; set ROTA_DATA to the folder that holds traces/"
    rows = list(read_trace(path, RandomStreams(0)))
    last = max(row.at for row in rows if not row.after)
    if last:
        train, holdout = (list(split_in_time(rows, round(0.7 * last), is_first=first)) for first in (True, False))
    else:
        train, holdout = (list(split_at_random(rows, 0.7, 0, is_first=first)) for first in (True, False))
    workload = sized(fit(train), len(holdout))
    comparison = compare(Columns(train), Columns(holdout), Columns(generate(workload, RandomStreams(0))))
    for what, each in comparison.distances.items():
        assert each.ks <= comparison.noise[what].ks + within[0], what
    for what, bound in zip(("without end", "of 10,000 blocks"), within[1:], strict=True):
        value = comparison.holdout.get(f"prefix hits, cache {what}")
        if value is not None:
            assert comparison.drawn[f"prefix hits, cache {what}"] == pytest.approx(value, abs=bound), what


def test_too_little_to_fit_is_refused(drawn: dict[str, list[Arrival]]) -> None:
    with pytest.raises(ConfigError, match="a trace of 1 rows"):
        fit(drawn["plain"][:1])
    assert describe(generate(fit(drawn["plain"][:2]), RandomStreams(0))).num_rows == 2
